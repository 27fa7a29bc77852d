"""PartialFC's class sampling."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from arcface_kd.distributed.class_shard import ClassShard
from arcface_kd.distributed.ranks import RankGroup
from arcface_kd.methods.base import RunContext
from arcface_kd.methods.class_sampling import sample_classes
from tests.reference.problems import ARCFACE


def sample(shard: ClassShard, labels: list[int], rate: float, *, seed: int = 0, step: int = 0) -> Tensor:
    context = RunContext(shard.num_classes, 4, ARCFACE, RankGroup(alone=True), sample_rate=rate, seed=seed)
    index = sample_classes(shard, shard.local(torch.tensor(labels, dtype=torch.int64)), context, step)
    assert index is not None
    return index


def test_a_rate_of_1_samples_nothing() -> None:
    context = RunContext(10, 4, ARCFACE, RankGroup(alone=True))
    assert sample_classes(ClassShard(10), ClassShard(10).local(torch.tensor([1])), context, 0) is None


@settings(deadline=None)
@given(
    labels=st.lists(st.integers(-1, 199), max_size=30),
    rate=st.floats(0.01, 0.99),
    rank=st.integers(0, 2),
    seed=st.integers(0, 2**32 - 1),
    step=st.integers(0, 10**7),
)
def test_targets_are_in_and_the_size_is_the_rate_or_the_batch(
    labels: list[int], rate: float, rank: int, seed: int, step: int
) -> None:
    shard = ClassShard(200, rank, 3)
    index = sample(shard, labels, rate, seed=seed, step=step)
    mine = {label - shard.start for label in labels if shard.start <= label < shard.start + shard.size}
    assert mine <= set(index.tolist())
    assert index.tolist() == sorted(set(index.tolist()))
    assert len(index) == min(max(int(rate * shard.size), len(labels)), shard.size)
    assert all(0 <= i < shard.size for i in index.tolist())


def test_the_draw_is_that_of_seed_rank_and_step_alone() -> None:
    shard = ClassShard(1000, 1, 2)
    one = sample(shard, [600], 0.1, seed=3, step=7)
    torch.rand(5)
    before = torch.get_rng_state()
    assert torch.equal(sample(shard, [600], 0.1, seed=3, step=7), one)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(sample(shard, [600], 0.1, seed=4, step=7), one)
    assert not torch.equal(sample(shard, [600], 0.1, seed=3, step=8), one)
    assert not torch.equal(sample(ClassShard(1000, 0, 2), [600], 0.1, seed=3, step=7), one)


def test_every_other_class_is_drawn_as_often() -> None:
    shard, counts = ClassShard(50), torch.zeros(50)
    for step in range(2000):
        counts[sample(shard, [7], 0.2, step=step)] += 1
    assert counts[7] == 2000
    others = counts[torch.arange(50) != 7]
    # 9 of 49 drawn in each of 2000 steps: 367 +- 17.
    assert abs(float(others.mean()) - 2000 * 9 / 49) < 1e-3
    assert float((others - others.mean()).abs().max()) < 5 * 17.3


@pytest.mark.parametrize("step", [0, 1, 2, 3])
def test_draws_of_neighbouring_steps_and_ranks_have_nothing_in_common(step: int) -> None:
    """By chance a tenth of a tenth of 10,000 classes: 100 +- 10."""
    drawn = {
        (rank, s): set(sample(ClassShard(20_000, rank, 2), [], 0.1, step=s).tolist())
        for rank in range(2)
        for s in (step, step + 1)
    }
    keys = list(drawn)
    for i, a in enumerate(keys):
        for b in keys[:i]:
            assert 50 < len(drawn[a] & drawn[b]) < 150
