"""NaN and inf: caught at their step and named, and looked at late where they come from a GPU."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import normalize

from arcface_kd.config.kd import KDConfig
from arcface_kd.data.dataset import RecordDataset
from arcface_kd.data.loader import BatchViews, FaceLoader
from arcface_kd.distillation.distiller import Distiller
from arcface_kd.distillation.head import DistillationHead
from arcface_kd.distillation.nan_monitor import BatchRows, NaNMonitor
from arcface_kd.distributed.ranks import RankGroup
from arcface_kd.errors import NumberError
from arcface_kd.teachers.base import load_teacher
from arcface_kd.teachers.options import TeacherOptions
from arcface_kd.training.run import check_loss_scale
from tests.data.record_sets import insightface_records, write_records
from tests.reference.problems import ARCFACE

NAN, INF = float("nan"), float("inf")


class Student(nn.Module):
    """One matrix over coarse pixels, and a list of what to do to the embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 12, generator=torch.Generator().manual_seed(1)) / 3)
        self.spoil: Callable[[Tensor], Tensor] = lambda embeddings: embeddings

    def forward(self, images: Tensor) -> Tensor:
        return self.spoil(nn.functional.adaptive_avg_pool2d(images, 2).flatten(1) @ self.weight.T)


class Tutor(Student):
    pass


class _InfiniteGradient(torch.autograd.Function):
    """The values as they are; a gradient of inf in the rows that are named."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, rows: list[int]) -> Tensor:
        ctx.rows = rows
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0].clone()
        gradient[ctx.rows] = INF
        return gradient, None


def with_rows(rows: list[int], value: float) -> Callable[[Tensor], Tensor]:
    def spoil(embeddings: Tensor) -> Tensor:
        mask = torch.zeros(len(embeddings), 1).index_fill(0, torch.tensor(rows), 1)
        return torch.where(mask > 0, torch.tensor(value), embeddings)

    return spoil


class Run:
    """A loader, a student, a teacher and a head, and one step of training them."""

    def __init__(self, folder: Path, kd: str = "embedding+adadistill", **head: Any) -> None:
        self.faces = RecordDataset(folder)
        self.tutor = Tutor()
        self.distiller = Distiller(KDConfig(tuple(kd.split("+"))), load_teacher(self.tutor, TeacherOptions(size=8)))
        self.loader = FaceLoader(self.faces, batch_size=4, num_workers=0)
        self.distiller.use_cache(self.loader)
        self.student = Student()
        self.distiller.watch(self.student)
        self.head = DistillationHead(self.distiller, ARCFACE, 6, 3, ranks=RankGroup(alone=True), **head)
        self.optimizer = torch.optim.SGD([*self.student.parameters(), *self.head.parameters()], lr=0.01)

    def epoch(self) -> None:
        for images, labels in self.loader:
            self.head(self.student(images), labels).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_records(tmp_path, insightface_records([4, 4, 4]))


def record(run: Run, index: int) -> str:
    return run.faces.where(index)


def fault_of(run: Run) -> str:
    with pytest.raises(NumberError) as caught:
        run.epoch()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# What is caught -----------------------------------------------------------------------------------------------------


def test_a_sound_run_is_left_alone(folder: Path) -> None:
    run = Run(folder)
    before = run.student.weight.detach().clone()
    run.epoch()
    assert not torch.equal(before, run.student.weight)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_the_student_s_embedding(folder: Path, value: float) -> None:
    run = Run(folder)
    run.epoch()
    run.student.spoil = with_rows([1, 2], value)
    assert fault_of(run) == (
        f"step 4: the student's embedding of 2 of 4 images ({record(run, 1)}; {record(run, 2)}) is NaN or inf: look at "
        "these images, lower lr, or switch fp16 off"
    )


def test_a_ruined_student(folder: Path) -> None:
    run = Run(folder)
    with torch.no_grad():
        run.student.weight.fill_(NAN)
    assert fault_of(run).startswith(
        "step 1: the student's embedding of every image is NaN or inf: its weights are ruin"
    )


@pytest.mark.parametrize("value", [NAN, INF, 0.0])
def test_the_teacher_s_embedding_comes_first(folder: Path, value: float) -> None:
    run = Run(folder)
    run.epoch()
    run.tutor.spoil = with_rows([3], value)
    run.student.spoil = with_rows([0], NAN)
    assert fault_of(run) == (
        f"step 4: the teacher's embedding of 1 of 4 images ({record(run, 3)}) is zero, NaN or inf: look at these "
        "images, or run the teacher in fp32"
    )


def test_a_loss_term_by_its_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(folder)
    method = run.head.methods["embedding"]
    whole = method.forward
    monkeypatch.setattr(method, "forward", lambda batch: {n: t * NAN for n, t in whole(batch).items()})
    assert fault_of(run).startswith("step 1: the loss term embedding is NaN or inf, from embeddings that are finite")


def test_the_gradient_in_the_embedding(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(folder)
    gather = run.head._gather
    monkeypatch.setattr(run.head, "_gather", lambda rows, sizes: _InfiniteGradient.apply(gather(rows, sizes), [2]))
    assert fault_of(run) == (
        f"step 1: the loss's gradient in the student's embedding of 1 of 4 images ({record(run, 2)}) is NaN or inf: "
        "look at these images, or lower the terms' weights"
    )


def test_the_gradient_of_a_weight_before_the_weight_takes_it(folder: Path) -> None:
    run = Run(folder)
    run.student.weight.register_hook(lambda gradient: gradient * NAN)
    before = run.student.weight.detach().clone()
    assert fault_of(run).startswith("step 1: the gradient of the student's weight is NaN or inf")
    assert torch.equal(before, run.student.weight)


def test_a_scaler_that_passes_over_the_step_is_followed(folder: Path) -> None:
    run = Run(folder, loss_is_scaled=True)
    run.student.weight.register_hook(lambda gradient: gradient * INF)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    before = run.student.weight.detach().clone()
    for images, labels in run.loader:
        scaler.scale(run.head(run.student(images), labels)).backward()
        scaler.step(run.optimizer)
        scaler.update()
        run.optimizer.zero_grad()
    assert torch.equal(before, run.student.weight)
    assert scaler.get_scale() == 64.0 / 2**3
    # What the forward pass meets is no matter of the loss scale.
    run.student.spoil = with_rows([0], INF)
    assert "the student's embedding of 1 of 4" in fault_of(run)


def test_a_loss_scale_that_falls_for_ever_ends_the_run() -> None:
    check_loss_scale(torch.amp.GradScaler("cpu", init_scale=2.0**-12, enabled=False), 3)
    check_loss_scale(torch.amp.GradScaler("cpu", init_scale=2.0**-9), 3)
    with pytest.raises(NumberError, match=r"step 3: .* in fp16 at every loss scale down to 0\.0002"):
        check_loss_scale(torch.amp.GradScaler("cpu", init_scale=2.0**-12), 3)


def test_another_optimiser_is_not_looked_at(folder: Path) -> None:
    run = Run(folder)
    other = nn.Parameter(torch.ones(3))
    other.grad = torch.full((3,), NAN)
    torch.optim.SGD([other], lr=1.0).step()
    assert other.isnan().all()
    run.epoch()


def test_a_head_that_is_gone_looks_at_nothing(folder: Path) -> None:
    run = Run(folder)
    student = run.student
    del run
    student.weight.grad = torch.full_like(student.weight, NAN)
    torch.optim.SGD(student.parameters(), lr=1.0).step()
    assert student.weight.isnan().all()


def test_without_a_loader_rows_are_numbered(folder: Path) -> None:
    run = Run(folder)
    images = torch.rand(4, 3, 8, 8)
    run.student.spoil = with_rows([0, 1, 2], NAN)
    with pytest.raises(NumberError, match=r"3 of 4 images \(rows 0, 1, 2 of the batch\)"):
        run.head(run.student(images), torch.tensor([0, 1, 2, 0]))
    # The views of a batch that another forward pass has used up are not those of the next.
    run.distiller._next_views(BatchViews(torch.arange(3), torch.zeros(3, dtype=torch.bool)))
    assert run.distiller.take_views(4) is None
    assert run.distiller.take_views(3) is None


@pytest.mark.parametrize("kd", ["adadistill", "embedding"])
def test_a_label_that_is_no_class_where_another_loader_brings_it(folder: Path, kd: str) -> None:
    run = Run(folder, kd)
    with pytest.raises(NumberError) as caught:
        run.head(run.student(torch.rand(4, 3, 8, 8)), torch.tensor([0, 3, -1, 2]))
    assert str(caught.value) == (
        "step 1: the label of 1 of 4 images (rows 1 of the batch) is not below num_classes=3: set num_classes to what "
        "the data have"
    )


def test_labels_that_nobody_scores_may_be_anything(folder: Path) -> None:
    kd = KDConfig(("embedding",), options={"embedding": {"labels": "none"}})
    distiller = Distiller(kd, load_teacher(Tutor(), TeacherOptions(size=8)))
    student = distiller.watch(Student())
    head = DistillationHead(distiller, ARCFACE, 6, 3, ranks=RankGroup(alone=True))
    assert head(student(torch.rand(2, 3, 8, 8)), torch.tensor([7, 9])).isfinite()


def test_other_ranks_are_named_by_their_number() -> None:
    rows = BatchRows(7, [2, 3, 1], 1)
    flags = torch.tensor([True, False, False, True, True, True])
    assert rows.place == "step 7 on rank 1"
    assert (
        rows.name(flags) == "2 of 3 images (rows 1, 2 of the batch); 1 of 2 images of rank 0; 1 of 1 images of rank 2"
    )
    assert BatchRows(7, [9], 0).name(torch.ones(9) > 0) == "9 of 9 images (rows 0, 1, 2 and 6 more of the batch)"


# How it is looked at from a GPU -------------------------------------------------------------------------------------


class Arrival:
    """An event that tells whether somebody waited for it."""

    def __init__(self) -> None:
        self.waited = False

    def synchronize(self) -> None:
        self.waited = True


class Slow(NaNMonitor):
    """Takes every tensor for one on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.arrivals: list[Arrival] = []

    @staticmethod
    def _is_slow(values: Tensor) -> bool:
        return True

    def _send(self, values: Tensor) -> tuple[Any, Tensor]:  # type: ignore[override]
        self.arrivals.append(Arrival())
        return self.arrivals[-1], values.clone()


def look(watch: NaNMonitor, step: int, *flags: bool) -> None:
    for number, flag in enumerate(flags):
        watch.look(torch.tensor([flag]), lambda met: met, lambda bad, n=number: f"step {step}, {n}")  # type: ignore[misc]
    watch.end_step(step)


def test_a_step_is_sent_in_one_piece_and_looked_at_two_steps_later() -> None:
    watch = Slow()
    look(watch, 1, False, True)
    look(watch, 2, True)
    assert not any(arrival.waited for arrival in watch.arrivals)
    assert len(watch.arrivals) == 2
    with pytest.raises(NumberError, match="step 1, 1"):
        look(watch, 3, False)
    # What came after it follows from it.
    watch.settle()


def test_every_rank_stops_at_one_place_whenever_its_numbers_arrive() -> None:
    """Two ranks with the same numbers, of which one has its copies at once: neither looks before the other."""
    watches = [Slow(), Slow()]
    stopped = []
    for watch in watches:
        for step in range(1, 6):
            try:
                look(watch, step, step >= 2)
            except NumberError as error:
                stopped.append((step, str(error)))
                break
    assert stopped == [(4, "step 2, 0")] * 2


def test_numbers_that_come_after_the_step_s_end_go_with_the_next() -> None:
    watch = Slow()
    look(watch, 1, False)
    watch.weight_gradients(["w"], [torch.tensor([NAN])], 1)
    look(watch, 2, False)
    look(watch, 3, False)
    with pytest.raises(NumberError, match="step 1: the gradient of the student's w"):
        look(watch, 4, False)


def test_they_are_looked_at_in_their_order() -> None:
    watch = Slow()
    look(watch, 1, False)
    look(watch, 2, False, True, True)
    with pytest.raises(NumberError, match="step 2, 1"):
        watch.settle()


@pytest.mark.parametrize("saved", ["head", "student"])
def test_nothing_is_saved_before_all_has_been_looked_at(folder: Path, saved: str) -> None:
    run = Run(folder)
    run.head.monitor.nan = Slow()
    run.student.spoil = with_rows([1], NAN)
    images, labels = next(iter(run.loader))
    run.head(run.student(images), labels).backward()
    with pytest.raises(NumberError, match=r"step 1: the student's embedding of 1 of 4"):
        getattr(run, saved).state_dict()
    getattr(run, saved).state_dict()


def test_copies_of_a_student_can_be_saved(folder: Path) -> None:
    run = Run(folder)
    # A function that can be pickled.
    run.student.spoil = nn.functional.relu
    for student in (copy.deepcopy(run.student), pickle.loads(pickle.dumps(run.student))):
        assert student.state_dict().keys() == run.student.state_dict().keys()


def test_looking_asks_for_no_value() -> None:
    """Tensors without storage refuse every value."""
    watch = Slow()
    with FakeTensorMode():
        rows = BatchRows(1, [3], 0)
        student = torch.randn(3, 4, requires_grad=True)
        watch.inputs(torch.tensor([0, 1, 2]), 3, student, normalize(torch.randn(3, 4)), rows)
        watch.terms(["a", "b"], [student.sum(), student.mean()], rows)
        watch.embedding_gradient(torch.randn(3, 4), rows)
        watch.weight_gradients(["w"], [torch.randn(5)], 1)
        watch.end_step(2)
    assert len(watch.arrivals) == 2


@pytest.mark.gpu
def test_a_gpu_is_never_waited_for() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here: torch.cuda.is_available() is False")
    watch, rows = NaNMonitor(), BatchRows(1, [3], 0)
    student = torch.randn(3, 4, device="cuda")
    teacher = normalize(torch.randn(3, 4, device="cuda"))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        watch.inputs(torch.zeros(3, device="cuda", dtype=torch.int64), 3, student, teacher, rows)
        watch.terms(["a"], [student.sum()], rows)
        watch.embedding_gradient(student, rows)
        watch.weight_gradients(["w"], [student], 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    watch.settle()
    watch.terms(["a"], [student.sum() * NAN], rows)
    with pytest.raises(NumberError, match="the loss term a"):
        watch.settle()
