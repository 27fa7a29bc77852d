"""EKD against the naive twin: terms, gradients, the thresholds' moving average, batches without pairs."""

import pytest
import torch

from arcface_kd.distributed.ranks import RankGroup
from arcface_kd.losses.margin import Margin
from arcface_kd.methods.base import Batch, RunContext
from arcface_kd.methods.ekd import EKD, EKDConfig
from tests.reference.compare import assert_same_terms
from tests.reference.ekd import Thresholds, ekd_step

LABELS = [0, 1, 1, 2, -1, 2, 3, 1, 4, 5, 6, 7]


def make(**knobs: float) -> EKD:
    context = RunContext(9, 4, Margin(), RankGroup(alone=True), teacher_embedding_size=6)
    return EKD(EKDConfig(**knobs), context).double()  # type: ignore[arg-type]


def batch(seed: int, labels: list[int]) -> Batch:
    """Rows in a narrow cone, so that pairs are near the thresholds, where a rank has a slope."""
    generator = torch.Generator().manual_seed(seed)
    rows = len(labels)
    student = 1 + 0.25 * torch.randn(rows, 4, generator=generator, dtype=torch.float64)
    teacher = 1 + 0.25 * torch.randn(rows, 6, generator=generator, dtype=torch.float64)
    student.requires_grad_()
    return Batch(student, student, torch.tensor(labels), teacher, [rows], 0)


def step(method: EKD, given: Batch, before: Thresholds | None = None, **knobs: float) -> Thresholds | None:
    """Compare a step with the twin's; the thresholds after it."""
    assert given.teacher is not None
    wanted = ekd_step(given.embeddings, given.teacher, given.labels, before, **knobs)  # type: ignore[arg-type]
    terms = {"ekd_positive": wanted.positive, "ekd_negative": wanted.negative}
    assert_same_terms(method(given), terms, given.embeddings)
    return wanted.thresholds


@pytest.mark.parametrize("knobs", [{"hardest": 2000, "momentum": 0.3}, {"hardest": 5, "momentum": 0.3}, {}], ids=str)
def test_steps_equal_the_twin_and_the_thresholds_follow(knobs: dict[str, float]) -> None:
    """Without knobs, with the published ones."""
    method, thresholds = make(**knobs), None
    for seed in range(4):
        given = batch(seed, LABELS)
        thresholds = step(method, given, thresholds, **knobs)
        assert thresholds is not None
        met = torch.stack([method.student_thresholds, method.teacher_thresholds])
        torch.testing.assert_close(met, torch.tensor(thresholds, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(torch.stack([*method(given).values()]).sum(), given.embeddings)
    assert gradient.norm() > 1e-3
    assert method.followed == 5


@pytest.mark.parametrize("labels", [[0], [0, 0, 0], [-1, -1, 2], [0, 1, 2]], ids=str)
def test_batches_without_one_sort_of_pairs_are_finite_and_connected(labels: list[int]) -> None:
    method = make()
    step(method, batch(0, labels))
    assert method.followed == int(labels == [0, 1, 2])


def test_a_batch_without_impostors_leaves_the_thresholds() -> None:
    method = make(momentum=0.5)
    method(batch(0, LABELS))
    before = {name: value.clone() for name, value in method.state_dict().items()}
    method(batch(1, [3, 3, 3]))
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())


def test_the_thresholds_are_a_part_of_the_state() -> None:
    whole, resumed = make(), make()
    whole(batch(0, LABELS))
    resumed.load_state_dict(whole.state_dict())
    losses = [torch.stack(list(method(batch(1, LABELS)).values())) for method in (whole, resumed)]
    assert torch.equal(*losses)


def test_it_observes_its_positive_pairs_and_thresholds() -> None:
    method = make()
    assert method.observations() == {}
    method(batch(0, LABELS))
    seen = method.observations()
    assert seen["ekd_positive_pairs"] == 3 + 1
    assert seen["ekd_student_threshold"] == method.student_thresholds[2] != 0
    assert seen["ekd_teacher_threshold"] == method.teacher_thresholds[2]
