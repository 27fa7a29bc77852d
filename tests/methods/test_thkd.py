"""TH-KD against the naive twin, in both forms; the projection in front of the teacher's head."""

from typing import Any

import pytest
import torch
from torch import Tensor

from arcface_kd.distributed.ranks import RankGroup
from arcface_kd.methods.class_sampling import step_classes
from arcface_kd.methods.thkd import THKD, THKDConfig
from tests.reference.logit_distillation import dense_distillation
from tests.reference.problems import ARCFACE
from tests.reference.two_classifiers import TwoSides, two_sides

ALONE = RankGroup(alone=True)


def make(given: TwoSides, config: THKDConfig, **keys: Any) -> THKD:
    return THKD(config, given.context(ALONE, ARCFACE, **keys)).double()


def projection() -> Tensor:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()


def twin(given: TwoSides, student: Tensor, weight: Tensor, matrix: Tensor, config: THKDConfig) -> dict[str, Tensor]:
    """The terms, from one head after the other."""
    ce, kd, _, _ = dense_distillation(
        student,
        given.labels,
        weight,
        given.teacher,
        given.classifier,
        ARCFACE,
        config.temperature,
        logits=config.logits,
    )
    head_ce, head_kd, _, _ = dense_distillation(
        student @ matrix.T,
        given.labels,
        given.classifier,
        given.teacher,
        given.classifier,
        ARCFACE,
        config.temperature,
        logits=config.logits,
    )
    if config.form == "additive":
        return {"ce": ce, "kd": config.kd_weight * kd, "kd_teacher_head": config.teacher_head_weight * head_kd}
    a, weight_of_kd = config.a, config.weight
    return {
        "ce": (1 - a) * ce,
        "ce_teacher_head": a * head_ce,
        "kd": weight_of_kd * (1 - a) * kd,
        "kd_teacher_head": weight_of_kd * a * head_kd,
    }


@pytest.mark.parametrize(
    "config",
    [
        THKDConfig(),
        THKDConfig(a=0.2, weight=3.0, temperature=2.0, logits="margin"),
        THKDConfig(a=0.0),
        THKDConfig(a=1.0),
        THKDConfig("additive"),
        THKDConfig("additive", kd_weight=0.3, teacher_head_weight=2.0),
    ],
    ids=str,
)
def test_a_step_equals_the_twin(config: THKDConfig) -> None:
    """Gradients reach the student both ways, the projection through the frozen head, and never that head."""
    given = two_sides(1)
    matrix = projection()
    method, batch = make(given, config), given.batch()
    batch = given.batch()
    batch = type(batch)(batch.embeddings, batch.embeddings @ matrix.T, batch.labels, batch.teacher, batch.sizes, 0)
    terms = method(batch)
    torch.stack(list(terms.values())).sum().backward()
    in_matrix = matrix.grad
    student, weight = given.student.clone().requires_grad_(), given.weight.clone().requires_grad_()
    twin_matrix = projection()
    wanted = twin(given, student, weight, twin_matrix, config)
    torch.stack(list(wanted.values())).sum().backward()
    assert set(terms) == set(wanted)
    for name, value in terms.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(batch.embeddings.grad, student.grad, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(method.classifier.weight.grad, weight.grad, rtol=1e-9, atol=1e-8)
    torch.testing.assert_close(in_matrix, twin_matrix.grad, rtol=1e-9, atol=1e-9)
    assert method.teacher_centers.weight.grad is None


def test_only_the_student_s_classifier_is_saved() -> None:
    method = make(two_sides(2), THKDConfig())
    assert list(method.state_dict()) == ["classifier.weight"] == list(method.sharded)
    assert THKD.projects
    assert THKD.classifies


def test_both_heads_see_the_same_sample_of_the_classes() -> None:
    given = two_sides(3, classes=60, teacher_dimension=6)
    method = make(given, THKDConfig(), sample_rate=0.5)
    batch = given.batch()
    index = step_classes(method.context, batch).index
    terms = method(batch)
    wanted = dense_distillation(
        given.student, given.labels, given.classifier, given.teacher, given.classifier, ARCFACE, 4.0, index=index
    )
    torch.testing.assert_close(terms["ce_teacher_head"], 0.5 * wanted[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(terms["kd_teacher_head"], 0.5 * wanted[1], rtol=1e-10, atol=1e-10)
