"""EKD against the naive twin: terms, gradients, the thresholds' moving average, batches without pairs."""

import pytest
import torch
from torch import Tensor

from arcface_kd.distributed.ranks import RankGroup
from arcface_kd.losses.margin import Margin
from arcface_kd.methods.base import Batch, RunContext
from arcface_kd.methods.ekd import EKD, EKDConfig
from tests.reference.ekd import Thresholds, ekd_step

CONTEXT = RunContext(9, 4, Margin(), RankGroup(alone=True), teacher_embedding_size=6)


def batch(seed: int, labels: list[int]) -> Batch:
    """Rows in a narrow cone, so that pairs are near the thresholds, where a rank has a slope."""
    generator = torch.Generator().manual_seed(seed)
    rows = len(labels)
    student = 1 + 0.25 * torch.randn(rows, 4, generator=generator, dtype=torch.float64)
    teacher = 1 + 0.25 * torch.randn(rows, 6, generator=generator, dtype=torch.float64)
    student.requires_grad_()
    return Batch(student, student, torch.tensor(labels), teacher, [rows], 0)


LABELS = [0, 1, 1, 2, -1, 2, 3, 1, 4, 5, 6, 7]


def assert_is_the_twin(met: dict[str, Tensor], given: Batch, wanted: tuple[Tensor, Tensor]) -> None:
    for name, twin in zip(("ekd_positive", "ekd_negative"), wanted, strict=True):
        torch.testing.assert_close(met[name], twin, rtol=1e-9, atol=1e-12)
        gradients = [torch.autograd.grad(loss, given.embeddings, retain_graph=True)[0] for loss in (met[name], twin)]
        torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("hardest", [2000, 5])
def test_steps_equal_the_twin_and_the_thresholds_follow(hardest: int) -> None:
    method = EKD(EKDConfig(hardest=hardest, momentum=0.3), CONTEXT).double()
    thresholds: Thresholds | None = None
    steepest = 0.0
    for seed in range(4):
        given = batch(seed, LABELS)
        assert given.teacher is not None
        wanted = ekd_step(given.embeddings, given.teacher, given.labels, thresholds, hardest=hardest, momentum=0.3)
        assert_is_the_twin(method(given), given, (wanted.positive, wanted.negative))
        thresholds = wanted.thresholds
        assert thresholds is not None
        met = torch.stack([method.student_thresholds, method.teacher_thresholds])
        torch.testing.assert_close(met, torch.tensor(thresholds, dtype=torch.float64))
        for loss in (wanted.positive, wanted.negative):
            steepest = max(steepest, float(torch.autograd.grad(loss, given.embeddings, retain_graph=True)[0].norm()))
    assert steepest > 1e-3
    assert method.followed == 4


def test_the_published_weights_and_momentum_are_the_defaults() -> None:
    method = EKD(EKDConfig(), CONTEXT).double()
    first, second = batch(0, LABELS), batch(1, LABELS)
    assert first.teacher is not None
    assert second.teacher is not None
    method(first)
    before = ekd_step(first.embeddings, first.teacher, first.labels).thresholds
    wanted = ekd_step(second.embeddings, second.teacher, second.labels, before)
    assert_is_the_twin(method(second), second, (wanted.positive, wanted.negative))


@pytest.mark.parametrize("labels", [[0], [0, 0, 0], [-1, -1, 2], [0, 1, 2]], ids=str)
def test_batches_without_one_sort_of_pairs_are_finite_and_connected(labels: list[int]) -> None:
    method, given = EKD(EKDConfig(), CONTEXT).double(), batch(0, labels)
    assert given.teacher is not None
    wanted = ekd_step(given.embeddings, given.teacher, given.labels)
    assert_is_the_twin(method(given), given, (wanted.positive, wanted.negative))
    assert method.followed == int(labels == [0, 1, 2])


def test_a_batch_without_impostors_leaves_the_thresholds() -> None:
    method = EKD(EKDConfig(momentum=0.5), CONTEXT).double()
    method(batch(0, LABELS))
    before = {name: value.clone() for name, value in method.state_dict().items()}
    method(batch(1, [3, 3, 3]))
    assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())


def test_the_thresholds_are_a_part_of_the_state() -> None:
    whole, resumed = EKD(EKDConfig(), CONTEXT).double(), EKD(EKDConfig(), CONTEXT).double()
    whole(batch(0, LABELS))
    resumed.load_state_dict(whole.state_dict())
    losses = [torch.stack(list(method(batch(1, LABELS)).values())) for method in (whole, resumed)]
    assert torch.equal(*losses)


def test_it_observes_its_positive_pairs_and_thresholds() -> None:
    method = EKD(EKDConfig(), CONTEXT).double()
    assert method.observations() == {}
    method(batch(0, LABELS))
    seen = method.observations()
    assert seen["ekd_positive_pairs"] == 3 + 1
    assert seen["ekd_student_threshold"] == method.student_thresholds[2] != 0
    assert seen["ekd_teacher_threshold"] == method.teacher_thresholds[2]
