"""CrossKD against the naive twin; its adapter, its switches, and the wiring from hooks to head."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, normalize

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
from tests.reference.compare import assert_same_terms
from tests.reference.crosskd import crosskd_terms
from tests.reference.problems import ARCFACE
from tests.teachers.feature_networks import Iresnet, Plain, Vit, seeded

CLASSES, DIMENSION = 7, 5
STUDENT, TEACHER = (4, 3, 3), (6, 2, 2)
LABELS = torch.tensor([0, 3, -1, 6, 3])
ALONE = RankGroup(alone=True)


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


TAIL = random(11, 24, DIMENSION)
CLASSIFIER = random(5, CLASSES, DIMENSION)
OF_TEACHER = random(2, len(LABELS), *TEACHER) * 2 + 1


def tail(feature_map: Tensor) -> Tensor:
    """Not linear, as a tail with PReLU is not."""
    return (feature_map.flatten(1) @ TAIL).tanh() * 3


def make(*knobs: Any, student: tuple[int, int, int] = STUDENT, seed: int = 0, **options: Any) -> CrossKD:
    context = RunContext(
        *(CLASSES, 3, ARCFACE, ALONE, DIMENSION),
        teacher_classifier=CLASSIFIER,
        teacher_tail=tail,
        teacher_map_shape=TEACHER,
        student_map_shape=student,
        seed=seed,
    )
    return CrossKD(CrossKDConfig(*knobs, **options), context).double()


def batch(student_map: Tensor) -> Batch:
    embeddings = random(3, len(LABELS), 3).requires_grad_()
    return Batch(
        *(embeddings, embeddings, LABELS, normalize(tail(OF_TEACHER)), [len(LABELS)], 0, student_map, OF_TEACHER)
    )


@pytest.mark.parametrize("mimic", ["embedding", "logits", "both"])
@pytest.mark.parametrize("align", [True, False])
def test_a_step_equals_the_twin(mimic: Any, align: bool) -> None:
    """Terms, and gradients in the map and in the adapter; the student's own embedding gets nothing of it."""
    method = make(mimic, embedding_weight=3.0, logit_weight=0.5, temperature=8.0, align=align, seed=4)
    weight, bias = method.adapter.parameters()
    nn.init.normal_(bias)
    own = random(1, len(LABELS), *STUDENT).requires_grad_()
    given = batch(own)
    terms = method(given)
    mimicry, divergence = crosskd_terms(
        *(own, OF_TEACHER, tail),
        adapter=(weight[:, :, 0, 0], bias),
        align=align,
        labels=LABELS,
        classifier=CLASSIFIER,
        temperature=8.0,
    )
    wanted = {"cross_embedding": 3 * mimicry, "cross_logits": divergence / 2}
    kept = wanted if mimic == "both" else {f"cross_{mimic}": wanted[f"cross_{mimic}"]}
    assert_same_terms(terms, kept, own, weight, bias, tolerance=1e-8)
    assert torch.autograd.grad(torch.stack([*terms.values()]).sum(), given.embeddings, allow_unused=True) == (None,)


def test_the_mean_cosine_is_observed() -> None:
    method = make(embedding_weight=1.0)
    assert method.observations() == {}
    loss = method(batch(random(1, len(LABELS), *STUDENT)))["cross_embedding"]
    torch.testing.assert_close(method.observations()["cross_cosine"], 1 - loss.detach())


def test_a_teacher_s_own_map_makes_no_loss() -> None:
    """With nothing to adapt, what stands for the student's map is the teacher's, in whatever scale."""
    aligned, unaligned = (make(align=align, student=TEACHER) for align in (True, False))
    same = batch(OF_TEACHER * 5 - 2)
    assert float(aligned(same)["cross_embedding"]) < 1e-6
    assert float(unaligned(same)["cross_embedding"]) > 1
    assert float(unaligned(batch(OF_TEACHER))["cross_embedding"]) < 1e-6


def test_autocast_around_the_head_does_not_reach_in() -> None:
    method = make().float()
    method.context = replace(method.context, teacher_tail=lambda each: tail(each.double()).float())
    given = batch(random(1, 5, *STUDENT).to(torch.bfloat16))
    given = replace(given, teacher_map=OF_TEACHER.float(), teacher=normalize(tail(OF_TEACHER)).float())
    plain = method(given)["cross_embedding"]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(method(given)["cross_embedding"], plain)
    assert plain.dtype == torch.float32


@pytest.mark.parametrize(
    ("student", "teacher"),
    [((4, 7, 7), (6, 7, 7)), ((4, 4, 4), (6, 7, 7)), ((4, 14, 14), (4, 7, 7)), ((6, 5, 3), (6, 2, 2))],
)
def test_any_map_gets_the_teacher_s_shape(student: tuple[int, int, int], teacher: tuple[int, int, int]) -> None:
    """By average pooling and, where the channels differ, a 1x1 convolution, which commute; alike for a seed."""
    given, adapter = torch.randn(2, *student), Adapter(student, teacher, "auto", 0)
    assert (adapter.conv is None) == (student[0] == teacher[0])
    wanted = adaptive_avg_pool2d(given if adapter.conv is None else adapter.conv(given), teacher[1:])
    torch.testing.assert_close(adapter(given), wanted, rtol=1e-5, atol=1e-5)
    asked_for, again, other = (Adapter(student, teacher, "conv", seed).conv for seed in (0, 0, 1))
    assert asked_for is not None
    assert again is not None
    assert other is not None
    assert torch.equal(asked_for.weight, again.weight)
    assert not torch.equal(asked_for.weight, other.weight)


def test_equal_maps_need_no_adapter() -> None:
    given, adapter = torch.randn(2, *TEACHER), Adapter(TEACHER, TEACHER, "auto", 0)
    assert list(adapter.parameters()) == []
    assert adapter(given) is given


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
        classifier = None if file is None else str(file)
        config = KDConfig(tuple(kd.split("+")), classifier=classifier, options={"crosskd": options})
        self.distiller = Distiller(config, load_teacher(teacher, {"size": size}))
        self.runs = 0
        self.student = self.distiller.watch(student).train()
        self.head = DistillationHead(self.distiller, ARCFACE, DIMENSION, CLASSES, seed=4, ranks=ALONE)
        teacher.register_forward_pre_hook(self._count)

    def _count(self, network: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        # One empty image is what a tail is run on.
        self.runs += int(len(inputs[0]) > 1)

    def step(self, images: Tensor) -> Tensor:
        loss: Tensor = self.head(self.student(images), GIVEN)
        return loss

    @property
    def method(self) -> CrossKD:
        method = self.head.methods["crosskd"]
        assert isinstance(method, CrossKD)
        return method


def images(size: int, count: int = 4, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


GIVEN = torch.tensor([0, 3, 3, 6])
NAMED: dict[str, Any] = {"student_map": "second", "teacher_map": "second"}


def plain(seed: int, channels: int = 6) -> Plain:
    return seeded(Plain(DIMENSION, channels), seed)


def wired(**options: Any) -> Run:
    return Run(plain(2, channels=4), plain(1), 16, **{**NAMED, **options})


def test_the_step_is_that_of_the_method_on_the_maps_of_both() -> None:
    """Of a batch in training; the margin loss on the embedding, the rest through the teacher's own modules."""
    teacher, student, twin = plain(1), plain(2, channels=4), plain(2, channels=4).train()
    run = Run(student, teacher, 16, **NAMED)
    loss = run.step(images(16))
    loss.backward()
    assert run.runs == 1
    weight, bias = run.method.adapter.parameters()
    twin_map = twin.second(twin.first(images(16)))
    mimicry, _ = crosskd_terms(
        twin_map, teacher.second(teacher.first(images(16))), teacher.head, adapter=(weight[:, :, 0, 0], bias)
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
    adapter = [name for name in run.head.state_dict() if "crosskd" in name]
    assert adapter == ["methods.crosskd.adapter.conv.weight", "methods.crosskd.adapter.conv.bias"]
    run.step(images(16)).backward()
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_the_adapter_goes_on_where_it_was() -> None:
    first, other = wired(), wired()
    nn.init.normal_(next(first.method.adapter.parameters()))
    other.head.load_state_dict(first.head.state_dict())
    assert torch.equal(*(run.step(images(16)) for run in (first, other)))


def test_evaluation_keeps_no_map_and_does_not_disturb_the_step() -> None:
    run, other = wired(), wired()
    embeddings = run.student(images(16))
    run.student.eval()
    run.student(images(16, 9, seed=5))
    run.student.train()
    assert torch.equal(run.head(embeddings, GIVEN), other.step(images(16)))
    with pytest.raises(RuntimeError, match="the teacher has seen no batch"):
        run.head(embeddings, GIVEN)


def test_images_that_change_their_size_are_said() -> None:
    run = Run(seeded(Iresnet(DIMENSION), 3), seeded(Iresnet(DIMENSION), 1), 32)
    run.distiller.maps.student_shape = (8, 4, 4)  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match=r"\(8, 2, 2\), and was \(8, 4, 4\)"):
        run.step(images(32))


@pytest.mark.parametrize(("make", "size"), [(Iresnet, 32), (Vit, 16)])
def test_iresnet_and_vit_by_themselves(make: Callable[[int], nn.Module], size: int) -> None:
    run = Run(seeded(make(DIMENSION), 2), seeded(make(DIMENSION), 1), size)
    run.step(images(size))
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
        loss = run.step(images(112))
        loss.backward()
        assert loss.isfinite()
        assert all(parameter.grad is not None for parameter in run.student.parameters() if parameter.requires_grad)


def test_it_stands_beside_other_methods_and_takes_a_classifier(tmp_path: Path) -> None:
    run = wired(kd="adadistill+crosskd")
    run.step(images(16)).backward()
    assert list(run.head.methods) == ["adadistill", "crosskd"]
    torch.save(CLASSIFIER.float(), tmp_path / "head.pt")
    both = wired(file=tmp_path / "head.pt", mimic="both")
    both.step(images(16)).backward()
    assert set(both.head.last_terms) == {"ce", "cross_embedding", "cross_logits"}


def test_a_teacher_or_a_student_without_a_known_map_stops_before_the_first_step() -> None:
    places = "name the module.*first, second, head"
    with pytest.raises(TeacherError, match=f"crosskd needs the teacher's tail.*Plain.*{places}"):
        Run(plain(2), plain(1), 16)
    with pytest.raises(ConfigError, match=f"crosskd needs the student's feature map.*{places}"):
        Run(plain(2), plain(1), 16, teacher_map="second")
    distiller = Distiller(KDConfig(("crosskd",), options={"crosskd": NAMED}), load_teacher(plain(1), {"size": 16}))
    with pytest.raises(ConfigError, match=r"Distiller\.watch"):
        DistillationHead(distiller, ARCFACE, DIMENSION, CLASSES, ranks=ALONE)


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
    head = DistillationHead(distiller, ARCFACE, DIMENSION, faces.num_classes, ranks=ALONE)
    shown: list[int] = []
    networks[0].register_forward_pre_hook(lambda _, inputs: shown.append(len(inputs[0])))
    for _ in range(2):
        for given, labels in loader:
            head(student(given), labels).backward()
    assert [count for count in shown if count > 1] == ([4] * 4 if align else [4] * 2)
    assert (tmp_path / "cache").exists() != align
