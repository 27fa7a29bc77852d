"""The pool itself: a test of several ranks is worth nothing if a fault of one of them goes unheard."""

import os
import time

import pytest
import torch
from torch import distributed

from arcface_kd.distributed.ranks import RankGroup
from tests.distributed.pool import RankError, RankPool


def _who(ranks: RankGroup, add: int) -> tuple[int, int, float]:
    return ranks.rank, ranks.world_size, float(ranks.sum_(torch.tensor([float(ranks.rank + add)])))


def _one_raises(ranks: RankGroup) -> None:
    if ranks.rank == 1:
        raise KeyError("the fault")
    ranks.sum_(torch.zeros(1))


def _one_warns(ranks: RankGroup) -> None:
    torch.searchsorted(torch.arange(20)[::2], torch.tensor([3]))


def _one_dies(ranks: RankGroup) -> None:
    if ranks.rank == 0:
        os._exit(7)


def _one_hangs(ranks: RankGroup) -> None:
    if ranks.rank == 0:
        time.sleep(600)


def _threads(ranks: RankGroup) -> tuple[int, int]:
    return torch.get_num_threads(), distributed.get_world_size()


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_rank_runs_in_a_world_of_the_size_asked_for(ranks: RankPool, world_size: int) -> None:
    total = float(sum(range(world_size)) + 5 * world_size)
    assert ranks.run(world_size, _who, 5) == [(rank, world_size, total) for rank in range(world_size)]


def test_a_rank_has_one_thread(ranks: RankPool) -> None:
    assert ranks.run(2, _threads) == [(1, 4)] * 2


def test_faults_are_reported_with_the_traceback_and_the_pool_goes_on() -> None:
    pool = RankPool(patience=20.0)
    try:
        with pytest.raises(RankError, match=r"rank 1 of 3: (?s:.*)_one_raises(?s:.*)the fault"):
            pool.run(3, _one_raises)
        with pytest.raises(RankError, match=r"rank 0 of 2: died with exit code 7"):
            pool.run(2, _one_dies)
        with pytest.raises(RankError, match=r"rank 0 of 1: (?s:.*)non-contiguous"):
            pool.run(1, _one_warns)
        pool.patience = 2.0
        with pytest.raises(RankError, match=r"rank 0 of 2: did not answer within 2 s"):
            pool.run(2, _one_hangs)
    finally:
        pool.close()
    assert not pool._workers
