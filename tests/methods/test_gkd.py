"""Grouped KD against the naive twin: groups, weights, ramp; and what it observes."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize, one_hot

from arcface_kd.config.options import build
from arcface_kd.distributed.ranks import RankGroup
from arcface_kd.losses.class_groups import BatchMass, FixedSize, SampleMass
from arcface_kd.losses.logit_distillation import Grouping
from arcface_kd.methods.gkd import GKD, GKDConfig, Group
from tests.reference.compare import assert_same_terms
from tests.reference.grouped_kd import batch_group_size, grouped_kd
from tests.reference.logit_distillation import dense_distillation
from tests.reference.problems import COSFACE
from tests.reference.two_classifiers import TwoSides, two_sides


def make(given: TwoSides, config: GKDConfig, **keys: Any) -> GKD:
    return GKD(config, given.context(RankGroup(alone=True), COSFACE, **keys)).double()


def twin(given: TwoSides, student: Tensor, centers: Tensor, config: GKDConfig) -> dict[str, Tensor]:
    """The terms by name, weighted as published."""
    grouping = Grouping(config.rule(), config.ranked_by, secondary=config.secondary_weight > 0)
    terms = dense_distillation(
        *(student, given.labels, centers, given.teacher, given.classifier, COSFACE, config.temperature),
        grouping=grouping,
        logits=config.logits,
    )
    names = ("ce", "primary_kd", "binary_kd", *(("secondary_kd",) if grouping.secondary else ()))
    return {name: weight * term for name, weight, term in zip(names, (1, *config.weights(0)), terms, strict=False)}


CONFIGS = {
    "batch": GKDConfig(step=2, mass=0.8, ramp_epochs=0),
    "sample": GKDConfig(group="sample", mass=0.6, ramp_epochs=0),
    "fixed": GKDConfig(group="fixed", size=4, ramp_epochs=0),
    "by teacher": GKDConfig(group="fixed", size=4, ranked_by="teacher", ramp_epochs=0),
    "plain": GKDConfig(group="sample", mass=0.6, logits="plain", ramp_epochs=0),
    "ablation": GKDConfig(
        *("sample", 0.6), primary_weight=0.5, binary_weight=2, secondary_weight=0.7, temperature=2, ramp_epochs=0
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_equals_the_twin(name: str) -> None:
    given, config = two_sides(1), CONFIGS[name]
    method, batch = make(given, config), given.batch()
    terms, centers = method(batch), method.classifier.weight
    assert_same_terms(terms, twin(given, batch.embeddings, centers, config), batch.embeddings, centers, tolerance=1e-8)
    assert all(value > 0 for value in terms.values())


@pytest.mark.parametrize("group", ["fixed", "batch"])
def test_a_step_equals_the_published_arithmetic(group: Group) -> None:
    """2,000 classes: the target counts as one of K, and K comes from the batch's mean probability."""
    given = two_sides(7, batch=16, classes=2000, dimension=24, teacher_dimension=20)
    given = given._replace(labels=torch.arange(16) * 11)
    config = GKDConfig(group=group, size=500, mass=0.93, secondary_weight=0.5, ramp_epochs=0)
    method, batch = make(given, config), given.batch()
    terms, centers = method(batch), method.classifier.weight

    own = 0.4 * one_hot(given.labels, 2000).double()
    logits = 64 * (normalize(batch.embeddings) @ normalize(centers).T - own)
    teacher = 64 * (normalize(given.teacher) @ normalize(given.classifier).T - own)
    size = 500 if group == "fixed" else batch_group_size(logits.detach(), 0.93, 100)
    assert 100 < size < 1900
    primary, binary, secondary = grouped_kd(logits, teacher, given.labels, size, 4.0)
    l1 = 8 if group == "fixed" else 4
    wanted = {"ce": cross_entropy(logits, given.labels), "primary_kd": l1 * primary, "binary_kd": binary}
    assert_same_terms(terms, {**wanted, "secondary_kd": 0.5 * secondary}, batch.embeddings, centers)
    assert method.observations()["group_size"] == pytest.approx(size)


def test_published_weights_follow_the_group() -> None:
    assert GKDConfig().rule() == BatchMass(0.93, 100)
    assert GKDConfig(group="sample").rule() == SampleMass(0.93)
    assert GKDConfig(group="fixed").rule() == FixedSize(10_000)
    for group, primary in (("batch", 4.0), ("sample", 4.0), ("fixed", 8.0)):
        assert GKDConfig(group=group, ramp_epochs=0.0).weights(0) == (primary, 1.0, 0.0)  # type: ignore[arg-type]
    assert GKDConfig(group="fixed", primary_weight=0.0, ramp_epochs=0.0).weights(0) == (0.0, 1.0, 0.0)


def test_the_terms_ramp_up_in_whole_epochs() -> None:
    given = two_sides(2)
    method = make(given, dataclasses.replace(CONFIGS["fixed"], ramp_epochs=4), steps_per_epoch=3)
    whole = make(given, CONFIGS["fixed"])(given.batch())
    for step, ramp in ((0, 0.0), (2, 0.0), (3, 0.25), (8, 0.5), (12, 1.0), (100, 1.0)):
        terms = method(given.batch(step))
        torch.testing.assert_close(terms["ce"], whole["ce"])
        for name in ("primary_kd", "binary_kd"):
            torch.testing.assert_close(terms[name], ramp * whole[name])


def test_what_it_observes() -> None:
    given = two_sides(3)
    method = make(given, CONFIGS["fixed"])
    assert method.observations() == {}
    method(given.batch())
    seen = method.observations()
    assert seen["group_size"] == pytest.approx(4)
    assert 0 < seen["student_mass"] < 1
    assert 0 < seen["teacher_mass"] < 1
    assert not any(value.requires_grad for value in seen.values())


def test_knobs_come_from_the_command_line() -> None:
    config = build(GKDConfig, {"group": "fixed", "size": "50", "primary_weight": "none", "ramp_epochs": "2"}, "gkd")
    assert config == GKDConfig(group="fixed", size=50, ramp_epochs=2.0)
