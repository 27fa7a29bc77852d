"""AdaFace's margin: psi and its slope, the chunked pass and distilled logits against the dense twin."""

import pytest
import torch
from torch import Tensor

from arcface_kd.losses.class_weights import ClassWeights
from arcface_kd.losses.divergences import Distillation
from arcface_kd.losses.logit_distillation import Logits, logit_distillation, teacher_logits
from arcface_kd.losses.margin import AdaFaceMargin, Margin
from arcface_kd.losses.margin_softmax import margin_softmax
from tests.reference.adaface import adaface_softmax, target_cosine
from tests.reference.compare import assert_equal, differentiated
from tests.reference.problems import random_problem

MARGIN = AdaFaceMargin(64.0)
# Clipped qualities and clipped angles among them.
QUALITY = torch.tensor([-3.0, 1.2, 0.0, 0.5, -0.4, 0.9, 0.1, -1.0, 0.3, 2.0, -0.2, 0.7], dtype=torch.float64)


@pytest.mark.parametrize("quality", [-2.0, -1.0, -0.3, 0.0, 0.5, 1.0])
def test_psi_and_slope_equal_the_formula_and_its_autograd_derivative(quality: float) -> None:
    cosine = torch.linspace(-0.999, 0.999, 2001, dtype=torch.float64, requires_grad=True)
    wanted = target_cosine(cosine, quality)
    (slope_wanted,) = torch.autograd.grad(wanted.sum(), cosine)
    psi, slope = MARGIN.target(cosine.detach(), MARGIN.rows(torch.full((2001,), quality, dtype=torch.float64)))
    torch.testing.assert_close(psi, wanted.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(slope, slope_wanted, rtol=1e-10, atol=1e-10)
    assert bool((slope == 0).any()) == (quality != 0)


@pytest.mark.parametrize("quality", [-1.0, 0.0, 1.0])
def test_at_the_class_center_and_opposite_nothing_is_infinite(quality: float) -> None:
    found = MARGIN.target(torch.tensor([1.0, -1.0, 1.0 + 1e-7]), MARGIN.rows(torch.full((3,), quality)))
    assert torch.stack(found).isfinite().all()


def test_a_quality_of_zero_is_cosface_and_none_is_refused() -> None:
    problem = random_problem(seed=2)
    met = margin_softmax(*problem, MARGIN, row_m2=torch.zeros(12))
    torch.testing.assert_close(met, margin_softmax(*problem, Margin(64.0, 1.0, 0.0, 0.4)), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="row_m2"):
        margin_softmax(*problem, MARGIN)


@pytest.mark.parametrize("chunk", [7, None])
@pytest.mark.parametrize("threshold", [0.0, 0.2])
@pytest.mark.parametrize("index", [None, torch.arange(0, 23, 2)], ids=["all", "sampled"])
def test_loss_and_gradients_equal_the_dense_twin(index: Tensor | None, threshold: float, chunk: int | None) -> None:
    (embeddings, labels, centers), margin = random_problem(seed=1), AdaFaceMargin(32.0, filter_threshold=threshold)
    row_m2, qualities = margin.rows(QUALITY), QUALITY.tolist()
    met, wanted = (
        differentiated(loss, embeddings, centers)
        for loss in (
            lambda e, c: margin_softmax(e, labels, c, margin, index=index, chunk=chunk, row_m2=row_m2),
            lambda e, c: adaface_softmax(e, labels, c, qualities, 32.0, index=index, filter_threshold=threshold),
        )
    )
    assert_equal(met, wanted)
    assert wanted[1].abs().max() > 1e-3


@pytest.mark.parametrize("logits", ["plain", "margin"])
def test_beside_distilled_logits_it_is_the_same_margin(logits: Logits) -> None:
    """The cross entropy, and a KL of 0 for a teacher that is the student."""
    embeddings, labels, centers = random_problem(seed=1)
    weights, row_m2 = ClassWeights(centers), MARGIN.rows(QUALITY)
    teacher = teacher_logits(embeddings, labels, weights, 64.0, 4.0)

    def terms(rows: Tensor) -> Distillation:
        return logit_distillation(rows, labels, weights, teacher, MARGIN, logits=logits, row_m2=row_m2)

    met, wanted = (
        differentiated(loss, embeddings)
        for loss in (lambda e: terms(e).ce, lambda e: adaface_softmax(e, labels, centers, QUALITY.tolist(), 64.0))
    )
    assert_equal(met, wanted)
    # Both sides have the margin of their row, or neither.
    assert abs(float(terms(embeddings).primary)) < 1e-12
