"""The squared distance of unit embeddings: value, gradient, formats, corner cases."""

import pytest
import torch

from arcface_kd.losses.embedding_losses import squared_distance


def _rows(seed: int, batch: int = 7, dimension: int = 5) -> torch.Tensor:
    return torch.randn(batch, dimension, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


def test_it_is_the_sum_over_the_dimension_and_the_mean_over_the_batch() -> None:
    student, teacher = _rows(0).requires_grad_(), _rows(1)
    wanted = torch.stack([(s / s.norm() - t / t.norm()).square().sum() for s, t in zip(student, teacher, strict=True)])
    wanted.mean().backward()
    gradient, student.grad = student.grad, None
    met = squared_distance(student, teacher)
    met.backward()
    torch.testing.assert_close(met, wanted.mean(), rtol=1e-12, atol=0)
    torch.testing.assert_close(student.grad, gradient, rtol=1e-10, atol=1e-12)


def test_opposite_embeddings_are_four_apart_and_equal_ones_nothing() -> None:
    rows = _rows(0)
    assert squared_distance(rows, -2 * rows) == pytest.approx(4.0, abs=1e-12)
    assert squared_distance(rows, 2 * rows) == pytest.approx(0.0, abs=1e-25)


def test_near_embeddings_do_not_cancel_in_fp32() -> None:
    """At a distance of 1e-5 the cosine is 1 to the last digit of fp32."""
    student = torch.tensor([[1.0, 1e-5]])
    assert squared_distance(student, torch.tensor([[1.0, 0.0]])) == pytest.approx(1e-10, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_embeddings_are_computed_in_fp32(dtype: torch.dtype) -> None:
    student, teacher = _rows(0).to(dtype).requires_grad_(), _rows(1).to(dtype)
    met = squared_distance(student, teacher)
    met.backward()
    assert met.dtype == torch.float32
    assert student.grad is not None
    assert student.grad.dtype == dtype
    wanted = squared_distance(student.detach().double(), teacher.double())
    torch.testing.assert_close(met.detach().double(), wanted, rtol=1e-5, atol=1e-5)


def test_a_teacher_gets_no_gradient_and_an_empty_batch_is_0() -> None:
    teacher = _rows(1).requires_grad_()
    squared_distance(_rows(0).requires_grad_(), teacher).backward()
    assert teacher.grad is None
    empty = torch.empty(0, 5, requires_grad=True)
    loss = squared_distance(empty, torch.empty(0, 5))
    loss.backward()
    assert loss == 0
