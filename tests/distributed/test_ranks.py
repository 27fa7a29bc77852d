"""Class ranges, and a rank group of one; several ranks are in tests/distributed."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import distributed

from arcface_kd.distributed.class_shard import ClassShard, positions_in_shard
from arcface_kd.distributed.ranks import RankGroup, for_ddp


@given(num_classes=st.integers(1, 500), world_size=st.integers(1, 40))
def test_shards_tile_the_classes_as_partial_fc_does(num_classes: int, world_size: int) -> None:
    shards = [ClassShard(num_classes, rank, world_size) for rank in range(world_size)]
    covered = [c for shard in shards for c in range(shard.start, shard.start + shard.size)]
    assert covered == list(range(num_classes))
    for rank, shard in enumerate(shards):
        # The host's own two lines (partial_fc_v2.py), which its checkpoints are cut by.
        assert shard.size == num_classes // world_size + int(rank < num_classes % world_size)
        assert shard.start == num_classes // world_size * rank + min(rank, num_classes % world_size)


@given(
    labels=st.lists(st.integers(-3, 60), max_size=20),
    num_classes=st.integers(1, 50),
    world_size=st.integers(1, 7),
)
def test_every_label_is_owned_by_the_one_rank_that_holds_its_class(
    labels: list[int], num_classes: int, world_size: int
) -> None:
    owners = torch.zeros(len(labels), dtype=torch.int64)
    for rank in range(world_size):
        shard = ClassShard(num_classes, rank, world_size)
        position, owned = shard.local(torch.tensor(labels, dtype=torch.int64))
        owners += owned
        for label, place, here in zip(labels, position.tolist(), owned.tolist(), strict=True):
            assert 0 <= place < shard.size or not shard.size
            assert place == label - shard.start or not here
            assert here == (shard.start <= label < shard.start + shard.size)
    assert owners.tolist() == [int(0 <= label < num_classes) for label in labels]


def test_positions_in_an_empty_range_belong_to_nobody() -> None:
    assert not positions_in_shard(torch.tensor([-1, 0, 4, 5]), 5, 0).owned.any()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [((-1,), "num_classes is -1"), ((5, 2, 2), r"rank is 2; it must be in \[0, 2\)"), ((5, -1, 2), "rank is -1")],
)
def test_an_impossible_shard_is_refused(arguments: tuple[int, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ClassShard(*arguments)


@pytest.mark.parametrize("alone", [False, True])
def test_a_lone_process_needs_no_process_group(alone: bool) -> None:
    ranks = RankGroup(alone=alone)
    assert (ranks.rank, ranks.world_size) == (0, 1)
    assert ranks.shard(7) == ClassShard(7)
    rows = torch.arange(6.0).view(3, 2).requires_grad_()
    assert ranks.sizes(3) == [3]
    assert not ranks.gather(rows, [3]).requires_grad
    (ranks.gather_with_gradient(for_ddp(rows, 1), [3]) * 2).sum().backward()
    assert rows.grad is not None
    assert (rows.grad == 2).all()
    assert torch.equal(ranks.sum_rows(rows, [3]), rows)
    assert torch.equal(ranks.own_rows(rows, [3]), rows)
    assert ranks.sum_(torch.ones(2)).tolist() == [1, 1]
    assert ranks.max_(torch.ones(2)).tolist() == [1, 1]
    assert not distributed.is_initialized()


def test_the_gradient_for_ddp_is_multiplied_and_the_values_are_not() -> None:
    rows = torch.ones(2, 3, requires_grad=True)
    passed = for_ddp(rows, 4)
    assert torch.equal(passed, rows)
    passed.sum().backward()
    assert rows.grad is not None
    assert (rows.grad == 4).all()
