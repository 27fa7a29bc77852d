"""Distilled class centers: where they start, how they move, what is saved."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from arcface_kd.distributed.class_shard import ClassShard, positions_in_shard
from arcface_kd.losses.class_weights import inverse_norm
from arcface_kd.methods.class_centers import DistilledCenters, Repeated, initial_centers, repetition_weights

# More classes than one block of the draw, cut at places that are no block's edge.
MANY = 10_000


@pytest.mark.parametrize("world_size", [2, 3, 4, 7])
def test_initial_centers_do_not_depend_on_the_number_of_ranks(world_size: int) -> None:
    whole = initial_centers(ClassShard(MANY), 4, seed=3)
    parts = [initial_centers(ClassShard(MANY, rank, world_size), 4, seed=3) for rank in range(world_size)]
    assert torch.equal(torch.cat(parts), whole)


def test_initial_centers_depend_on_seed_and_class_and_are_normal() -> None:
    before = torch.get_rng_state()
    whole = initial_centers(ClassShard(MANY), 8, seed=0)
    assert torch.equal(torch.get_rng_state(), before), "the global generator is left alone"
    assert whole.dtype == torch.float32
    assert whole.shape == (MANY, 8)
    assert len(whole.unique(dim=0)) == MANY
    assert abs(float(whole.mean())) < 1e-4
    assert abs(float(whole.std()) - 0.01) < 1e-4
    assert not torch.equal(initial_centers(ClassShard(MANY), 8, seed=1), whole)


@settings(deadline=None)
@given(labels=st.lists(st.integers(-1, 4), min_size=1, max_size=12))
def test_repetition_weights_are_one_a_class(labels: list[int]) -> None:
    for repeated in ("mean", "last"):
        weights = repetition_weights(positions_in_shard(torch.tensor(labels), 0, 5), 5, repeated).tolist()
        for i, label in enumerate(labels):
            same = [j for j, other in enumerate(labels) if other == label]
            if label < 0:
                continue
            wanted = 1 / len(same) if repeated == "mean" else float(i == same[-1])
            assert weights[i] == pytest.approx(wanted, abs=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("repeated", ["mean", "last"])
def test_a_center_becomes_alpha_of_itself_and_the_rest_of_the_teacher(repeated: Repeated, dtype: torch.dtype) -> None:
    """Several samples of one class are combined as asked; their mean is the same in any order."""
    centers, teacher = torch.randn(3, 4, dtype=dtype), normalize(torch.randn(4, 4, dtype=dtype))
    labels, alpha = torch.tensor([1, 2, 1, 1]), torch.tensor([0.0, 0.5, 0.9, 0.3], dtype=dtype)
    each = [a * centers[1] + (1 - a) * t for a, t in zip(alpha, teacher, strict=True)]
    wanted = (each[0] + each[2] + each[3]) / 3 if repeated == "mean" else each[3]
    for order in ([0, 1, 2, 3], [2, 1, 0, 3]):
        module = DistilledCenters(ClassShard(3), 4).to(dtype)
        module.load_state_dict({"weight": centers})
        module.update(labels[order], teacher[order], alpha[order], repeated)
        torch.testing.assert_close(module.weight[1], wanted)
        torch.testing.assert_close(module.weight[2], 0.5 * centers[2] + 0.5 * teacher[1])
        assert torch.equal(module.weight[0], centers[0])
        torch.testing.assert_close(module.inverse_norms, inverse_norm(module.weight))


def test_rows_without_label_other_ranks_classes_and_an_empty_shard_move_nothing() -> None:
    module = DistilledCenters(ClassShard(10, rank=1, world_size=2), 4)
    before = module.weight.clone()
    empty = DistilledCenters(ClassShard(1, rank=1, world_size=2), 4)
    for each in (module, empty):
        each.update(torch.tensor([-1, 0, 4]), normalize(torch.randn(3, 4)), torch.zeros(3))
    assert torch.equal(module.weight, before)
    assert empty.weight.shape == (0, 4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_spoils_no_center(bad: float) -> None:
    """Neither its own class, nor class 0 of the ranks that do not hold its class."""
    shards = [DistilledCenters(ClassShard(6, rank, 2), 4) for rank in range(2)]
    labels, teacher = torch.tensor([4, 5, -1]), normalize(torch.randn(3, 4))
    teacher[0], teacher[2] = bad, bad
    alpha = torch.tensor([bad, 0.5, bad])
    for shard in shards:
        before = shard.weight.clone()
        shard.update(labels, teacher, alpha)
        assert shard.weight.isfinite().all()
        if shard.shard.rank == 1:
            assert torch.equal(shard.weight[1], before[1])
            torch.testing.assert_close(shard.weight[2], 0.5 * before[2] + 0.5 * teacher[1])
        assert shard.cosine(labels, teacher)[1].isfinite()


def test_a_spoilt_row_0_does_not_reach_the_cosines_of_other_ranks_classes() -> None:
    shard = DistilledCenters(ClassShard(6, rank=0, world_size=2), 4)
    shard.weight[0] = torch.nan
    shard.refresh()
    assert shard.cosine(torch.tensor([4, -1]), normalize(torch.randn(2, 4))).tolist() == [0.0, 0.0]


def test_cosines_of_rows_with_their_own_centers() -> None:
    module = DistilledCenters(ClassShard(7, rank=1, world_size=2), 4)
    unit = normalize(torch.randn(4, 4))
    met = module.cosine(torch.tensor([4, 6, 0, -1]), unit)
    wanted = (normalize(module.weight)[[0, 2]] * unit[:2]).sum(1)
    torch.testing.assert_close(met, torch.cat([wanted, torch.zeros(2)]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_narrow_copy_is_never_stale(dtype: torch.dtype) -> None:
    """At the start, after a step, a load, a move and a cast: it is what a new one would be."""

    def holds(module: DistilledCenters) -> None:
        assert module.units is not None
        assert module.units.dtype == dtype
        assert torch.equal(module.units, (module.weight * inverse_norm(module.weight).unsqueeze(1)).to(dtype))
        assert torch.equal(module.inverse_norms, inverse_norm(module.weight))

    shard = ClassShard(5)
    module = DistilledCenters(shard, 4, product_dtype=dtype)
    holds(module)
    module.update(torch.tensor([3, 3, 1, -1]), normalize(torch.randn(4, 4)), torch.rand(4))
    holds(module)
    other = torch.nn.ModuleDict({"c": DistilledCenters(shard, 4, seed=1, product_dtype=dtype)})
    other.load_state_dict({"c.weight": module.weight})
    loaded = other["c"]
    assert isinstance(loaded, DistilledCenters)
    holds(loaded)
    assert torch.equal(loaded.weight, module.weight)
    holds(copy.deepcopy(module).double())
    holds(copy.deepcopy(module).to("cpu"))
    assert list(module.parameters()) == []
    assert set(module.state_dict()) == {"weight"}
    assert torch.nn.ModuleDict({"c": module}).double().to(torch.device("meta"))["c"].units.device.type == "meta"
