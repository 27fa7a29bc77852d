"""One process's wiring: the student's hook, the head, what they say when they are used in the wrong way."""

import copy
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from arcface_kd.checkpoints.run_settings import from_tensor
from arcface_kd.config.kd import KDConfig
from arcface_kd.distillation.distiller import Distiller
from arcface_kd.distillation.head import DistillationHead
from arcface_kd.distillation.tensorboard_log import TensorBoardLog
from arcface_kd.distributed.ranks import RankGroup
from arcface_kd.errors import CheckpointError, ConfigError
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


@pytest.mark.parametrize("runs", [1, 2])
def test_a_loop_that_runs_the_student_twice_before_the_head_is_told(
    runs: int, caplog: pytest.LogCaptureFixture
) -> None:
    run = make()
    for _ in range(2):
        embeddings = [run.student(images(seed=seed)) for seed in range(runs)]
        run.head(embeddings[0], LABELS)
    assert caplog.text.count("run 2 times") == runs - 1


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


@pytest.mark.parametrize("teachers", [1, 2])
def test_a_run_goes_on_where_the_default_precision_is_another(teachers: int) -> None:
    """As on a CPU after a GPU. A precision that the options name is a setting of the run."""

    def head_of(precision: str, named: bool = False) -> DistillationHead:
        parts, options = [Embedder(5, seed, [], "teacher") for seed in range(teachers)], {"precision": precision}
        tutor = load_teacher(parts if teachers > 1 else parts[0], {"size": 8, **options})
        distiller = Distiller(KDConfig(("rkd",), options={"teacher": options} if named else {}), tutor)
        distiller.watch(Embedder(5, 9, [], "student"))
        return DistillationHead(distiller, ARCFACE, 5, CLASSES, ranks=RankGroup(alone=True))

    head_of("bf16").load_state_dict(head_of("fp32").state_dict())
    with pytest.raises(CheckpointError, match="teacher was"):
        head_of("bf16", named=True).load_state_dict(head_of("fp32", named=True).state_dict())


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


def test_equal_dimensions_get_no_projection() -> None:
    assert make(student={"projection": "linear"}).head.projection is None


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
