"""TH-KD against the naive twin, in both forms; the projection in front of the teacher's head."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from arcface_kd.distributed.ranks import RankGroup
from arcface_kd.methods.class_sampling import step_classes
from arcface_kd.methods.thkd import THKD, THKDConfig
from tests.reference.compare import assert_same_terms
from tests.reference.logit_distillation import dense_distillation
from tests.reference.problems import ARCFACE
from tests.reference.two_classifiers import TwoSides, two_sides


def make(given: TwoSides, config: THKDConfig, **keys: Any) -> THKD:
    return THKD(config, given.context(RankGroup(alone=True), ARCFACE, **keys)).double()


def twin(given: TwoSides, student: Tensor, projected: Tensor, weight: Tensor, config: THKDConfig) -> dict[str, Tensor]:
    """The terms, from one head after the other."""
    (ce, kd, *_), (head_ce, head_kd, *_) = (
        dense_distillation(
            *(rows, given.labels, centers, given.teacher, given.classifier, ARCFACE, config.temperature),
            logits=config.logits,
        )
        for rows, centers in ((student, weight), (projected, given.classifier))
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
    """Gradients reach the student both ways, and the projection through the frozen head."""
    given = two_sides(1)
    matrix = torch.randn(8, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    method, batch = make(given, config), given.batch()
    batch = replace(batch, projected=batch.embeddings @ matrix.T)
    weight = method.classifier.weight
    wanted = twin(given, batch.embeddings, batch.projected, weight, config)
    assert_same_terms(method(batch), wanted, batch.embeddings, weight, matrix)
    assert list(method.state_dict()) == ["classifier.weight"] == list(method.sharded)


def test_both_heads_see_the_same_sample_of_the_classes() -> None:
    given = two_sides(3, classes=60, teacher_dimension=6)
    method, batch = make(given, THKDConfig(), sample_rate=0.5), given.batch()
    index, terms = step_classes(method.context, batch).index, method(batch)
    wanted = dense_distillation(
        *(given.student, given.labels, given.classifier, given.teacher, given.classifier, ARCFACE, 4.0), index=index
    )
    torch.testing.assert_close(terms["ce_teacher_head"], 0.5 * wanted[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(terms["kd_teacher_head"], 0.5 * wanted[1], rtol=1e-10, atol=1e-10)
