"""Distilled class centers: where they start, how they move, what is saved."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
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
    whole = initial_centers(ClassShard(MANY), 8, seed=0)
    assert whole.dtype == torch.float32
    assert whole.shape == (MANY, 8)
    assert len(whole.unique(dim=0)) == MANY
    assert abs(float(whole.mean())) < 1e-4
    assert abs(float(whole.std()) - 0.01) < 1e-4
    assert not torch.equal(initial_centers(ClassShard(MANY), 8, seed=1), whole)
    assert torch.equal(initial_centers(ClassShard(MANY), 8, seed=0, std=0.02), whole * 2)


def test_initial_centers_leave_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    initial_centers(ClassShard(10), 4, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


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


def test_repetition_weights_have_the_precision_asked_for() -> None:
    weights = repetition_weights(positions_in_shard(torch.tensor([2, 2, 2]), 0, 3), 3, "mean", torch.float64)
    assert weights.tolist() == [1 / 3] * 3


def _moved(
    centers: Tensor, labels: list[int], teacher: Tensor, alpha: list[float], repeated: Repeated, dtype: torch.dtype
) -> Tensor:
    module = DistilledCenters(ClassShard(len(centers)), centers.shape[1]).to(dtype)
    module.load_state_dict({"weight": centers})
    module.update(torch.tensor(labels), teacher.to(dtype), torch.tensor(alpha, dtype=dtype), repeated)
    torch.testing.assert_close(module.inverse_norms, inverse_norm(module.weight))
    return module.weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_center_becomes_alpha_of_itself_and_the_rest_of_the_teacher(dtype: torch.dtype) -> None:
    centers = torch.randn(4, 3, dtype=dtype)
    teacher = normalize(torch.randn(2, 3, dtype=dtype))
    moved = _moved(centers, [2, 0], teacher, [0.25, 1.0], "mean", dtype)
    torch.testing.assert_close(moved[2], 0.25 * centers[2] + 0.75 * teacher[0])
    assert torch.equal(moved[[0, 1, 3]], centers[[0, 1, 3]])


@pytest.mark.parametrize("repeated", ["mean", "last"])
def test_several_samples_of_one_class_are_combined_as_asked(repeated: Repeated) -> None:
    centers = torch.randn(3, 4, dtype=torch.float64)
    teacher = normalize(torch.randn(4, 4, dtype=torch.float64))
    alpha = [0.0, 0.5, 0.9, 0.3]
    moved = _moved(centers, [1, 2, 1, 1], teacher, alpha, repeated, torch.float64)
    each = [a * centers[1] + (1 - a) * t for a, t in zip(alpha, teacher, strict=True)]
    wanted = (each[0] + each[2] + each[3]) / 3 if repeated == "mean" else each[3]
    torch.testing.assert_close(moved[1], wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(moved[2], 0.5 * centers[2] + 0.5 * teacher[1], rtol=1e-12, atol=1e-12)


def test_the_mean_does_not_depend_on_the_order_of_the_batch() -> None:
    centers, teacher = torch.randn(3, 4, dtype=torch.float64), normalize(torch.randn(5, 4, dtype=torch.float64))
    labels, alpha = [1, 1, 2, 1, 0], [0.1, 0.7, 0.2, 0.5, 0.3]
    order = [3, 0, 4, 1, 2]
    one = _moved(centers, labels, teacher, alpha, "mean", torch.float64)
    other = _moved(
        centers, [labels[i] for i in order], teacher[order], [alpha[i] for i in order], "mean", torch.float64
    )
    torch.testing.assert_close(one, other, rtol=1e-14, atol=1e-14)


def test_rows_without_label_and_other_ranks_classes_move_nothing() -> None:
    module = DistilledCenters(ClassShard(10, rank=1, world_size=2), 4)
    before = module.weight.clone()
    module.update(torch.tensor([-1, 0, 4]), normalize(torch.randn(3, 4)), torch.zeros(3))
    assert torch.equal(module.weight, before)


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


def test_centers_are_fp32_buffers_that_no_optimiser_sees() -> None:
    module = DistilledCenters(ClassShard(5), 4)
    assert list(module.parameters()) == []
    assert module.weight.dtype == torch.float32
    assert set(module.state_dict()) == {"weight"}
    assert not module.weight.requires_grad


def test_loading_finds_the_norms_again() -> None:
    one, other = DistilledCenters(ClassShard(5), 4, seed=1), DistilledCenters(ClassShard(5), 4, seed=2)
    other.load_state_dict(one.state_dict())
    assert torch.equal(other.weight, one.weight)
    assert torch.equal(other.inverse_norms, one.inverse_norms)


def test_loading_inside_another_module_finds_the_norms_again() -> None:
    """The hook must run for a submodule too: the head loads its methods that way."""
    one, other = (torch.nn.ModuleDict({"c": DistilledCenters(ClassShard(5), 4, seed=seed)}) for seed in (1, 2))
    other.load_state_dict(one.state_dict())
    loaded = other["c"]
    assert isinstance(loaded, DistilledCenters)
    assert torch.equal(loaded.inverse_norms, inverse_norm(loaded.weight))
    assert torch.equal(loaded.weight, one.state_dict()["c.weight"])


def test_an_empty_shard_is_no_fault() -> None:
    module = DistilledCenters(ClassShard(1, rank=1, world_size=2), 4)
    module.update(torch.tensor([0]), normalize(torch.randn(1, 4)), torch.zeros(1))
    assert module.weight.shape == (0, 4)


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
    assert set(module.state_dict()) == {"weight"}
    assert torch.nn.ModuleDict({"c": module}).double().to(torch.device("meta"))["c"].units.device.type == "meta"
