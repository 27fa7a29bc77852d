"""Steps over frozen class centers that are recorded and replayed: the numbers of those that are not.

Without a GPU, graphs are make-believe ones.
"""

import contextlib
import copy
import gc
import logging
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from arcface_kd.distillation.distiller import Distiller
from arcface_kd.distillation.frozen_step import can_replay
from arcface_kd.distillation.head import DistillationHead
from arcface_kd.distillation.tensorboard_log import TensorBoardLog
from arcface_kd.distributed import step_graph
from arcface_kd.distributed.ranks import RankGroup
from arcface_kd.distributed.step_graph import StepGraph
from arcface_kd.methods.adadistill import AdaDistill
from tests.distillation.test_launches import BATCH, CLASSES, DIMENSION, head_of
from tests.make_believe_graph import make_believe_graphs

CASES: list[tuple[str, dict[str, object]]] = [
    ("adadistill", {}),
    ("adadistill", {"alpha": "plain", "repeated": "last"}),
    ("proxylesskd", {}),
    ("arcdistill", {}),
    ("cosdistill", {}),
    ("margindistillation", {}),
]
NARROW = [None, torch.bfloat16]


def batch_of(step: int, rows: int, dimension: int = DIMENSION, classes: int = CLASSES) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings, labels with some -1, and the teacher's embeddings."""
    generator = torch.Generator().manual_seed(step)
    embeddings = torch.randn(rows, dimension, generator=generator)
    teacher = normalize(embeddings + torch.randn(rows, dimension, generator=generator))
    labels = torch.randint(-1, classes, (rows,), generator=generator)
    return embeddings, labels, teacher


def let_say(distiller: Distiller, teacher: Tensor) -> None:
    """Hand these embeddings to the heads, in place of a teacher's."""

    def take(rows: int) -> Tensor:
        assert len(teacher) == rows
        return teacher

    distiller.take_teacher_embeddings = take  # type: ignore[method-assign]


def steps(
    head: DistillationHead,
    count: int,
    device: str = "cpu",
    rows: int = BATCH,
    first: int = 0,
    dtype: torch.dtype = torch.float32,
    scale: float = 3,
) -> list[Tensor]:
    """Losses and gradients of some steps; two rows of each batch are of one class."""
    found = []
    for step in range(first, first + count):
        embeddings, labels, teacher = (each.to(device) for each in batch_of(step, rows))
        labels[1] = labels[0]
        embeddings = embeddings.to(dtype).requires_grad_()
        let_say(head._distiller, teacher)
        loss = head(embeddings, labels)
        (scale * loss).backward()
        assert embeddings.grad is not None
        found += [loss.detach(), embeddings.grad]
    return found


@pytest.mark.parametrize("product_dtype", NARROW, ids=str)
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_replayed_steps_have_the_same_bits(
    name: str, options: dict[str, object], product_dtype: torch.dtype | None, tmp_path: Path
) -> None:
    # Two graphs would do one's work twice, or none.
    plain, replayed = (_head(name, options, tmp_path, product_dtype) for _ in range(2))
    wanted = steps(plain, 12)
    with make_believe_graphs() as graph:
        found = steps(replayed, 12)
        # Three steps as they are, the fourth recorded; the sixth and the twelfth are observed.
        assert (graph.recorded, graph.replayed) == (1, 7)
    _require_same(found, wanted, replayed, plain)


def _head(
    name: str, options: dict[str, object], folder: Path, product_dtype: torch.dtype | None = None
) -> DistillationHead:
    torch.manual_seed(0)
    head = head_of(name, options, folder, product_dtype=product_dtype)
    head.monitor._log = TensorBoardLog(folder, 6, writes=False)
    return head


def _require_same(found: list[Tensor], wanted: list[Tensor], head: DistillationHead, other: DistillationHead) -> None:
    for place, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
        assert torch.equal(ours, theirs), f"{'gradient' if place % 2 else 'loss'} of step {place // 2}"
    state = other.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in head.state_dict().items())


def test_another_batch_size_another_state_and_a_copy_are_recorded_anew(tmp_path: Path) -> None:
    plain, replayed = (_head("adadistill", {}, tmp_path) for _ in range(2))

    def run(head: DistillationHead) -> list[Tensor]:
        found = steps(head, 5)
        found += steps(head, 5, rows=BATCH - 3, first=5)
        head.load_state_dict(_head("adadistill", {}, tmp_path).state_dict())
        found += steps(head, 5, rows=BATCH - 3, first=10)
        return found + steps(copy.deepcopy(head), 5, rows=BATCH - 3, first=15)

    wanted = run(plain)
    with make_believe_graphs() as graph:
        found = run(replayed)
        assert graph.recorded == 4
    _require_same(found, wanted, replayed, plain)


def test_a_step_whose_loss_is_not_yet_differentiated_keeps_its_gradient(tmp_path: Path) -> None:
    def two_at_once(head: DistillationHead) -> Tensor:
        steps(head, 5)
        embeddings, labels, teacher = batch_of(7, BATCH)
        embeddings.requires_grad_()
        let_say(head._distiller, teacher)
        # The tenth step is observed no more than the seventh.
        head.monitor._log = TensorBoardLog(tmp_path, 1000, writes=False)
        (head(embeddings, labels) + head(-embeddings, labels)).backward()
        assert embeddings.grad is not None
        return embeddings.grad

    wanted = two_at_once(_head("proxylesskd", {}, tmp_path))
    with make_believe_graphs():
        assert torch.equal(two_at_once(_head("proxylesskd", {}, tmp_path)), wanted)


def test_a_replay_keeps_no_step_of_the_student(tmp_path: Path) -> None:
    with make_believe_graphs() as graph:
        head = _head("adadistill", {}, tmp_path)
        steps(head, 4)
        embeddings, labels, teacher = batch_of(4, BATCH)
        let_say(head._distiller, teacher)
        head(embeddings.requires_grad_(), labels).backward()
        assert graph.replayed == 2
        kept = weakref.ref(embeddings)
        del embeddings
        assert kept() is None


def test_what_cannot_be_recorded_is_told_once_and_run_as_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain, replayed = (_head("adadistill", {}, tmp_path) for _ in range(2))
    wanted = steps(plain, 8)
    with make_believe_graphs() as graph, caplog.at_level(logging.WARNING):
        graph.refused = 1
        found = steps(replayed, 8)
        assert graph.recorded == 1
        assert not graph.underway
    _require_same(found, wanted, replayed, plain)
    assert gc.isenabled()
    # What was refused, not what followed from it.
    assert [record.message for record in caplog.records] == [
        "a head's step cannot be recorded as a CUDA graph: CUDA error: operation not permitted when stream is capturing"
    ]


def test_a_narrow_students_gradient_is_rounded_behind_the_loss_scale(tmp_path: Path) -> None:
    plain, replayed = (_head("adadistill", {}, tmp_path) for _ in range(2))
    wanted = steps(plain, 5, dtype=torch.float16, scale=65536)
    with make_believe_graphs() as graph:
        found = steps(replayed, 5, dtype=torch.float16, scale=65536)
        assert graph.replayed == 2
    assert found[1].dtype == torch.float16
    _require_same(found, wanted, replayed, plain)


def test_class_centers_go_with_their_head(tmp_path: Path) -> None:
    """And their memory: nothing waits for the garbage collector."""
    with make_believe_graphs():
        head = _head("adadistill", {}, tmp_path)
        steps(head, 5)
        centers = weakref.ref(head.methods["adadistill"].centers)
        gc.disable()
        try:
            del head
            assert centers() is None
        finally:
            gc.enable()


def test_what_is_not_the_same_each_step_is_not_recorded(tmp_path: Path) -> None:
    class Own(AdaDistill):
        """One that may look at the step."""

    class Whole(AdaDistill):
        """One whose gradient the head shares out among the ranks, unless the method has."""

        computes_part = False
        same_each_step = AdaDistill.same_each_step

    sampled = head_of("adadistill", {}, tmp_path, sample_rate=0.5).methods["adadistill"]
    whole = head_of("adadistill", {}, tmp_path).methods["adadistill"]
    assert isinstance(sampled, AdaDistill)
    assert isinstance(whole, AdaDistill)
    assert can_replay(whole)
    assert not can_replay(sampled)
    assert not can_replay(Own(whole.config, whole.context))
    assert not can_replay(Whole(whole.config, whole.context))
    assert not can_replay(head_of("kd", {}, tmp_path).methods["kd"])  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "options", "product_dtype"), [(*CASES[0], None), *((*case, torch.float16) for case in CASES)], ids=str
)
def test_a_gpu_replays_what_it_would_compute(
    name: str, options: dict[str, object], product_dtype: torch.dtype | None, tmp_path: Path
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here: torch.cuda.is_available() is False")
    plain, replayed = (_head(name, options, tmp_path, product_dtype).to("cuda") for _ in range(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_graph, "_CALLS_BEFORE", 100)
        wanted = steps(plain, 12, "cuda")
    with _counted() as counted:
        found = steps(replayed, 12, "cuda")
    assert counted == [1]
    for ours, theirs in zip(found, wanted, strict=True):
        # Sums of several rows of one class may add up in another order.
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(replayed.state_dict(), plain.state_dict(), rtol=1e-5, atol=1e-6)


@contextlib.contextmanager
def _counted() -> Iterator[list[int]]:
    """Counts recordings that did not fail."""
    counts, recording = [0], step_graph._Recording

    def count(*arguments: Any) -> Any:
        made = recording(*arguments)
        counts[0] += 1
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_graph, "_Recording", count)
        yield counts


@pytest.mark.gpu
def test_a_gpu_goes_on_behind_a_recording_that_has_failed() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here: torch.cuda.is_available() is False")

    def waits(values: Tensor) -> tuple[Tensor]:
        return (values * float(values.sum()),)

    step = StepGraph(waits, list, RankGroup(alone=True))
    ones = torch.ones(3, device="cuda")
    assert all((step(ones)[0] == 3).all() for _ in range(5))
    assert torch.rand(3, device="cuda").isfinite().all()
