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
from arcface_kd.errors import ConfigError
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
from tests.reference.compare import assert_same_terms
from tests.reference.problems import ARCFACE, COMBINED, COSFACE, random_problem
from tests.reference.proxylesskd import proxylesskd_loss

CLASSES, DIMENSION = 23, 6
MARGINS = {"arcface": ARCFACE, "cosface": COSFACE, "combined": COMBINED}


def context(classifier: Tensor, margin: Margin = ARCFACE, **keys: Any) -> RunContext:
    ranks = RankGroup(alone=True)
    return RunContext(CLASSES, DIMENSION, margin, ranks, DIMENSION, teacher_classifier=classifier, **keys)


def batch(seed: int = 0) -> tuple[Batch, Tensor]:
    """Twelve rows, two of one class and one without a label, and a classifier of all lengths."""
    problem = random_problem(seed, 12, CLASSES, DIMENSION)
    student = problem.embeddings.clone().requires_grad_()
    return Batch(student, student, problem.labels, None, [12], 0), problem.centers


@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize("seed", range(3))
def test_a_step_equals_the_twin(margin: str, seed: int) -> None:
    given, classifier = batch(seed)
    method = ProxylessKD(ProxylessKDConfig(), context(classifier, MARGINS[margin])).double()
    wanted = proxylesskd_loss(given.embeddings, given.labels, classifier, MARGINS[margin])
    assert_same_terms(method(given), {"ce": wanted}, given.embeddings)
    assert list(method.parameters()) == []
    assert method.state_dict() == {}, "the classifier is frozen and not saved"


@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize(
    ("kind", "config", "m2", "m3"),
    [
        (ArcDistill, ArcDistillConfig(), 0.45, 0.0),
        (CosDistill, CosDistillConfig(), 0.0, 0.35),
        (ArcDistill, ArcDistillConfig(margin=0.2), 0.2, 0.0),
    ],
)
def test_arcdistill_and_cosdistill_bring_the_published_margins(
    margin: str, kind: Any, config: Any, m2: float, m3: float
) -> None:
    """Whatever the trainer's margin is; its logit scale and its interclass filter stay."""
    given, classifier = batch()
    own = Margin(MARGINS[margin].scale, 1.0, m2, m3)
    wanted = proxylesskd_loss(given.embeddings, given.labels, classifier, own)
    assert_same_terms(kind(config, context(classifier, MARGINS[margin]))(given), {"ce": wanted}, given.embeddings)
    filtered = Margin(64.0, 1.0, 0.5, 0.0, filter_threshold=0.3)
    assert kind(config, context(classifier, filtered)).margin.filter_threshold == 0.3


def test_sampling_keeps_every_class_of_the_batch_in() -> None:
    given, classifier = batch()
    cases: tuple[dict[str, Any], ...] = ({"sample_rate": 0.6, "seed": 1}, {})
    few, many = (ProxylessKD(ProxylessKDConfig(), context(classifier, **keys)).double()(given)["ce"] for keys in cases)
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
