"""ProxylessKD, ArcDistill and CosDistill against the naive twin; where the classifier comes from and stays."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from arcface_kd.config.kd import KDConfig
from arcface_kd.distillation.distiller import Distiller
from arcface_kd.distillation.head import DistillationHead
from arcface_kd.distributed.ranks import RankGroup
from arcface_kd.errors import ConfigError, TeacherError
from arcface_kd.losses.margin import Margin
from arcface_kd.methods.base import Batch, RunContext
from arcface_kd.methods.proxylesskd import (
    ArcDistill,
    ArcDistillConfig,
    CosDistill,
    CosDistillConfig,
    ProxylessKD,
    ProxylessKDConfig,
)
from tests.reference.problems import ARCFACE, COSFACE, random_problem
from tests.reference.proxylesskd import proxylesskd_loss

CLASSES, DIMENSION = 23, 6
MARGINS = {"arcface": ARCFACE, "cosface": COSFACE, "combined": Margin(32.0, 1.1, 0.3, 0.2)}


def context(classifier: Tensor, margin: Margin = ARCFACE, **keys: Any) -> RunContext:
    return RunContext(
        num_classes=CLASSES,
        embedding_size=DIMENSION,
        margin=margin,
        ranks=RankGroup(alone=True),
        teacher_embedding_size=DIMENSION,
        teacher_classifier=classifier,
        **keys,
    )


def batch(seed: int = 0) -> tuple[Batch, Tensor]:
    """Twelve rows, two of one class and one without a label, and a classifier of all lengths."""
    problem = random_problem(seed, 12, CLASSES, DIMENSION)
    student = problem.embeddings.clone().requires_grad_()
    return Batch(student, student, problem.labels, None, [12], 0), problem.centers


def assert_is_the_twin(method: ProxylessKD, given: Batch, classifier: Tensor, margin: Margin) -> None:
    student = given.embeddings.detach().clone().requires_grad_()
    wanted = proxylesskd_loss(student, given.labels, classifier, margin)
    wanted.backward()
    (loss,) = method(given).values()
    loss.backward()
    torch.testing.assert_close(loss, wanted, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(given.embeddings.grad, student.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize("seed", range(3))
def test_a_step_equals_the_twin(margin: str, seed: int) -> None:
    given, classifier = batch(seed)
    method = ProxylessKD(ProxylessKDConfig(), context(classifier, MARGINS[margin])).double()
    assert_is_the_twin(method, given, classifier, MARGINS[margin])


@pytest.mark.parametrize("margin", MARGINS)
def test_arcdistill_and_cosdistill_bring_the_published_margins(margin: str) -> None:
    """Whatever the trainer's margin is; its logit scale stays."""
    scale = MARGINS[margin].scale
    given, classifier = batch()
    arc = ArcDistill(ArcDistillConfig(), context(classifier, MARGINS[margin]))
    assert_is_the_twin(arc, given, classifier, Margin(scale, 1.0, 0.45, 0.0))
    given, classifier = batch()
    cos = CosDistill(CosDistillConfig(), context(classifier, MARGINS[margin]))
    assert_is_the_twin(cos, given, classifier, Margin(scale, 1.0, 0.0, 0.35))
    given, classifier = batch()
    other = ArcDistill(ArcDistillConfig(margin=0.2), context(classifier, MARGINS[margin]))
    assert_is_the_twin(other, given, classifier, Margin(scale, 1.0, 0.2, 0.0))


def test_the_interclass_filter_is_the_trainers() -> None:
    _, classifier = batch()
    filtered = Margin(64.0, 1.0, 0.5, 0.0, filter_threshold=0.3)
    for kind, config in ((ArcDistill, ArcDistillConfig()), (CosDistill, CosDistillConfig())):
        assert kind(config, context(classifier, filtered)).margin.filter_threshold == 0.3


def test_the_classifier_is_frozen_and_not_saved() -> None:
    given, classifier = batch()
    before = classifier.clone()
    method = ProxylessKD(ProxylessKDConfig(), context(classifier)).double()
    method(given)["ce"].backward()
    assert list(method.parameters()) == []
    assert method.state_dict() == {}
    assert torch.equal(method.centers.weight, before)
    assert method.centers.weight.grad is None


def test_sampling_keeps_every_class_of_the_batch_in() -> None:
    given, classifier = batch()
    few = ProxylessKD(ProxylessKDConfig(), context(classifier, sample_rate=0.6, seed=1)).double()(given)["ce"]
    many = ProxylessKD(ProxylessKDConfig(), context(classifier)).double()(given)["ce"]
    assert 0 < few < many


def test_by_name_from_a_file_without_a_teacher(tmp_path: Path) -> None:
    """The teacher itself is not needed: its classifier says how many dimensions it has."""
    given, classifier = batch()
    torch.save({"weight": classifier.float()}, tmp_path / "head.pt")
    distiller = Distiller(KDConfig(methods=("proxylesskd",), classifier=str(tmp_path / "head.pt")))
    head = DistillationHead(distiller, ARCFACE, DIMENSION, CLASSES, ranks=RankGroup(alone=True))
    loss = head(given.embeddings.detach().float(), given.labels)
    wanted = proxylesskd_loss(given.embeddings.detach(), given.labels, classifier.float().double(), ARCFACE)
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-5)
    with pytest.raises(ConfigError, match="the teacher has 6 dimensions and the student 5"):
        DistillationHead(distiller, ARCFACE, 5, CLASSES, ranks=RankGroup(alone=True))


def test_without_a_classifier_the_run_stops() -> None:
    for name in ("proxylesskd", "arcdistill", "cosdistill"):
        with pytest.raises(TeacherError, match=rf"{name} needs the teacher's classifier: .* --kd-classifier"):
            Distiller(KDConfig(methods=(name,)))


def test_it_does_not_combine_with_another_classification() -> None:
    with pytest.raises(ConfigError, match="both bring a classification loss"):
        Distiller(KDConfig(methods=("proxylesskd", "arcdistill"), classifier="x.pt"))
