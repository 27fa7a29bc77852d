"""MarginDistillation against the naive twin, and its margins in corner cases."""

import pytest
import torch
from torch import Tensor

from arcface_kd.distributed.ranks import RankGroup
from arcface_kd.losses.margin import Margin
from arcface_kd.methods.base import Batch, RunContext
from arcface_kd.methods.margindistillation import MarginDistillation, MarginDistillationConfig, distilled_margins
from arcface_kd.methods.proxylesskd import ArcDistill, ArcDistillConfig
from tests.reference.compare import assert_same_terms
from tests.reference.margindistillation import margindistillation_loss, margins_of
from tests.reference.problems import random_problem

CLASSES, DIMENSION = 23, 6


def make(classifier: Tensor, margin: Margin | None = None, **knobs: float) -> MarginDistillation:
    context = RunContext(
        *(CLASSES, DIMENSION, margin or Margin(64.0, 1.0, 0.3, 0.1), RankGroup(alone=True)),
        teacher_embedding_size=DIMENSION,
        teacher_classifier=classifier,
    )
    return MarginDistillation(MarginDistillationConfig(**knobs), context)


def batch(seed: int) -> tuple[Batch, Tensor, Tensor]:
    """The batch, its teacher's embeddings and the classifier, which the teacher knows more or less."""
    problem, other = random_problem(seed, 12, CLASSES, DIMENSION), random_problem(seed + 100, 12, CLASSES, DIMENSION)
    teacher = other.embeddings + 2 * problem.centers[problem.labels.clamp_min(0)]
    student = problem.embeddings.requires_grad_()
    return Batch(student, student, problem.labels, teacher, [12], 0), teacher, problem.centers


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("largest", "smallest"), [(0.5, 0.2), (1.2, 0.0), (0.4, 0.4)])
def test_a_step_equals_the_twin_whatever_the_trainer_s_margin(seed: int, largest: float, smallest: float) -> None:
    given, teacher, classifier = batch(seed)
    wanted = margindistillation_loss(given.embeddings, teacher, given.labels, classifier, 64.0, largest, smallest)
    met = make(classifier, largest=largest, smallest=smallest)(given)
    assert_same_terms(met, {"ce": wanted}, given.embeddings)


def test_equal_margins_are_arcdistill() -> None:
    given, _, classifier = batch(0)
    method = make(classifier, largest=0.45, smallest=0.45)
    torch.testing.assert_close(method(given)["ce"], ArcDistill(ArcDistillConfig(0.45), method.context)(given)["ce"])


def test_the_margins_are_the_published_line_and_are_observed() -> None:
    given, teacher, classifier = batch(1)
    method = make(classifier)
    assert method.observations() == {}
    margins = method.row_margins(given, method.context.shard.local(given.labels))
    wanted = torch.tensor(margins_of(teacher, given.labels, classifier, 0.5, 0.2), dtype=torch.float64)
    torch.testing.assert_close(margins, wanted)
    assert margins.max() == pytest.approx(0.5)
    assert margins.min() >= 0.2
    known = margins[given.labels >= 0]
    seen = method.observations()
    torch.testing.assert_close(seen["margin_mean"], known.mean())
    assert known.min() <= seen["margin_q10"] < seen["margin_q90"] <= known.max()


@pytest.mark.parametrize("cosine", [[], [-0.2, -1.0], [0.0], [0.0, 1e-30]])
def test_margins_stay_in_range_where_no_image_is_near_its_class(cosine: list[float]) -> None:
    margins = distilled_margins(torch.tensor(cosine), 0.5, 0.2)
    assert ((margins >= 0.2) & (margins <= 0.5 + 1e-6)).all()
    assert margins.shape == (len(cosine),)


def test_logit_scale_and_filter_are_the_trainer_s() -> None:
    margin = make(batch(0)[2], Margin(30.0, 1.2, 0.1, 0.3, filter_threshold=0.3)).margin
    assert (margin.scale, margin.m1, margin.m3, margin.filter_threshold) == (30.0, 1.0, 0.0, 0.3)
