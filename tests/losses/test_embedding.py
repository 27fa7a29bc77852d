"""The squared distance of unit embeddings: value, gradient, formats, corner cases."""

import pytest
import torch
from torch import Tensor

from arcface_kd.losses.embedding_losses import squared_distance
from tests.reference.compare import assert_equal, differentiated


def _rows(seed: int, batch: int = 7, dimension: int = 5) -> Tensor:
    return torch.randn(batch, dimension, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3


def test_it_is_the_sum_over_the_dimension_and_the_mean_over_the_batch() -> None:
    teacher = _rows(1)

    def by_rows(student: Tensor) -> Tensor:
        rows = zip(student, teacher, strict=True)
        return torch.stack([(s / s.norm() - t / t.norm()).square().sum() for s, t in rows]).mean()

    assert_equal(differentiated(lambda s: squared_distance(s, teacher), _rows(0)), differentiated(by_rows, _rows(0)))


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
    student, teacher = _rows(0).to(dtype), _rows(1).to(dtype)
    met, gradient = differentiated(lambda s: squared_distance(s, teacher), student)
    assert (met.dtype, gradient.dtype) == (torch.float32, dtype)
    torch.testing.assert_close(met.double(), squared_distance(student.double(), teacher.double()), rtol=1e-5, atol=1e-5)


def test_a_teacher_gets_no_gradient_and_an_empty_batch_is_0() -> None:
    assert not squared_distance(_rows(0), _rows(1).requires_grad_()).requires_grad
    loss, gradient = differentiated(lambda s: squared_distance(s, torch.empty(0, 5)), torch.empty(0, 5))
    assert loss == 0
    assert gradient.shape == (0, 5)
