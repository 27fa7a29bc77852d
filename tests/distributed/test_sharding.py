"""The collectives of a rank group, with batches that differ in size."""

from datetime import timedelta

import pytest
import torch
from torch import Tensor, distributed

from arcface_kd.config.kd import KDConfig
from arcface_kd.data.loader import BatchViews
from arcface_kd.distillation.distiller import Distiller
from arcface_kd.distillation.head import DistillationHead
from arcface_kd.distributed.process_group import TIMEOUT
from arcface_kd.distributed.ranks import RankGroup, for_ddp, on_first_rank_first
from arcface_kd.losses.margin_softmax import margin_softmax
from tests.distributed.pool import RankPool
from tests.reference.problems import ARCFACE, random_problem

SIZES = {1: [[3], [1]], 2: [[2, 2], [3, 1], [0, 2]], 3: [[1, 1, 1], [2, 0, 3]], 4: [[1, 2, 1, 2], [0, 0, 1, 0]]}


def _gather(ranks: RankGroup, sizes: list[int]) -> tuple[list[int], Tensor, Tensor, Tensor]:
    rows = torch.arange(sizes[ranks.rank] * 3, dtype=torch.float64).reshape(-1, 3) + 100 * ranks.rank
    met = ranks.sizes(len(rows))
    gathered = ranks.gather(rows, met)
    labels = ranks.gather(torch.full((len(rows),), ranks.rank), met)
    return met, gathered, labels, ranks.own_rows(gathered, met)


@pytest.mark.parametrize("world_size", SIZES)
def test_every_rank_gets_all_rows_in_the_order_of_the_ranks(ranks: RankPool, world_size: int) -> None:
    for sizes in SIZES[world_size]:
        parts = [torch.arange(n * 3, dtype=torch.float64).reshape(-1, 3) + 100 * r for r, n in enumerate(sizes)]
        for rank, (met, gathered, labels, own) in enumerate(ranks.run(world_size, _gather, sizes)):
            assert met == sizes
            assert torch.equal(gathered, torch.cat(parts))
            assert labels.tolist() == [r for r, n in enumerate(sizes) for _ in range(n)]
            assert torch.equal(own, parts[rank])


def _gradient(ranks: RankGroup, sizes: list[int], layout: str, scatters: bool) -> Tensor:
    ranks._scatters = scatters  # as over nccl
    rows = torch.ones(sizes[ranks.rank], 3, dtype=torch.float64, requires_grad=True)
    gathered = ranks.gather_with_gradient(for_ddp(rows, ranks.world_size), sizes)
    weight = torch.arange(gathered.numel(), dtype=torch.float64).view_as(gathered) * (ranks.rank + 1)
    if layout == "transposed":
        gathered, weight = gathered.T.contiguous(), weight.T.contiguous()
    (gathered * weight if layout != "expanded" else gathered * (ranks.rank + 1)).sum().backward()
    assert rows.grad is not None
    return rows.grad


@pytest.mark.parametrize("scatters", [False, True])
@pytest.mark.parametrize("layout", ["plain", "transposed", "expanded"])
@pytest.mark.parametrize("world_size", SIZES)
def test_a_rank_receives_the_sum_of_all_gradients_of_its_rows_times_the_world_size(
    ranks: RankPool, world_size: int, layout: str, scatters: bool
) -> None:
    for sizes in SIZES[world_size]:
        total = sum(sizes)
        weight = torch.ones(total, 3) if layout == "expanded" else torch.arange(total * 3.0).view(-1, 3)
        wanted = (weight * sum(range(1, world_size + 1)) * world_size).double().split(sizes)
        met = ranks.run(world_size, _gradient, sizes, layout, scatters)
        for a, b in zip(met, wanted, strict=True):
            assert torch.equal(a, b)


def _relation(rows: Tensor, part: slice) -> Tensor:
    """A sum over pairs whose rows have the batch's mean in common."""
    centered = rows - rows.mean(0)
    return (centered[part] @ centered.T).square().sum()


def _of_all_and_in_parts(ranks: RankGroup, sizes: list[int]) -> list[tuple[Tensor, Tensor]]:
    """(loss, gradient in this rank's rows) both ways."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(sum(sizes), 3, generator=generator, dtype=torch.float64)
    answers = []
    for in_parts in (False, True):
        rows = ranks.own_rows(whole, sizes).clone().requires_grad_()
        gathered = ranks.gather_with_gradient(rows, sizes)
        if in_parts:
            loss = ranks.computed_in_parts(_relation(gathered, ranks.own_slice(sizes)))
        else:
            loss = ranks.computed_by_all(_relation(gathered, slice(None)))
        (2 * loss).backward()
        assert rows.grad is not None
        answers.append((loss.detach(), rows.grad))
    return answers


@pytest.mark.parametrize("world_size", SIZES)
def test_a_loss_over_rows_has_one_process_s_value_and_gradient_both_ways(ranks: RankPool, world_size: int) -> None:
    for sizes in SIZES[world_size]:
        answers = ranks.run(world_size, _of_all_and_in_parts, sizes)
        rows = torch.randn(sum(sizes), 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        wanted = _relation(rows.requires_grad_(), slice(None))
        (2 * wanted).backward()
        assert rows.grad is not None
        for way in (0, 1):
            for answer in answers:
                torch.testing.assert_close(answer[way][0], wanted.detach(), rtol=1e-12, atol=0)
                assert torch.equal(answer[way][0], answers[0][way][0])
            met = torch.cat([answer[way][1] for answer in answers])
            torch.testing.assert_close(met, rows.grad, rtol=1e-10, atol=1e-12)


def _alone(ranks: RankGroup) -> float:
    assert torch.distributed.is_initialized()
    problem = random_problem(ranks.rank)
    return float(margin_softmax(problem.embeddings, problem.labels, problem.centers, ARCFACE))


def test_a_loss_without_a_rank_group_is_this_process_s_own(ranks: RankPool) -> None:
    """Whatever group the process has joined: other ranks may not even call it."""
    for rank, met in enumerate(ranks.run(3, _alone)):
        problem = random_problem(rank)
        assert met == float(margin_softmax(problem.embeddings, problem.labels, problem.centers, ARCFACE))


def _made_in_turn(ranks: RankGroup) -> int:
    calls: list[int] = []
    assert on_first_rank_first(lambda: calls.append(ranks.rank), ranks) is None
    return len(calls)


@pytest.mark.parametrize("world_size", [1, 3])
def test_every_rank_makes_it_once_whatever_it_returns(ranks: RankPool, world_size: int) -> None:
    assert ranks.run(world_size, _made_in_turn) == [1] * world_size


def _host_groups(ranks: RankGroup) -> tuple[bool, list[object], list[int]]:
    """What two rank groups over nccl open for their hosts."""
    made: list[object] = []

    def open_group(members: list[int], timeout: object, backend: str) -> object:
        made.append((members, timeout, backend))
        return ranks.group

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(TIMEOUT, "7")
        patch.setattr(distributed, "get_backend", lambda group: "nccl")
        # The pool's store is gone by now, and a group of its own with it.
        patch.setattr(distributed, "new_group", open_group)
        one, other = RankGroup(ranks.group), RankGroup(ranks.group)
    return one._host_group is other._host_group, made, one.sizes(ranks.rank)


def test_hosts_have_one_group_that_is_as_patient_as_the_job(ranks: RankPool) -> None:
    for same, made, sizes in ranks.run(3, _host_groups):
        assert same
        assert made == [([0, 1, 2], timedelta(seconds=7), "gloo")]
        assert sizes == [0, 1, 2]


def _exchanges(ranks: RankGroup, batches: list[list[int]], announced: bool) -> list[int]:
    """After which of some batches the ranks have told each other their sizes, by a loader that makes them even."""
    distiller = Distiller(KDConfig())
    distiller.even_batches = True
    asked: list[int] = []
    exchange = ranks.sizes
    ranks.sizes = lambda size: asked.append(step) or exchange(size)  # type: ignore[func-returns-value, method-assign]
    head = DistillationHead(distiller, ARCFACE, 4, 7, ranks=ranks)
    for step, sizes in enumerate(batches):  # noqa: B007
        rows = sizes[ranks.rank]
        if announced:
            distiller._next_views(BatchViews(torch.arange(rows), torch.zeros(rows, dtype=torch.bool)))
        head(torch.ones(rows, 4), torch.zeros(rows, dtype=torch.int64))
    return asked


@pytest.mark.parametrize(
    ("batches", "announced", "wanted"),
    [
        ([[2, 2], [2, 2], [1, 1], [1, 1], [2, 2]], True, [0, 2, 4]),
        ([[2, 2], [2, 2]], False, [0, 1]),
        ([[2, 1], [2, 1], [2, 1]], True, [0, 1, 2]),
    ],
    ids=["even", "unannounced", "uneven"],
)
def test_sizes_are_exchanged_where_they_may_differ(
    ranks: RankPool, batches: list[list[int]], announced: bool, wanted: list[int]
) -> None:
    assert ranks.run(2, _exchanges, batches, announced) == [wanted, wanted]
