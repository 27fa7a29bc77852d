"""AdaFace's margin: psi and its slope, the chunked pass and distilled logits against the dense twin."""

import pytest
import torch
from torch import Tensor

from arcface_kd.losses.class_weights import ClassWeights
from arcface_kd.losses.logit_distillation import Logits, logit_distillation, teacher_logits
from arcface_kd.losses.margin import AdaFaceMargin, Margin
from arcface_kd.losses.margin_softmax import margin_softmax
from tests.reference.adaface import adaface_softmax, target_cosine
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


def test_at_the_class_center_and_opposite_nothing_is_infinite() -> None:
    cosine = torch.tensor([1.0, -1.0, 1.0 + 1e-7])
    for quality in (-1.0, 0.0, 1.0):
        psi, slope = MARGIN.target(cosine, MARGIN.rows(torch.full((3,), quality)))
        assert torch.isfinite(psi).all()
        assert torch.isfinite(slope).all()


def test_a_quality_of_zero_is_cosface() -> None:
    problem = random_problem(seed=2)
    met = margin_softmax(problem.embeddings, problem.labels, problem.centers, MARGIN, row_m2=torch.zeros(12))
    wanted = margin_softmax(problem.embeddings, problem.labels, problem.centers, Margin(64.0, 1.0, 0.0, 0.4))
    torch.testing.assert_close(met, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk", [7, None])
@pytest.mark.parametrize("threshold", [0.0, 0.2])
@pytest.mark.parametrize("sampled", [False, True])
def test_loss_and_gradients_equal_the_dense_twin(sampled: bool, threshold: float, chunk: int | None) -> None:
    problem, index = random_problem(seed=1), torch.arange(0, 23, 2) if sampled else None
    margin = AdaFaceMargin(32.0, filter_threshold=threshold)
    row_m2 = margin.rows(QUALITY)
    met, wanted = (
        _differentiated(problem.embeddings, problem.centers, loss)
        for loss in (
            lambda e, c: margin_softmax(e, problem.labels, c, margin, index=index, chunk=chunk, row_m2=row_m2),
            lambda e, c: adaface_softmax(
                e, problem.labels, c, QUALITY.tolist(), 32.0, index=index, filter_threshold=threshold
            ),
        )
    )
    for a, b in zip(met, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert wanted[1].abs().max() > 1e-3


def _differentiated(embeddings: Tensor, centers: Tensor, loss) -> tuple[Tensor, ...]:  # type: ignore[no-untyped-def]
    inputs = [embeddings.clone().requires_grad_(), centers.clone().requires_grad_()]
    value = loss(*inputs)
    return value.detach(), *torch.autograd.grad(value, inputs)


@pytest.mark.parametrize("logits", ["plain", "margin"])
def test_beside_distilled_logits_it_is_the_same_margin(logits: Logits) -> None:
    """The cross entropy, and a KL of 0 for a teacher that is the student."""
    problem, weights = random_problem(seed=1), random_problem(seed=1).centers
    row_m2 = MARGIN.rows(QUALITY)
    teacher = teacher_logits(problem.embeddings, problem.labels, ClassWeights(weights), 64.0, 4.0)
    embeddings = problem.embeddings.clone().requires_grad_()
    found = logit_distillation(
        embeddings, problem.labels, ClassWeights(weights), teacher, MARGIN, logits=logits, row_m2=row_m2
    )
    (met,) = torch.autograd.grad(found.ce, embeddings, retain_graph=True)
    loss, wanted, _ = _differentiated(
        problem.embeddings, weights, lambda e, c: adaface_softmax(e, problem.labels, c, QUALITY.tolist(), 64.0)
    )
    torch.testing.assert_close(found.ce.detach(), loss, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(met, wanted, rtol=1e-10, atol=1e-10)
    # Both sides have the margin of their row, or neither.
    assert abs(float(found.primary.detach())) < 1e-12


def test_it_wants_a_margin_for_each_row() -> None:
    problem = random_problem(seed=1)
    with pytest.raises(ValueError, match="row_m2"):
        margin_softmax(problem.embeddings, problem.labels, problem.centers, MARGIN)
