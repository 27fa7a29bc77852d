"""Logit KD against the naive twin; its knobs, its state and what it combines with."""

from typing import Any

import pytest
import torch

from arcface_kd.config.kd import KDConfig
from arcface_kd.distillation.distiller import Distiller
from arcface_kd.distributed.ranks import RankGroup
from arcface_kd.errors import ConfigError, TeacherError
from arcface_kd.losses.logit_distillation import Logits
from arcface_kd.methods.class_sampling import step_classes
from arcface_kd.methods.kd import LogitKD, LogitKDConfig
from tests.reference.logit_distillation import dense_distillation
from tests.reference.problems import ARCFACE, COSFACE
from tests.reference.two_classifiers import TwoSides, two_sides

ALONE = RankGroup(alone=True)


def make(given: TwoSides, config: LogitKDConfig | None = None, **keys: Any) -> LogitKD:
    return LogitKD(config or LogitKDConfig(), given.context(ALONE, ARCFACE, **keys)).double()


@pytest.mark.parametrize(
    ("temperature", "weight", "logits"), [(4.0, 1.0, "plain"), (1.0, 0.5, "plain"), (2.0, 3.0, "margin")]
)
def test_a_step_equals_the_twin(temperature: float, weight: float, logits: Logits) -> None:
    """Embeddings of 6 and 8 dimensions: logits need no projection."""
    given = two_sides(1)
    method, batch = make(given, LogitKDConfig(temperature, weight, logits)), given.batch()
    terms = method(batch)
    assert set(terms) == {"ce", "kd"}
    (terms["ce"] + terms["kd"]).backward()
    student, centers = given.student.clone().requires_grad_(), given.weight.clone().requires_grad_()
    ce, kd, _, _ = dense_distillation(
        student, given.labels, centers, given.teacher, given.classifier, ARCFACE, temperature, logits=logits
    )
    (ce + weight * kd).backward()
    torch.testing.assert_close(terms["ce"], ce, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(terms["kd"], weight * kd, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(batch.embeddings.grad, student.grad, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(method.classifier.weight.grad, centers.grad, rtol=1e-9, atol=1e-8)


def test_the_teacher_s_format_is_its_own() -> None:
    """A teacher in fp32 beside a student in fp64, and in bf16 beside fp32."""
    given = two_sides(2)
    wanted = make(given)(given.batch())["kd"]
    single = given._replace(teacher=given.teacher.float())
    torch.testing.assert_close(make(given)(single.batch())["kd"], wanted, rtol=1e-5, atol=1e-5)
    half = given._replace(student=given.student.float(), teacher=given.teacher.bfloat16())
    met = LogitKD(LogitKDConfig(), given.context(ALONE, ARCFACE)).float()(half.batch())["kd"]
    torch.testing.assert_close(met.double(), wanted, rtol=5e-2, atol=5e-2)


def test_only_the_student_s_classifier_is_learned_and_saved() -> None:
    given = two_sides(3)
    method = make(given)
    before = method.teacher_centers.weight.clone()
    terms = method(given.batch())
    (terms["ce"] + terms["kd"]).backward()
    assert [name for name, _ in method.named_parameters()] == ["classifier.weight"]
    assert list(method.state_dict()) == ["classifier.weight"] == list(method.sharded)
    assert torch.equal(method.teacher_centers.weight, before)
    assert method.teacher_centers.weight.grad is None


def test_a_sample_of_the_classes_is_that_of_all_terms() -> None:
    given = two_sides(4, classes=60)
    method = make(given, sample_rate=0.5)
    terms, batch = method(given.batch()), given.batch()
    index = step_classes(method.context, batch).index
    assert index is not None
    assert len(index) == 30
    ce, kd, _, _ = dense_distillation(
        given.student, given.labels, given.weight, given.teacher, given.classifier, ARCFACE, 4.0, index=index
    )
    torch.testing.assert_close(terms["ce"], ce, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(terms["kd"], kd, rtol=1e-10, atol=1e-10)
    later = step_classes(method.context, given.batch(step=1)).index
    assert later is not None
    assert not torch.equal(later, index)


def test_the_margin_s_filter_leaves_the_distilled_logits_alone() -> None:
    given = two_sides(5)
    from dataclasses import replace

    filtered = replace(COSFACE, filter_threshold=0.1)
    plain = LogitKD(LogitKDConfig(), given.context(ALONE, COSFACE)).double()(given.batch())
    met = LogitKD(LogitKDConfig(), given.context(ALONE, filtered)).double()(given.batch())
    assert met["kd"] == plain["kd"]
    assert met["ce"] < plain["ce"]


def test_by_name_it_wants_both_of_the_teacher_and_excludes_other_classifiers() -> None:
    with pytest.raises(TeacherError, match=r"kd needs the teacher's classifier: .* --kd-classifier"):
        Distiller(KDConfig(methods=("kd",)))
    with pytest.raises(TeacherError, match="kd needs a teacher that embeds the training images"):
        Distiller(KDConfig(methods=("kd",), classifier="head.pt"))
    for pair in (("kd", "gkd"), ("gkd", "thkd"), ("kd", "adadistill")):
        with pytest.raises(ConfigError, match="both bring a classification loss of their own"):
            Distiller(KDConfig(methods=pair, classifier="head.pt"))
