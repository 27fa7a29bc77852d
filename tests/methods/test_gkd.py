"""Grouped KD against the naive twin: groups, weights, ramp; and what it observes."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize, one_hot

from arcface_kd.config.kd import KDConfig
from arcface_kd.config.options import build
from arcface_kd.distillation.distiller import Distiller
from arcface_kd.distillation.head import DistillationHead
from arcface_kd.distributed.ranks import RankGroup
from arcface_kd.losses.class_groups import BatchMass, FixedSize, SampleMass
from arcface_kd.losses.logit_distillation import Grouping
from arcface_kd.methods.gkd import GKD, GKDConfig, Group
from arcface_kd.teachers.base import load_teacher
from tests.reference.grouped_kd import batch_group_size, grouped_kd
from tests.reference.logit_distillation import dense_distillation
from tests.reference.problems import COSFACE
from tests.reference.two_classifiers import TwoSides, two_sides

ALONE = RankGroup(alone=True)


def make(given: TwoSides, config: GKDConfig, **keys: Any) -> GKD:
    return GKD(config, given.context(ALONE, COSFACE, **keys)).double()


def twin(given: TwoSides, config: GKDConfig) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Unweighted terms by name, and the gradients of their sum weighted as published."""
    student, centers = given.student.clone().requires_grad_(), given.weight.clone().requires_grad_()
    grouping = Grouping(config.rule(), config.ranked_by, secondary=config.secondary_weight > 0)
    terms = dense_distillation(
        student,
        given.labels,
        centers,
        given.teacher,
        given.classifier,
        COSFACE,
        config.temperature,
        grouping=grouping,
        logits=config.logits,
    )
    primary, binary, secondary = config.weights(0)
    weighted = terms[0] + primary * terms[1] + binary * terms[2] + secondary * terms[3]
    in_student, in_centers = torch.autograd.grad(weighted, [student, centers])
    return dict(zip(("ce", "primary_kd", "binary_kd", "secondary_kd"), terms, strict=True)), in_student, in_centers


CONFIGS = {
    "batch": GKDConfig(step=2, mass=0.8, ramp_epochs=0),
    "sample": GKDConfig(group="sample", mass=0.6, ramp_epochs=0),
    "fixed": GKDConfig(group="fixed", size=4, ramp_epochs=0),
    "by teacher": GKDConfig(group="fixed", size=4, ranked_by="teacher", ramp_epochs=0),
    "plain": GKDConfig(group="sample", mass=0.6, logits="plain", ramp_epochs=0),
    "ablation": GKDConfig(
        group="sample",
        mass=0.6,
        primary_weight=0.5,
        binary_weight=2,
        secondary_weight=0.7,
        temperature=2,
        ramp_epochs=0,
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_equals_the_twin(name: str) -> None:
    given, config = two_sides(1), CONFIGS[name]
    method, batch = make(given, config), given.batch()
    terms = method(batch)
    torch.stack(list(terms.values())).sum().backward()
    wanted, in_student, in_centers = twin(given, config)
    weights = dict(zip(("primary_kd", "binary_kd", "secondary_kd"), config.weights(0), strict=True))
    assert set(terms) == {"ce", "primary_kd", "binary_kd"} | ({"secondary_kd"} if name == "ablation" else set())
    for term, value in terms.items():
        torch.testing.assert_close(value, weights.get(term, 1.0) * wanted[term], rtol=1e-10, atol=1e-10)
        assert value > 0
    torch.testing.assert_close(batch.embeddings.grad, in_student, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(method.classifier.weight.grad, in_centers, rtol=1e-9, atol=1e-8)


@pytest.mark.parametrize("group", ["fixed", "batch"])
def test_a_step_equals_the_published_arithmetic(group: Group) -> None:
    """2,000 classes: the target counts as one of K, and K comes from the batch's mean probability."""
    given = two_sides(7, batch=16, classes=2000, dimension=24, teacher_dimension=20)
    given = given._replace(labels=torch.arange(16) * 11)
    config = GKDConfig(group=group, size=500, mass=0.93, secondary_weight=0.5, ramp_epochs=0)
    method, batch = make(given, config), given.batch()
    torch.stack(list(method(batch).values())).sum().backward()

    student, centers = given.student.clone().requires_grad_(), given.weight.clone().requires_grad_()
    own = 0.4 * one_hot(given.labels, 2000)
    logits = 64 * (normalize(student) @ normalize(centers).T - own)
    teacher = 64 * (normalize(given.teacher) @ normalize(given.classifier).T - own)
    size = 500 if group == "fixed" else batch_group_size(logits.detach(), 0.93, 100)
    assert 100 < size < 1900
    primary, binary, secondary = grouped_kd(logits, teacher, given.labels, size, 4.0)
    l1 = 8 if group == "fixed" else 4
    (cross_entropy(logits, given.labels) + l1 * primary + binary + 0.5 * secondary).backward()
    assert method.observations()["group_size"] == pytest.approx(size)
    torch.testing.assert_close(batch.embeddings.grad, student.grad, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(method.classifier.weight.grad, centers.grad, rtol=1e-9, atol=1e-9)


def test_published_weights_follow_the_group() -> None:
    assert GKDConfig().rule() == BatchMass(0.93, 100)
    assert GKDConfig(group="sample").rule() == SampleMass(0.93)
    assert GKDConfig(group="fixed").rule() == FixedSize(10_000)
    assert GKDConfig(ramp_epochs=0.0).weights(0) == (4.0, 1.0, 0.0)
    assert GKDConfig(group="sample", ramp_epochs=0.0).weights(0) == (4.0, 1.0, 0.0)
    assert GKDConfig(group="fixed", ramp_epochs=0.0).weights(0) == (8.0, 1.0, 0.0)
    assert GKDConfig(group="fixed", primary_weight=0.0, ramp_epochs=0.0).weights(0) == (0.0, 1.0, 0.0)


def test_the_terms_ramp_up_in_whole_epochs() -> None:
    given = two_sides(2)
    config = dataclasses.replace(CONFIGS["fixed"], ramp_epochs=4)
    method = make(given, config, steps_per_epoch=3)
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


def test_beside_a_loss_of_the_embeddings(tmp_path: Path) -> None:
    """gkd+embedding through the head, as a trainer calls it: the sum of what the two are alone."""
    given = two_sides(4, dimension=6, teacher_dimension=6)
    torch.save(given.classifier.float(), tmp_path / "head.pt")
    images, labels = torch.rand(4, 3, 112, 112) * 2 - 1, torch.tensor([1, 2, 3, -1])
    student, teacher = (torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 112 * 112, 6)) for _ in range(2))
    options: dict[str, dict[str, object]]
    options = {"gkd": {"group": "fixed", "size": 4, "ramp_epochs": 0}, "embedding": {"weight": 64}}

    def loss_of(*methods: str) -> Tensor:
        kd = KDConfig(
            methods=methods,
            classifier=str(tmp_path / "head.pt") if "gkd" in methods else None,
            options={name: options[name] for name in methods},
        )
        distiller = Distiller(kd, load_teacher(teacher, {"embedding_size": 6}))
        head = DistillationHead(distiller, COSFACE, 6, len(given.classifier), ranks=ALONE)
        if "gkd" in methods:
            assert head.sharded_entries() == ("methods.gkd.classifier.weight",)
        hooked = distiller.watch(copy.deepcopy(student))
        loss: Tensor = head(hooked(images), labels)
        loss.backward()
        return loss.detach()

    alone = loss_of()
    torch.testing.assert_close(loss_of("gkd", "embedding"), loss_of("gkd") + loss_of("embedding") - alone)
    assert loss_of("gkd") > alone
