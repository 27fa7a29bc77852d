"""Margin softmax over classes and batches that are split over ranks: the same numbers as one process."""

import itertools
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from arcface_kd.distributed.ranks import RankGroup
from arcface_kd.losses.margin import Margin
from arcface_kd.losses.margin_softmax import margin_softmax
from tests.distributed.pool import RankPool
from tests.reference.margin_softmax import dense_margin_softmax
from tests.reference.problems import MARGINS, random_problem


class Case(NamedTuple):
    """One comparison: whose margin, how many classes, and the rows of each rank."""

    margin: str
    classes: int
    sizes: list[int]
    sampled: bool = False
    product_dtype: torch.dtype | None = None


# Classes that do and do not divide by the ranks, down to one class a rank; batches that are even, uneven, of one row
# and empty.
SIZES = {
    1: [[12], [1]],
    2: [[6, 6], [11, 1], [1, 1], [0, 7]],
    3: [[4, 4, 4], [7, 1, 2], [1, 1, 1], [5, 0, 4]],
    4: [[3, 3, 3, 3], [1, 5, 2, 7], [1, 1, 1, 1], [0, 0, 9, 0]],
}


def _cases(world_size: int) -> list[Case]:
    """Every margin once, and every way to split classes and batch with the margins in turn."""
    uneven = SIZES[world_size][1]
    cases = [Case(margin, 23, uneven, sampled) for margin in MARGINS for sampled in (False, True)]
    margins = itertools.cycle(MARGINS)
    for sizes, classes, sampled in itertools.product(SIZES[world_size], (world_size, 23, 24), (False, True)):
        cases.append(Case(next(margins), classes, sizes, sampled))
    return cases


def _index(case: Case) -> Tensor | None:
    return torch.arange(0, case.classes, 2) if case.sampled else None


def _run(ranks: RankGroup, cases: list[Case], dtype: torch.dtype) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(loss, gradient in this rank's embeddings, gradient in this rank's centers) of each case."""
    results = []
    for seed, case in enumerate(cases):
        problem = random_problem(seed, sum(case.sizes), case.classes, dtype=dtype)
        shard = ranks.shard(case.classes)
        embeddings = ranks.own_rows(problem.embeddings, case.sizes).clone().requires_grad_()
        centers = problem.centers[shard.start : shard.start + shard.size].clone().requires_grad_()
        index = _index(case)
        if index is not None:
            index = index[(index >= shard.start) & (index < shard.start + shard.size)] - shard.start
        sizes = ranks.sizes(len(embeddings))
        loss = margin_softmax(
            ranks.gather_with_gradient(embeddings, sizes),
            ranks.gather(ranks.own_rows(problem.labels, sizes), sizes),
            centers,
            MARGINS[case.margin],
            class_start=shard.start,
            index=index,
            ranks=ranks,
            chunk=5,
            product_dtype=case.product_dtype,
        )
        in_embeddings, in_centers = torch.autograd.grad(loss, [embeddings, centers])
        results.append((loss.detach(), in_embeddings, in_centers))
    return results


def _joined(answers: list[list[tuple[Tensor, Tensor, Tensor]]], case: int) -> tuple[Tensor, Tensor, Tensor]:
    losses = [answer[case][0] for answer in answers]
    assert all(torch.equal(loss, losses[0]) for loss in losses), "ranks disagree about the loss"
    return losses[0], torch.cat([answer[case][1] for answer in answers]), torch.cat([a[case][2] for a in answers])


def _twin(seed: int, case: Case) -> tuple[Tensor, Tensor, Tensor]:
    problem = random_problem(seed, sum(case.sizes), case.classes)
    embeddings, centers = problem.embeddings.requires_grad_(), problem.centers.requires_grad_()
    loss = dense_margin_softmax(embeddings, problem.labels, centers, MARGINS[case.margin], _index(case))
    in_embeddings, in_centers = torch.autograd.grad(loss, [embeddings, centers])
    return loss.detach(), in_embeddings, in_centers


@pytest.mark.parametrize("world_size", SIZES)
def test_loss_and_gradients_equal_the_dense_twin_of_one_process(ranks: RankPool, world_size: int) -> None:
    cases = _cases(world_size)
    answers = ranks.run(world_size, _run, cases, torch.float64)
    for seed, case in enumerate(cases):
        for name, a, b in zip(
            ("loss", "embeddings", "centers"), _joined(answers, seed), _twin(seed, case), strict=True
        ):
            assert torch.allclose(a, b, rtol=1e-10, atol=1e-10), f"{case}, {name}: off by {(a - b).abs().max():.1e}"


@pytest.mark.parametrize("product_dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_shards_cost_no_precision(ranks: RankPool, product_dtype: torch.dtype | None) -> None:
    """In fp32 and bf16 three ranks are as close to the fp64 truth as one."""
    cases = [
        Case(margin, 24, sizes, product_dtype=product_dtype)
        for margin in ("arcface", "cosface", "combined")
        for sizes in ([4, 4, 4], [7, 1, 4], [0, 11, 1], [12, 0, 0])
    ]
    answers = ranks.run(3, _run, cases, torch.float32)
    together = [case._replace(sizes=[12]) for case in cases]
    alone = ranks.run(1, _run, together, torch.float32)
    errors = torch.zeros(2, 3)
    for seed, case in enumerate(cases):
        truth = _twin(seed, case)
        for way, met in enumerate((_joined(answers, seed), _joined(alone, seed))):
            errors[way] += torch.stack([(a.double() - b).norm() / b.norm() for a, b in zip(met, truth, strict=True)])
    errors /= len(cases)
    unit = torch.finfo(torch.float32).eps
    assert (errors[0] <= 1.2 * errors[1] + 2 * unit).all(), f"three ranks {errors[0]}, one {errors[1]}"


def _far_above(ranks: RankGroup) -> tuple[Tensor, Tensor]:
    """All of rank 0's logits are 1000 and more above those of the other shard."""
    centers = torch.eye(4, dtype=torch.float64)[:2] if ranks.rank == 0 else -torch.eye(4, dtype=torch.float64)[:2]
    embeddings = torch.tensor([[1.0, 0.9, 0.0, 0.0], [0.9, 1.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 3])
    margin = Margin(scale=1000.0, m2=0.0, m3=0.1)
    loss = margin_softmax(embeddings, labels, centers, margin, class_start=2 * ranks.rank, ranks=ranks)
    loss.backward()
    assert embeddings.grad is not None
    return loss.detach(), ranks.sum_(embeddings.grad)


def test_a_shard_whose_exponentials_all_underflow(ranks: RankPool) -> None:
    centers = torch.cat([torch.eye(4, dtype=torch.float64)[:2], -torch.eye(4, dtype=torch.float64)[:2]])
    embeddings = torch.tensor([[1.0, 0.9, 0.0, 0.0], [0.9, 1.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    margin = Margin(scale=1000.0, m2=0.0, m3=0.1)
    wanted = dense_margin_softmax(embeddings, torch.tensor([0, 3]), centers, margin)
    wanted.backward()
    for loss, gradient in ranks.run(2, _far_above):
        torch.testing.assert_close(loss, wanted.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(gradient, embeddings.grad, rtol=1e-10, atol=1e-10)
