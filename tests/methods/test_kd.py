"""Logit KD against the naive twin; its knobs and its state."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from arcface_kd.distributed.ranks import RankGroup
from arcface_kd.losses.logit_distillation import Logits
from arcface_kd.losses.margin import Margin
from arcface_kd.methods.class_sampling import step_classes
from arcface_kd.methods.kd import LogitKD, LogitKDConfig
from tests.reference.compare import assert_same_terms
from tests.reference.logit_distillation import dense_distillation
from tests.reference.problems import ARCFACE, COSFACE
from tests.reference.two_classifiers import TwoSides, two_sides


def make(given: TwoSides, config: LogitKDConfig | None = None, margin: Margin = ARCFACE, **keys: Any) -> LogitKD:
    return LogitKD(config or LogitKDConfig(), given.context(RankGroup(alone=True), margin, **keys)).double()


@pytest.mark.parametrize(
    ("temperature", "weight", "logits"), [(4.0, 1.0, "plain"), (1.0, 0.5, "plain"), (2.0, 3.0, "margin")]
)
def test_a_step_equals_the_twin(temperature: float, weight: float, logits: Logits) -> None:
    """Embeddings of 6 and 8 dimensions: logits need no projection."""
    given = two_sides(1)
    method, batch = make(given, LogitKDConfig(temperature, weight, logits)), given.batch()
    centers = method.classifier.weight
    ce, kd, _, _ = dense_distillation(
        *(batch.embeddings, given.labels, centers, given.teacher, given.classifier, ARCFACE, temperature), logits=logits
    )
    assert_same_terms(method(batch), {"ce": ce, "kd": weight * kd}, batch.embeddings, centers)
    assert [name for name, _ in method.named_parameters()] == list(method.state_dict()) == ["classifier.weight"]
    assert method.sharded == ("classifier.weight",)


def test_the_teacher_s_format_is_its_own() -> None:
    """A teacher in fp32 beside a student in fp64, and in bf16 beside fp32."""
    given = two_sides(2)
    wanted = make(given)(given.batch())["kd"]
    single = given._replace(teacher=given.teacher.float())
    torch.testing.assert_close(make(given)(single.batch())["kd"], wanted, rtol=1e-5, atol=1e-5)
    half = given._replace(student=given.student.float(), teacher=given.teacher.bfloat16())
    met = make(given).float()(half.batch())["kd"]
    torch.testing.assert_close(met.double(), wanted, rtol=5e-2, atol=5e-2)


def test_a_sample_of_the_classes_is_that_of_all_terms() -> None:
    given = two_sides(4, classes=60)
    method = make(given, sample_rate=0.5)
    batch, later = (step_classes(method.context, given.batch(step)).index for step in (0, 1))
    assert batch is not None
    assert later is not None
    assert len(batch) == 30
    assert not torch.equal(later, batch)
    ce, kd, _, _ = dense_distillation(
        *(given.student, given.labels, given.weight, given.teacher, given.classifier, ARCFACE, 4.0), index=batch
    )
    terms = method(given.batch())
    torch.testing.assert_close((terms["ce"], terms["kd"]), (ce, kd), rtol=1e-10, atol=1e-10)


def test_the_margin_s_filter_leaves_the_distilled_logits_alone() -> None:
    given = two_sides(5)
    plain, met = (
        make(given, margin=margin)(given.batch()) for margin in (COSFACE, replace(COSFACE, filter_threshold=0.1))
    )
    assert met["kd"] == plain["kd"]
    assert met["ce"] < plain["ce"]
