"""CrossKD against the naive twin; its adapter, its switches, and the wiring from hooks to head."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from arcface_kd.backbones import get_backbone
from arcface_kd.config.kd import KDConfig
from arcface_kd.data.dataset import RecordDataset
from arcface_kd.data.loader import FaceLoader
from arcface_kd.data.sampler import ViewSampler
from arcface_kd.distillation.distiller import Distiller
from arcface_kd.distillation.head import DistillationHead
from arcface_kd.distributed.ranks import RankGroup
from arcface_kd.errors import ConfigError, TeacherError
from arcface_kd.methods.base import Batch, Method, RunContext
from arcface_kd.methods.crosskd import Adapter, CrossKD, CrossKDConfig
from arcface_kd.teachers.base import load_teacher
from tests.host.trainer.faces import draw_faces
from tests.reference.crosskd import crosskd_terms
from tests.reference.problems import ARCFACE
from tests.teachers.feature_networks import Iresnet, Plain, Vit, seeded

CLASSES, DIMENSION = 7, 5
STUDENT, TEACHER = (4, 3, 3), (6, 2, 2)
LABELS = torch.tensor([0, 3, -1, 6, 3])


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


TAIL = random(11, 24, DIMENSION)


def tail(feature_map: Tensor) -> Tensor:
    """Not linear, as a tail with PReLU is not."""
    return (feature_map.flatten(1) @ TAIL).tanh() * 3


def context(student: tuple[int, int, int] = STUDENT, **keys: Any) -> RunContext:
    return RunContext(
        num_classes=CLASSES,
        embedding_size=3,
        margin=ARCFACE,
        ranks=RankGroup(alone=True),
        teacher_embedding_size=DIMENSION,
        teacher_classifier=random(5, CLASSES, DIMENSION),
        teacher_tail=tail,
        teacher_map_shape=TEACHER,
        student_map_shape=student,
        **keys,
    )


def batch(student: tuple[int, int, int] = STUDENT) -> Batch:
    maps = random(1, len(LABELS), *student).requires_grad_()
    teacher_maps = random(2, len(LABELS), *TEACHER) * 2 + 1
    embeddings = random(3, len(LABELS), 3).requires_grad_()
    teacher = normalize(tail(teacher_maps))
    return Batch(embeddings, embeddings, LABELS, teacher, [len(LABELS)], 0, maps, teacher_maps)


@pytest.mark.parametrize("mimic", ["embedding", "logits", "both"])
@pytest.mark.parametrize("align", [True, False])
def test_a_step_equals_the_twin(mimic: Any, align: bool) -> None:
    """Terms, and gradients in the map and in the adapter."""
    config = CrossKDConfig(mimic, embedding_weight=3.0, logit_weight=0.5, temperature=8.0, align=align)
    method = CrossKD(config, context(seed=4)).double()
    nn.init.normal_(convolution(method).bias)  # type: ignore[arg-type]
    given = batch()
    terms = method(given)
    torch.stack(list(terms.values())).sum().backward()
    assert given.student_map is not None
    assert given.teacher_map is not None
    own = given.student_map.detach().clone().requires_grad_()
    weight, bias = (each.detach().clone().requires_grad_() for each in convolution(method).parameters())
    wanted = crosskd_terms(
        own,
        given.teacher_map,
        tail,
        adapter=(weight[:, :, 0, 0], bias),
        align=align,
        labels=LABELS,
        classifier=random(5, CLASSES, DIMENSION),
        temperature=8.0,
    )
    weights = {"cross_embedding": 3.0, "cross_logits": 0.5}
    named = {name: weights[name] * value for name, value in zip(weights, wanted, strict=True)}
    kept = {"embedding": ["cross_embedding"], "logits": ["cross_logits"]}.get(mimic, list(weights))
    assert list(terms) == kept
    torch.stack([named[name] for name in kept]).sum().backward()
    for name in kept:
        torch.testing.assert_close(terms[name], named[name], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(given.student_map.grad, own.grad, rtol=1e-7, atol=1e-9)
    met = [each.grad for each in convolution(method).parameters()]
    torch.testing.assert_close(met[0], weight.grad, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(met[1], bias.grad, rtol=1e-7, atol=1e-9)


def test_the_mean_cosine_is_observed() -> None:
    method = CrossKD(CrossKDConfig(embedding_weight=1.0), context()).double()
    assert method.observations() == {}
    loss = method(batch())["cross_embedding"]
    torch.testing.assert_close(method.observations()["cross_cosine"], 1 - loss.detach())


def test_a_teacher_s_own_map_makes_no_loss() -> None:
    """With nothing to adapt, what stands for the student's map is the teacher's, in whatever scale."""
    given = batch(TEACHER)
    assert given.teacher_map is not None
    same = replace(given, student_map=given.teacher_map * 5 - 2)
    assert float(CrossKD(CrossKDConfig(), context(TEACHER)).double()(same)["cross_embedding"]) < 1e-6
    unaligned = CrossKD(CrossKDConfig(align=False), context(TEACHER)).double()
    assert float(unaligned(same)["cross_embedding"]) > 1
    assert float(unaligned(replace(given, student_map=given.teacher_map))["cross_embedding"]) < 1e-6


def test_autocast_around_the_head_does_not_reach_in() -> None:
    method = CrossKD(CrossKDConfig(), replace(context(), teacher_tail=lambda each: tail(each.double()).float()))
    given = replace(batch(), student_map=random(1, 5, *STUDENT).to(torch.bfloat16))
    given = replace(given, teacher_map=random(2, 5, *TEACHER).float(), teacher=given.teacher.float())  # type: ignore[union-attr]
    plain = method(given)["cross_embedding"]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(method(given)["cross_embedding"], plain)
    assert plain.dtype == torch.float32


# ---- the adapter


@pytest.mark.parametrize(
    ("student", "teacher"),
    [((4, 7, 7), (6, 7, 7)), ((4, 4, 4), (6, 7, 7)), ((4, 14, 14), (4, 7, 7)), ((6, 5, 3), (6, 2, 2))],
)
def test_any_map_gets_the_teacher_s_shape(student: tuple[int, int, int], teacher: tuple[int, int, int]) -> None:
    adapter = Adapter(student, teacher, "auto", 0)
    assert adapter(torch.randn(2, *student)).shape == (2, *teacher)
    assert (adapter.conv is None) == (student[0] == teacher[0])
    # Pooling and a 1x1 convolution commute.
    given = torch.randn(2, *student)
    pooled = nn.functional.adaptive_avg_pool2d(given if adapter.conv is None else adapter.conv(given), teacher[1:])
    torch.testing.assert_close(adapter(given), pooled, rtol=1e-5, atol=1e-5)


# ---- knobs


# ---- the wiring


class Run:
    """A student, a teacher and a head that are wired; the teacher's runs are counted."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        size: int,
        kd: str = "crosskd",
        file: Path | None = None,
        **options: object,
    ) -> None:
        self.teacher = load_teacher(teacher, {"size": size})
        distiller = Distiller(
            KDConfig(
                tuple(kd.split("+")), classifier=None if file is None else str(file), options={"crosskd": options}
            ),
            self.teacher,
        )
        self.runs = 0
        teacher.register_forward_pre_hook(self._count)
        self.student = distiller.watch(student).train()
        self.distiller = distiller
        self.head = DistillationHead(distiller, ARCFACE, DIMENSION, CLASSES, seed=4, ranks=RankGroup(alone=True))

    def _count(self, network: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        # One empty image is what a tail is run on.
        self.runs += int(len(inputs[0]) > 1)

    @property
    def method(self) -> CrossKD:
        method = self.head.methods["crosskd"]
        assert isinstance(method, CrossKD)
        return method


def images(size: int, count: int = 4, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


GIVEN = torch.tensor([0, 3, 3, 6])


def plain(seed: int, channels: int = 6) -> Plain:
    return seeded(Plain(DIMENSION, channels), seed)


NAMED: dict[str, Any] = {"student_map": "second", "teacher_map": "second"}


def test_the_step_is_that_of_the_method_on_the_maps_of_both() -> None:
    """Of a batch in training; the margin loss on the embedding, the rest through the teacher's own modules."""
    teacher, student = plain(1), plain(2, channels=4)
    run = Run(student, teacher, 16, **NAMED)
    twin = plain(2, channels=4).train()
    embeddings = run.student(images(16))
    loss = run.head(embeddings, GIVEN)
    loss.backward()
    conv = convolution(run.method)
    assert conv.bias is not None
    twin_map = twin.second(twin.first(images(16)))
    mimicry, _ = crosskd_terms(
        twin_map, teacher.second(teacher.first(images(16))), teacher.head, adapter=(conv.weight[:, :, 0, 0], conv.bias)
    )
    classifier = run.head.methods["classifier"]
    assert isinstance(classifier, Method)
    twin_embeddings = twin.head(twin_map)
    ce = classifier(Batch(twin_embeddings, twin_embeddings, GIVEN, None, [4], 0))["ce"]
    torch.testing.assert_close(loss, ce + 64 * mimicry, rtol=1e-4, atol=1e-4)
    (ce + 64 * mimicry).backward()
    for (name, met), wanted in zip(student.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(met.grad, wanted.grad, rtol=1e-3, atol=1e-3, msg=f"{name} differs")


def test_nothing_of_the_teacher_reaches_student_head_or_optimiser() -> None:
    teacher = plain(1)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    run = Run(plain(2, channels=4), teacher, 16, **NAMED)
    assert set(run.student.state_dict()) == set(plain(0).state_dict())
    assert [name for name in run.head.state_dict() if "crosskd" in name] == [
        "methods.crosskd.adapter.conv.weight",
        "methods.crosskd.adapter.conv.bias",
    ]
    run.head(run.student(images(16)), GIVEN).backward()
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_evaluation_keeps_no_map_and_does_not_disturb_the_step() -> None:
    run, other = (Run(plain(2, channels=4), plain(1), 16, **NAMED) for _ in range(2))
    embeddings = run.student(images(16))
    run.student.eval()
    run.student(images(16, 9, seed=5))
    run.student.train()
    assert torch.equal(run.head(embeddings, GIVEN), other.head(other.student(images(16)), GIVEN))
    with pytest.raises(RuntimeError, match="the teacher has seen no batch"):
        run.head(embeddings, GIVEN)


def test_images_that_change_their_size_are_said() -> None:
    run = Run(seeded(Iresnet(DIMENSION), 3), seeded(Iresnet(DIMENSION), 1), 32)
    run.distiller.maps.student_shape = (8, 4, 4)  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match=r"feature map is \(8, 2, 2\), and was \(8, 4, 4\) when it was watched"):
        run.head(run.student(images(32)), GIVEN)


@pytest.mark.parametrize(("make", "size"), [(Iresnet, 32), (Vit, 16)])
def test_iresnet_and_vit_by_themselves(make: Callable[[int], nn.Module], size: int) -> None:
    run = Run(seeded(make(DIMENSION), 2), seeded(make(DIMENSION), 1), size)
    run.head(run.student(images(size)), GIVEN)
    assert float(1 - run.method.observations()["cross_cosine"]) > 1e-4
    assert list(run.method.adapter.parameters()) == []


def test_our_networks_by_themselves_and_at_another_tap(tmp_path: Path) -> None:
    """From a checkpoint; a thin student of a MobileFaceNet has a map of other channels and size."""
    torch.save(seeded(get_backbone("mobilefacenet", num_features=DIMENSION), 1).state_dict(), tmp_path / "model.pt")
    network = load_teacher(tmp_path / "model.pt").network
    assert isinstance(network, nn.Module)
    for tap, shapes in ((0, ((192, 4, 4), (512, 7, 7))), (2, ((64, 14, 14), (64, 28, 28)))):
        # In half precision the student's map is bf16 here.
        run = Run(get_backbone("thin_r18", num_features=DIMENSION, fp16=tap > 0), network, 112, tap=tap)
        assert (run.method.context.student_map_shape, run.method.context.teacher_map_shape) == shapes
        loss = run.head(run.student(images(112)), GIVEN)
        loss.backward()
        assert loss.isfinite()
        assert all(parameter.grad is not None for parameter in run.student.parameters() if parameter.requires_grad)


# ---- what stops a run


def test_a_teacher_or_a_student_without_a_known_map_stops_before_the_first_step() -> None:
    with pytest.raises(TeacherError) as error:
        Run(plain(2), plain(1), 16)
    one_line(error, "crosskd needs the teacher's tail", "name the module", "Plain", "first, second, head")
    with pytest.raises(ConfigError) as missing:
        Run(plain(2), plain(1), 16, teacher_map="second")
    one_line(missing, "crosskd needs the student's feature map", "name the module", "first, second, head")
    distiller = Distiller(KDConfig(("crosskd",), options={"crosskd": NAMED}), load_teacher(plain(1), {"size": 16}))
    with pytest.raises(ConfigError, match=r"no student is watched; call Distiller\.watch"):
        DistillationHead(distiller, ARCFACE, DIMENSION, CLASSES, ranks=RankGroup(alone=True))


@pytest.mark.parametrize("align", [True, False])
def test_the_cache_serves_where_the_teacher_s_maps_are_not_looked_at(
    align: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With align_scale the teacher runs each step, which is said; without it, in the first epoch only."""
    faces = draw_faces(tmp_path, identities=4, images=2)
    networks = [plain(seed) for seed in (1, 2)]
    for network in networks:
        network.first.insert(0, nn.AvgPool2d(7))
    options = {"crosskd": {"align": align, **NAMED}}
    kd = KDConfig(("crosskd",), cache=str(tmp_path / "cache"), options=options)
    distiller = Distiller(kd, load_teacher(networks[0]))
    dataset = RecordDataset(faces.folder)
    # The same views in both epochs.
    loader = FaceLoader(dataset, batch_size=4, sampler=ViewSampler(len(dataset), seed=4))
    distiller.use_cache(loader)
    assert ("kd_cache has no effect: crosskd compares feature maps" in caplog.text) == align
    student = distiller.watch(networks[1]).train()
    head = DistillationHead(distiller, ARCFACE, DIMENSION, faces.num_classes, ranks=RankGroup(alone=True))
    shown: list[int] = []
    networks[0].register_forward_pre_hook(lambda _, inputs: shown.append(len(inputs[0])))
    for _ in range(2):
        for given, labels in loader:
            head(student(given), labels).backward()
    assert [count for count in shown if count > 1] == ([4] * 4 if align else [4] * 2)
    assert (tmp_path / "cache").exists() != align
