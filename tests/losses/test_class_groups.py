"""Groups found by histograms against rows that are sorted; ties, sizes beyond all classes, rows without label."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from arcface_kd.distributed.ranks import RankGroup
from arcface_kd.losses.class_groups import BatchMass, FixedSize, GroupRule, RankedLogits, SampleMass
from arcface_kd.losses.class_weights import ClassWeights, visited_classes
from arcface_kd.losses.sharded_logits import HIDDEN
from tests.reference.logit_distillation import sorted_groups

LIMIT, TEMPERATURE = 16.0, 4.0


def random_logits(seed: int, batch: int, classes: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """((B, C) logits over the temperature, labels)."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(batch, 1, generator=generator, dtype=torch.float64) * 3
    logits = torch.randn(batch, classes, generator=generator, dtype=torch.float64) * spread
    labels = torch.randint(classes, (batch,), generator=generator)
    return logits.clamp(-LIMIT, LIMIT).to(dtype), labels


def found_groups(
    logits: Tensor, labels: Tensor, rule: GroupRule, chunk: int = 7, shift: Tensor | None = None
) -> Tensor:
    """(B, C) bool: the primary classes, from one rank's point of view."""
    valid = labels >= 0
    values, target = logits.T.clone(), logits.gather(1, labels.clamp_min(0).unsqueeze(1)).squeeze(1)
    values[labels[valid], valid.nonzero().squeeze(1)] = HIDDEN
    classes = visited_classes(ClassWeights(values.new_ones(len(values), 1)), labels)
    ranked = RankedLogits(values, target, valid, classes, LIMIT, TEMPERATURE, shift, RankGroup(alone=True), chunk)
    primary = (values >= ranked.thresholds(rule)).T
    primary[valid, labels[valid]] = True
    return primary


RULES: dict[str, GroupRule] = {
    "fixed 1": FixedSize(1),
    "fixed 9": FixedSize(9),
    "fixed 40": FixedSize(40),
    "fixed 1000": FixedSize(1000),
    "batch": BatchMass(0.9, 3),
    "batch, nearly all": BatchMass(0.99999, 7),
    "batch, one step": BatchMass(0.01, 5),
    "sample": SampleMass(0.7),
    "sample, few": SampleMass(0.05),
    "sample, nearly all": SampleMass(0.9999),
}


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_the_group_is_that_of_sorted_rows(rule: str, shifted: bool) -> None:
    for seed in range(5):
        logits, labels = random_logits(seed, 12, 40)
        shift = logits.amax(1) if shifted else None
        found = found_groups(logits, labels, RULES[rule], shift=shift)
        wanted = sorted_groups(logits * TEMPERATURE, labels, RULES[rule], TEMPERATURE)
        assert torch.equal(found, wanted), f"seed {seed}: {found.sum(1)} and {wanted.sum(1)} classes"


@settings(deadline=None, max_examples=60)
@given(
    batch=st.integers(1, 6),
    classes=st.integers(1, 30),
    seed=st.integers(0, 10_000),
    chunk=st.integers(1, 40),
    rule=st.one_of(st.builds(FixedSize, st.integers(1, 35)), st.builds(SampleMass, st.floats(0.01, 0.99))),
)
def test_any_shape_gives_the_group_of_sorted_rows(
    batch: int, classes: int, seed: int, chunk: int, rule: GroupRule
) -> None:
    logits, labels = random_logits(seed, batch, classes)
    found = found_groups(logits, labels, rule, chunk)
    assert torch.equal(found, sorted_groups(logits * TEMPERATURE, labels, rule, TEMPERATURE))


def test_in_fp32_a_group_of_thousands_has_its_size_but_for_levels() -> None:
    logits, labels = random_logits(1, 8, 20_000, torch.float32)
    for size in (1, 100, 2_000, 19_000):
        sizes = found_groups(logits, labels, FixedSize(size), 512).sum(1)
        assert (sizes >= size).all()
        assert (sizes <= size + size // 1000).all(), sizes


@pytest.mark.parametrize("mass", [0.3, 0.9, 0.97])
def test_in_fp32_the_batch_s_size_is_the_published_one(mass: float) -> None:
    logits, labels = random_logits(2, 16, 20_000, torch.float32)
    rule = BatchMass(mass)
    found = found_groups(logits, labels, rule, 512).sum(1)
    (wanted,) = sorted_groups(logits.double() * TEMPERATURE, labels, rule, TEMPERATURE).sum(1).unique().tolist()
    assert wanted % 100 == 1
    assert ((found - wanted).abs() <= wanted // 1000).all(), (found, wanted)
    assert wanted > rule.step or mass < 0.5


def test_level_classes_are_in_or_out_together() -> None:
    logits = torch.tensor([[3.0, 1.0, 1.0, 1.0, 0.0, -2.0]], dtype=torch.float64)
    labels = torch.tensor([0])
    assert [int(found_groups(logits, labels, FixedSize(size)).sum()) for size in (1, 2, 4, 5)] == [1, 4, 4, 5]
    assert found_groups(torch.zeros(1, 6, dtype=torch.float64), labels, FixedSize(2)).all()


def test_a_target_that_its_margin_puts_below_all_is_in() -> None:
    """It counts as one of the group's classes, wherever its logit is."""
    logits = torch.tensor([[-20.0, 1.0, 0.0, -15.9]], dtype=torch.float64)
    for rule, wanted in ((FixedSize(1), 1), (FixedSize(3), 3), (FixedSize(4), 4), (SampleMass(0.5), 2)):
        assert found_groups(logits, torch.tensor([0]), rule).sum() == wanted


def test_rows_without_label_do_not_count_in_the_batch_s_share() -> None:
    logits, labels = random_logits(3, 6, 50)
    labels[:] = torch.tensor([4, -1, 7, -1, -1, 9])
    rule = BatchMass(0.8, 2)
    other = logits.clone()
    other[labels < 0] = 0.0
    labelled = labels >= 0
    found = found_groups(logits, labels, rule)[labelled]
    assert torch.equal(found, found_groups(other, labels, rule)[labelled])


@pytest.mark.parametrize("rule", [FixedSize(3), BatchMass(0.9), SampleMass(0.9)], ids=lambda rule: type(rule).__name__)
def test_a_batch_without_rows(rule: GroupRule) -> None:
    assert found_groups(torch.zeros(0, 9), torch.zeros(0, dtype=torch.int64), rule).shape == (0, 9)


@pytest.mark.parametrize(
    ("kind", "values", "said"),
    [
        (FixedSize, (0,), "0 classes"),
        (BatchMass, (0.0,), r"0\.0"),
        (BatchMass, (0.9, 0), "step of a group's size is 0"),
        (SampleMass, (1.1,), r"1\.1"),
    ],
)
def test_what_no_group_can_have_is_refused(kind: Any, values: tuple[float, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        kind(*values)
