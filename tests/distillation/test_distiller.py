"""One process's wiring: the student's hook, the head, what they say when they are used in the wrong way."""

import copy
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.optim.swa_utils import AveragedModel

from arcface_kd import registry
from arcface_kd.checkpoints.run_settings import from_tensor
from arcface_kd.config.kd import KDConfig
from arcface_kd.distillation.distiller import Distiller
from arcface_kd.distillation.drop_ins import margin_of
from arcface_kd.distillation.head import DistillationHead
from arcface_kd.distillation.tensorboard_log import TensorBoardLog
from arcface_kd.distributed.ranks import RankGroup
from arcface_kd.errors import CheckpointError, ConfigError, TeacherError
from arcface_kd.evaluation.report.scalars import read_scalars
from arcface_kd.losses.margin import Margin
from arcface_kd.methods.base import Batch, Method, Requirement
from arcface_kd.teachers.base import Teacher, load_teacher
from arcface_kd.teachers.options import TeacherOptions
from tests.reference.adadistill import adadistill_step
from tests.reference.problems import ARCFACE

CLASSES = 7


class Embedder(nn.Module):
    """(B, 3, 8, 8) images to (B, D), noting in which order networks are run."""

    def __init__(self, dimension: int, seed: int, calls: list[str], name: str) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(dimension, 3 * 8 * 8, generator=generator) / 14)
        self.calls, self.name = calls, name

    def forward(self, images: Tensor) -> Tensor:
        self.calls.append(self.name)
        return images.flatten(1) @ self.weight.T


@dataclass
class Run:
    """A student, a teacher and a head that are wired."""

    student: nn.Module
    teacher: Teacher
    head: DistillationHead
    calls: list[str]


def make(
    kd: str = "adadistill",
    dimensions: tuple[int, int] = (5, 5),
    log: TensorBoardLog | None = None,
    **options: dict[str, object],
) -> Run:
    """Student and teacher of these dimensions, wired."""
    calls: list[str] = []
    tutor = load_teacher(Embedder(dimensions[1], 1, calls, "teacher"), TeacherOptions(size=8))
    calls.clear()
    distiller = Distiller(KDConfig(tuple(kd.split("+")), options=options), tutor)
    watched = distiller.watch(Embedder(dimensions[0], 2, calls, "student"))
    head = DistillationHead(distiller, ARCFACE, dimensions[0], CLASSES, seed=4, ranks=RankGroup(alone=True), log=log)
    return Run(watched, tutor, head, calls)


def images(count: int = 4, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


LABELS = torch.tensor([0, 3, 3, 6])


def test_the_teacher_is_shown_each_training_batch_before_the_student() -> None:
    """First, so that its activations are gone when the student's are kept."""
    run = make()
    loss = run.head(run.student(images()), LABELS)
    assert run.calls == ["teacher", "student"]
    loss.backward()
    run.head(run.student(images(seed=1)), LABELS)
    assert run.calls == ["teacher", "student"] * 2


def test_the_step_is_that_of_the_method_on_what_both_have_said() -> None:
    run = make()
    centers = run.head.state_dict()["methods.adadistill.centers.weight"].double()
    embeddings = run.student(images())
    loss = run.head(embeddings, LABELS)
    teacher = run.teacher(images()).double()
    wanted = adadistill_step(embeddings.detach().double(), teacher, LABELS, centers, ARCFACE)
    torch.testing.assert_close(loss.double(), wanted.loss, rtol=1e-5, atol=1e-5)
    met = run.head.state_dict()["methods.adadistill.centers.weight"]
    torch.testing.assert_close(met.double(), wanted.centers, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", ["eval", "no_grad", "inference_mode"])
def test_evaluation_does_not_ask_the_teacher(how: str) -> None:
    run = make()
    if how == "eval":
        run.student.eval()
        run.student(images())
    else:
        with torch.no_grad() if how == "no_grad" else torch.inference_mode():
            run.student(images())
    assert run.calls == ["student"]


def test_evaluation_between_student_and_head_does_not_disturb_the_step() -> None:
    run = make()
    embeddings = run.student(images())
    run.student.eval()
    run.student(images(9, seed=5))
    run.student.train()
    run.head(embeddings, LABELS)


def test_the_head_without_the_student_says_what_to_do() -> None:
    run = make()
    embeddings = torch.randn(4, 5)
    with pytest.raises(RuntimeError, match=r"4 embeddings but the teacher has seen no batch: call the watched student"):
        run.head(embeddings, LABELS)
    run.student(images())
    run.head(embeddings, LABELS)
    with pytest.raises(RuntimeError, match="the teacher has seen no batch"):
        run.head(embeddings, LABELS)


def test_a_batch_of_another_size_is_not_taken_for_the_teacher_s() -> None:
    run = make()
    run.student(images(3))
    with pytest.raises(RuntimeError, match="4 embeddings but the teacher has seen a batch of 3"):
        run.head(torch.randn(4, 5), LABELS)


@pytest.mark.parametrize("wrong", [LABELS[:3], torch.zeros(4, 2)])
def test_labels_that_are_not_one_an_embedding_are_named(wrong: Tensor) -> None:
    run = make()
    with pytest.raises(ValueError, match=rf"given 4 embeddings and {wrong.numel()} labels"):
        run.head(run.student(images()), wrong)


@pytest.mark.parametrize(
    "labels",
    [LABELS.unsqueeze(1), LABELS.int(), LABELS.float().unsqueeze(1), LABELS.double(), LABELS.short()],
    ids=lambda labels: f"{labels.dtype} {tuple(labels.shape)}",
)
def test_labels_are_taken_as_mxnet_and_dali_bring_them(labels: Tensor) -> None:
    """And are left as they were: the host's head squeezes the caller's tensor in place."""
    run, other = make(), make()
    before = labels.clone()
    assert torch.equal(run.head(run.student(images()), labels), other.head(other.student(images()), LABELS))
    assert labels.shape == before.shape
    assert torch.equal(labels, before)


def test_one_row_and_then_another_number_of_rows() -> None:
    """The host's head cannot do either."""
    run = make()
    for count in (1, 4, 2):
        loss = run.head(run.student(images(count)), LABELS[:count])
        loss.backward()
        assert loss.ndim == 0
        assert loss.isfinite()


@pytest.mark.parametrize("wrong", [torch.rand(4), torch.rand(4, 6), torch.rand(4, 5, 1)], ids=lambda w: str(w.shape))
def test_embeddings_of_another_shape_are_named(wrong: Tensor) -> None:
    run = make()
    run.student(images())
    with pytest.raises(ValueError, match=r"the head was given embeddings \(4.*\); it takes \(b, 5\)"):
        run.head(wrong, LABELS)


def test_any_network_may_be_given_as_the_teacher() -> None:
    network = Embedder(5, 1, [], "teacher")
    distiller = Distiller(KDConfig(("adadistill",), options={"teacher": {"size": 8, "channels": "bgr"}}), network)
    assert isinstance(distiller.teacher, Teacher)
    torch.testing.assert_close(distiller.teacher(images()), network(images().flip(1)))


@pytest.mark.parametrize("kd", ["adadistill", "embedding+rkd"])
def test_a_copied_run_goes_on_by_itself_with_the_same_teacher(kd: str, tmp_path: Path) -> None:
    run = make(kd, log=TensorBoardLog(tmp_path, 1, True))
    run.head(run.student(images()), LABELS)
    student, head = copy.deepcopy((run.student, run.head))
    run.calls.clear()
    run.student(images(seed=1))
    losses = [head(student(images(seed=seed)), LABELS).item() for seed in (2, 3)]
    run.student(images(seed=2))
    other = run.head(run.student(images(seed=2)), LABELS).item()
    assert losses[0] == other
    assert head._distiller is not run.head._distiller
    assert head._distiller.teacher is run.head._distiller.teacher


def test_an_average_of_weights_is_kept_beside_a_run_without_a_second_teacher() -> None:
    run = make()
    average = AveragedModel(run.student)
    run.head(run.student(images()), LABELS).backward()
    average.update_parameters(run.student)
    run.calls.clear()
    with torch.no_grad():
        torch.testing.assert_close(average(images()), run.student(images()))
    assert "teacher" not in run.calls


def test_a_student_that_was_saved_whole_is_a_plain_network(tmp_path: Path) -> None:
    run = make()
    torch.save(run.student, tmp_path / "student.pt")
    student = torch.load(tmp_path / "student.pt", weights_only=False)
    assert (tmp_path / "student.pt").stat().st_size < 2 * 5 * 3 * 8 * 8 * 4
    torch.testing.assert_close(student.train()(images()), run.student(images()))
    assert student.calls == ["student"]


def test_nothing_of_the_teacher_reaches_student_head_or_optimiser() -> None:
    run = make()
    assert set(run.student.state_dict()) == {"weight"}
    assert set(run.head.state_dict()) == {"_extra_state", "class_range", "step", "methods.adadistill.centers.weight"}
    named = from_tensor(run.head.state_dict()["_extra_state"])["class_centers"]
    assert named == "methods.adadistill.centers.weight"
    assert list(run.head.parameters()) == []
    run.head(run.student(images()), LABELS).backward()
    assert isinstance(run.teacher.network, Embedder)
    assert run.teacher.network.weight.grad is None
    assert not run.teacher.network.weight.requires_grad


# ---- dimensions


def test_a_teacher_of_another_dimension_needs_a_projection() -> None:
    with pytest.raises(
        ConfigError, match=r"the teacher has 6 dimensions and the student 5: set embedding_size=6, or .*"
    ) as e:
        make(dimensions=(5, 6))
    assert "student.projection=linear" in str(e.value)


@pytest.mark.parametrize(("student", "teacher"), [(4, 6), (6, 4)])
def test_a_projection_is_the_head_s_and_learns(student: int, teacher: int) -> None:
    run = make(dimensions=(student, teacher), student={"projection": "linear"})
    assert set(run.student.state_dict()) == {"weight"}
    projection = run.head.projection
    assert projection is not None
    assert [tuple(p.shape) for p in run.head.parameters()] == [(teacher, student)]
    gram = projection.weight @ projection.weight.T if teacher < student else projection.weight.T @ projection.weight
    torch.testing.assert_close(gram, torch.eye(min(student, teacher)), rtol=1e-5, atol=1e-5)
    run.head(run.student(images()), LABELS).backward()
    assert projection.weight.grad is not None
    assert projection.weight.grad.abs().max() > 0
    again = make(dimensions=(student, teacher), student={"projection": "linear"}).head.projection
    assert again is not None
    assert torch.equal(again.weight, projection.weight)


@pytest.mark.usefixtures("strangers")
def test_methods_that_do_not_look_at_the_projection_need_none() -> None:
    for kd in ("unprojected", "rkd", "ekd+unprojected"):
        run = make(kd=kd, dimensions=(4, 6))
        assert run.head.projection is None
        run.head(run.student(images()), LABELS).backward()
    assert make(kd="unprojected", dimensions=(4, 6), student={"projection": "linear"}).head.projection is None
    with pytest.raises(ConfigError, match="the teacher has 6 dimensions and the student 4"):
        make(kd="rkd+pull", dimensions=(4, 6))


def test_equal_dimensions_get_no_projection() -> None:
    assert make(student={"projection": "linear"}).head.projection is None


# ---- methods


@dataclass(frozen=True)
class PullConfig:
    """How strongly it pulls."""

    weight: float = 1.0


class Pull(Method):
    """A stranger's method that does not classify: students towards their teachers."""

    Config = PullConfig
    requires: ClassVar[frozenset[Requirement]] = frozenset({Requirement.TEACHER_EMBEDDINGS})

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        assert batch.teacher is not None
        distance = (normalize(batch.projected) - normalize(batch.teacher)).square().sum(1).mean()
        return {str(getattr(self, "term", "pull")): self.config.weight * distance}


class Clashing(Pull):
    """Names its term as the classifier does."""

    term = "ce"


class Constant(Pull):
    """Two terms that no embedding moves: a number and a parameter."""

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        two = torch.full((), 2.0)
        return {"plain": two, "learned": two.clone().requires_grad_() * 1}


class Unprojected(Pull):
    """Compares nothing with the teacher's dimension."""

    projects = False

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return {"size": batch.projected.square().sum()}


class Rival(Pull):
    """Wants to classify as well."""

    classifies = True


@pytest.fixture
def strangers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Methods of this file, as if a package had brought them."""
    own = {name: f"{__name__}:{kind}" for name, kind in (("pull", "Pull"), ("clash", "Clashing"), ("rival", "Rival"))}
    own |= {name.lower(): f"{__name__}:{name}" for name in ("Constant", "Unprojected")}
    own["function"] = f"{__name__}:make"
    known = registry.entry_points

    def entry_points(group: str) -> dict[str, metadata.EntryPoint]:
        found = dict(known(group))
        if group == registry.METHODS:
            found |= {name: metadata.EntryPoint(name, value, group) for name, value in own.items()}
        return found

    monkeypatch.setattr(registry, "entry_points", entry_points)


@pytest.mark.usefixtures("strangers")
def test_a_method_that_does_not_classify_stands_beside_the_learned_classifier() -> None:
    run = make(kd="pull", pull={"weight": "3"})
    assert set(run.head.methods) == {"classifier", "pull"}
    embeddings = run.student(images())
    total = run.head(embeddings, LABELS)
    teacher = normalize(run.teacher(images()))
    pull = 3 * (normalize(embeddings) - teacher).square().sum(1).mean()
    alone = make(kd="pull", pull={"weight": 0.0})
    torch.testing.assert_close(total, pull + alone.head(alone.student(images()), LABELS))
    total.backward()
    assert len(list(run.head.parameters())) == 1


@pytest.mark.usefixtures("strangers")
def test_a_method_that_classifies_combines_with_one_that_does_not() -> None:
    run = make(kd="adadistill+pull")
    assert set(run.head.methods) == {"adadistill", "pull"}
    run.head(run.student(images()), LABELS).backward()


@pytest.mark.usefixtures("strangers")
@pytest.mark.parametrize(("kd", "other"), [("clash", "classifier"), ("adadistill+clash", "adadistill")])
def test_terms_of_one_name_are_both_trained_on_and_logged_under_their_methods(
    kd: str, other: str, tmp_path: Path
) -> None:
    run = make(kd=kd, log=TensorBoardLog(tmp_path, 1, writes=True))
    embeddings = run.student(images())
    total = run.head(embeddings, LABELS)
    scalars = {name.removeprefix("kd/"): values.y[-1] for name, values in read_scalars(tmp_path).items()}
    pull = (normalize(embeddings) - normalize(run.teacher(images()))).square().sum(1).mean()
    assert scalars["clash/ce"] == pytest.approx(pull.item(), rel=1e-5)
    assert scalars["clash/ce"] + scalars[f"{other}/ce"] == pytest.approx(total.item(), rel=1e-5)
    assert {f"gradient_norm/{name}/ce" for name in ("clash", other)} <= set(scalars)
    assert "ce" not in scalars


@pytest.mark.usefixtures("strangers")
def test_a_term_that_no_embedding_moves_is_logged_with_a_share_of_0(tmp_path: Path) -> None:
    run = make(kd="constant", log=TensorBoardLog(tmp_path, 1, writes=True))
    run.head(run.student(images()), LABELS).backward()
    scalars = {name.removeprefix("kd/"): values.y[-1] for name, values in read_scalars(tmp_path).items()}
    assert scalars["plain"] == scalars["learned"] == 2
    assert scalars["gradient_norm/plain"] == scalars["gradient_share/learned"] == 0
    assert scalars["gradient_share/ce"] == 1


def test_shares_of_gradients_that_are_all_0_are_0(tmp_path: Path) -> None:
    run = make(
        kd="embedding", log=TensorBoardLog(tmp_path, 1, writes=True), embedding={"labels": "none", "weight": 0.0}
    )
    run.head(run.student(images()), LABELS)
    assert read_scalars(tmp_path)["kd/gradient_share/embedding"].y.tolist() == [0]


@pytest.mark.usefixtures("strangers")
@pytest.mark.parametrize(
    ("methods", "said"),
    [
        (("adadistill", "rival"), "adadistill and rival both bring a classification loss of their own"),
        (("nonsense",), "no method named 'nonsense'"),
        (("function",), "method 'function' is .*; it must be a subclass of Method"),
    ],
)
def test_methods_that_cannot_be_are_refused(methods: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Distiller(KDConfig(methods))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"adadistill": {"aplha": "plain"}}, r"unknown option adadistill\.aplha"),
        ({"adadistill": {"alpha": "heavy"}}, r"adadistill\.alpha is 'heavy'"),
        ({"student": {"projection": "round"}}, r"student\.projection is 'round'"),
    ],
)
def test_options_are_checked_before_a_teacher_is_looked_for(options: dict[str, dict[str, object]], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Distiller(KDConfig(("adadistill",), "no_such_teacher.pt", options=options))


def test_no_method_is_the_trainer_s_own_head_and_needs_no_teacher() -> None:
    distiller = Distiller(KDConfig())
    student = Embedder(5, 2, [], "student")
    assert distiller.watch(student) is student
    assert not student._forward_pre_hooks
    head = DistillationHead(distiller, ARCFACE, 5, CLASSES, ranks=RankGroup(alone=True))
    head(student(images()), LABELS).backward()
    assert set(head.state_dict()) == {"_extra_state", "class_range", "step", "methods.classifier.weight"}
    assert from_tensor(head.state_dict()["_extra_state"])["class_centers"] == "methods.classifier.weight"


def test_a_teacher_is_not_loaded_when_distillation_is_off(tmp_path: Path) -> None:
    assert Distiller(KDConfig((), str(tmp_path / "no_such_teacher.pt"))).teacher is None


def test_a_teacher_that_is_missing_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match="give one with --kd-teacher FILE"):
        Distiller(KDConfig(("adadistill",)))
    with pytest.raises(TeacherError, match="no_such_teacher"):
        Distiller(KDConfig(("adadistill",), str(tmp_path / "no_such_teacher.pt")))


@pytest.mark.parametrize(
    ("sample_rate", "classes", "said"), [(0.0, 7, "sample_rate is 0.0"), (1.5, 7, "sample_rate is 1.5")]
)
def test_a_head_that_cannot_be_is_refused(sample_rate: float, classes: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        DistillationHead(Distiller(KDConfig()), ARCFACE, 5, classes, sample_rate, ranks=RankGroup(alone=True))


# ---- state


def test_the_state_of_a_resumed_run_goes_on_to_the_same_bits() -> None:
    whole, first = make(), make()
    for step in range(4):
        whole_loss = whole.head(whole.student(images(seed=step)), LABELS)
    for step in range(2):
        first.head(first.student(images(seed=step)), LABELS)
    resumed = make()
    resumed.head.load_state_dict(first.head.state_dict())
    for step in (2, 3):
        resumed_loss = resumed.head(resumed.student(images(seed=step)), LABELS)
    assert torch.equal(resumed_loss, whole_loss)
    for name, value in whole.head.state_dict().items():
        assert torch.equal(resumed.head.state_dict()[name], value), name
    assert int(resumed.head.step) == 4


def test_sampling_goes_on_where_it_was() -> None:
    """The draw of a step depends on its number, which is a part of the state."""

    def head() -> DistillationHead:
        return DistillationHead(Distiller(KDConfig()), ARCFACE, 5, 400, 0.1, seed=1, ranks=RankGroup(alone=True))

    rows, labels = torch.randn(4, 5), torch.tensor([1, 50, 300, 399])
    whole, first, resumed = head(), head(), head()
    losses = [whole(rows, labels).item() for _ in range(4)]
    assert len(set(losses)) == 4
    for _ in range(2):
        first(rows, labels)
    resumed.load_state_dict(first.state_dict())
    assert [resumed(rows, labels).item() for _ in range(2)] == losses[2:]


def test_a_state_of_other_methods_is_refused_in_one_line() -> None:
    other = DistillationHead(Distiller(KDConfig()), ARCFACE, 5, CLASSES, seed=4, ranks=RankGroup(alone=True))
    with pytest.raises(
        CheckpointError, match=r"lacks methods\.adadistill\.centers\.weight and has methods\.classifier"
    ) as e:
        make().head.load_state_dict(other.state_dict())
    assert "\n" not in str(e.value)
    make().head.load_state_dict(other.state_dict(), strict=False)


def test_a_state_of_another_number_of_classes_is_refused() -> None:
    other = DistillationHead(Distiller(KDConfig()), ARCFACE, 5, 9, ranks=RankGroup(alone=True))
    with pytest.raises(CheckpointError, match="head has 9 classes, the run 7"):
        make().head.load_state_dict(other.state_dict())


def test_the_entries_that_are_split_over_ranks_are_known_by_name() -> None:
    run = make(dimensions=(4, 6), student={"projection": "linear"})
    assert run.head.sharded_entries() == ("methods.adadistill.centers.weight",)
    assert run.head.sharded_parameters() == []
    plain = DistillationHead(Distiller(KDConfig()), ARCFACE, 5, 9, ranks=RankGroup(alone=True))
    assert [tuple(p.shape) for p in plain.sharded_parameters()] == [(9, 5)]


# ---- scalars


@pytest.mark.usefixtures("strangers")
def test_terms_and_their_gradient_norms_are_logged_apart(tmp_path: Path) -> None:
    run = make(kd="adadistill+pull", log=TensorBoardLog(tmp_path, 2, writes=True))
    for step in range(4):
        embeddings = run.student(images(seed=step))
        loss = run.head(embeddings, LABELS)
        if step == 3:
            pull = (normalize(embeddings) - normalize(run.teacher(images(seed=step)))).square().sum(1).mean()
            (wanted,) = torch.autograd.grad(pull, embeddings, retain_graph=True)
        loss.backward()
    scalars = read_scalars(tmp_path)
    names = {"ce", "pull", "gradient_norm/ce", "gradient_norm/pull", "alpha_mean", "student_teacher_cosine"}
    assert names <= {name.removeprefix("kd/") for name in scalars}
    assert scalars["kd/ce"].x.tolist() == [2, 4]
    assert scalars["kd/pull"].y[-1] == pytest.approx(pull.item(), rel=1e-5)
    assert scalars["kd/gradient_norm/pull"].y[-1] == pytest.approx(float(wanted.norm()), rel=1e-4)
    both = scalars["kd/gradient_norm/ce"].y + scalars["kd/gradient_norm/pull"].y
    share = scalars["kd/gradient_share/pull"].y
    assert share.tolist() == pytest.approx((scalars["kd/gradient_norm/pull"].y / both).tolist(), rel=1e-5)
    assert (share + scalars["kd/gradient_share/ce"].y).tolist() == pytest.approx([1, 1], rel=1e-5)


# ---- the host's margin


class CombinedMarginLoss:
    """As arcface_torch has it."""

    def __init__(self, s: float, m1: float, m2: float, m3: float, interclass_filtering_threshold: float = 0) -> None:
        self.s, self.m1, self.m2, self.m3 = s, m1, m2, m3
        self.interclass_filtering_threshold = interclass_filtering_threshold


def test_the_margin_is_read_from_the_host_s_own_object() -> None:
    assert margin_of(CombinedMarginLoss(64, 1.0, 0.5, 0.0)) == Margin(64.0, 1.0, 0.5, 0.0, 0.0)
    assert margin_of(CombinedMarginLoss(30, 1.0, 0.0, 0.4, 0.3)) == Margin(30.0, 1.0, 0.0, 0.4, 0.3)
    assert margin_of(ARCFACE) is ARCFACE


def test_an_object_that_is_no_margin_is_named() -> None:
    with pytest.raises(ConfigError, match="object has no s, m1, m2, m3; a CombinedMarginLoss is wanted"):
        margin_of(object())
    with pytest.raises(ConfigError, match=r"m1 is 0\.5"):
        margin_of(CombinedMarginLoss(64, 0.5, 0.0, 0.0))
