"""Soft ranks and thresholds of pairs."""

import ctypes
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from arcface_kd.distributed.ranks import RankGroup
from arcface_kd.losses.pair_ranks import (
    _DIGITS,
    Pairs,
    _cosines_of,
    _falling,
    impostor_thresholds,
    rank_losses,
    soft_rank,
)
from arcface_kd.methods.base import Batch, RunContext
from arcface_kd.methods.ekd import EKD, EKDConfig
from benchmarks.peak_memory import can_measure, peak_mb
from tests.reference.problems import ARCFACE

RATES = (10, 100, 1000)
_M_MMAP_THRESHOLD = -3


def test_a_pair_passes_the_thresholds_below_it() -> None:
    thresholds = torch.tensor([0.1, 0.3, 0.5])
    ranks = soft_rank(torch.tensor([-1.0, 0.2, 0.4, 1.0]), thresholds, 1e-3)
    torch.testing.assert_close(ranks, torch.tensor([0.0, 1.0, 2.0, 3.0]))
    # At a threshold it is half past it.
    torch.testing.assert_close(soft_rank(torch.tensor(0.3), thresholds, 1e-3), torch.tensor(1.5))


def test_soft_ranks_are_finite_at_any_distance() -> None:
    cosine = torch.tensor([-1e4, 1e4, -torch.inf], requires_grad=True)
    ranks = soft_rank(cosine, torch.zeros(2), 1e-4)
    ranks.sum().backward()
    assert ranks.tolist() == [0.0, 2.0, 0.0]
    assert cosine.grad is not None
    assert (cosine.grad == 0).all()


def problem(batch: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Student, teacher and labels, of which some repeat and one is none."""
    generator = torch.Generator().manual_seed(batch)
    student, teacher = (torch.randn(batch, size, generator=generator, dtype=torch.float64) for size in (6, 9))
    labels = torch.randint(0, max(batch // 3, 1), (batch,), generator=generator)
    labels[-1] = -1
    return student.to(dtype), teacher.to(dtype), labels


def all_pairs(rows: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cosines, and whether they are of one identity and of two, of each pair of rows once."""
    first, second = torch.triu_indices(len(labels), len(labels), 1)
    unit = normalize(rows)
    known = (labels[first] >= 0) & (labels[second] >= 0)
    same = labels[first] == labels[second]
    return (unit @ unit.T)[first, second], known & same, known & ~same


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [1, 7, None])
def test_thresholds_are_exceeded_by_their_share_of_impostors(rows: int | None, dtype: torch.dtype) -> None:
    student, teacher, labels = problem(40, dtype)
    pairs = Pairs(student, teacher, labels, rows)
    for embeddings, thresholds in zip((student, teacher), impostor_thresholds(pairs, RATES), strict=True):
        cosine, positive, negative = all_pairs(embeddings, labels)
        assert pairs.positives == positive.sum()
        assert pairs.negatives == negative.sum()
        ranked = cosine[negative].sort(descending=True).values
        for rate, threshold in zip(RATES, thresholds, strict=True):
            torch.testing.assert_close(threshold, ranked[len(ranked) // rate], rtol=1e-6, atol=1e-7)
    # Blocks of any size find the same cosines, but for the rounding of their products.
    whole = impostor_thresholds(Pairs(student, teacher, labels), RATES)
    torch.testing.assert_close(impostor_thresholds(pairs, RATES), whole, rtol=1e-6, atol=1e-7)


def test_the_order_of_cosines_is_that_of_their_keys() -> None:
    for dtype in (torch.float32, torch.float64):
        tiny = torch.finfo(dtype).tiny
        cosine = torch.tensor([1.0, 0.5, tiny, tiny / 4, 0.0, -tiny, -0.3, -1.0, -torch.inf], dtype=dtype)
        key = _falling(cosine).long()
        unsigned = [value % (1 << sum(_DIGITS[dtype])) for value in key.tolist()]
        assert unsigned == sorted(unsigned)
        assert len(set(unsigned)) == len(unsigned)
        assert torch.equal(_cosines_of(key.unsqueeze(0), dtype, torch.tensor(1))[0], cosine.flip(0))


def test_rates_beyond_the_number_of_pairs_have_the_largest_cosine_and_no_pairs_none() -> None:
    student, teacher, _ = problem(3)
    pairs = Pairs(student, teacher, torch.tensor([0, 0, 1]))
    for embeddings, thresholds in zip((student, teacher), impostor_thresholds(pairs, RATES), strict=True):
        unit = normalize(embeddings)
        torch.testing.assert_close(thresholds, (unit[:2] @ unit[2]).max().expand(3))
    for labels in ([0, 0, 0], [-1, 0, -1]):
        for thresholds in impostor_thresholds(Pairs(student, teacher, torch.tensor(labels)), RATES):
            assert thresholds.tolist() == [-torch.inf] * 3


@pytest.mark.parametrize("hardest", [1, 5, 2000])
@pytest.mark.parametrize("rows", [1, 7, None])
def test_losses_and_gradients_are_those_of_all_pairs(rows: int | None, hardest: int) -> None:
    student, teacher, labels = problem(30)
    thresholds = torch.tensor([0.1, 0.4]).double(), torch.tensor([0.0, 0.3]).double()
    student.requires_grad_()
    met = rank_losses(student, Pairs(student, teacher, labels, rows), thresholds, 0.1, hardest)
    cosine, positive, negative = all_pairs(student, labels)
    of_teacher, _, _ = all_pairs(teacher, labels)
    difference = (soft_rank(cosine, thresholds[0], 0.1) - soft_rank(of_teacher, thresholds[1], 0.1)).square()
    hard = cosine.detach().masked_fill(~negative, -torch.inf).topk(min(hardest, int(negative.sum()))).indices
    for one, wanted in zip(met, (difference[positive].mean(), difference[hard].mean()), strict=True):
        torch.testing.assert_close(one, wanted, rtol=1e-10, atol=1e-12)
        gradients = [torch.autograd.grad(each, student, retain_graph=True)[0] for each in (one, wanted)]
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-11)


def step_over_many(batch: int) -> Callable[[], object]:
    """A step of EKD over a large batch, for a process of its own."""
    # As it is, glibc keeps freed blocks of up to 32 MB, in as many holes as chance wants: 240 to 330 MB were met.
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(_M_MMAP_THRESHOLD, 1 << 20)
    method = EKD(EKDConfig(), RunContext(100, 512, ARCFACE, RankGroup(alone=True)))
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(batch, 512, generator=generator).requires_grad_()
    teacher = torch.randn(batch, 512, generator=generator)
    labels = torch.randint(0, 100, (batch,), generator=generator)

    def step() -> None:
        terms = method(Batch(student, student, labels, teacher, [batch], 0))
        torch.stack(list(terms.values())).sum().backward()

    return step


@pytest.mark.slow
@pytest.mark.skipif(not can_measure(torch.device("cpu")), reason="this system does not tell a process its peak")
def test_memory_is_linear_in_the_batch() -> None:
    """2,048 rows have two million pairs, of which each took 300 bytes when they were all there at once."""
    assert peak_mb(step_over_many, torch.device("cpu"), 2048) < 250
