"""align_scale against the naive twin, values and gradients; what it leaves alone and what it refuses."""

import pytest
import torch
from torch import Tensor

from arcface_kd.losses.map_alignment import align_scale
from tests.reference.compare import assert_equal, differentiated
from tests.reference.crosskd import align_scale as align_scale_twin


def maps(seed: int, *shape: int) -> Tensor:
    """Channels of all means and deviations."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    scale = torch.rand(1, shape[1], 1, 1, generator=generator, dtype=torch.float64) * 5
    return values * scale + torch.randn(1, shape[1], 1, 1, generator=generator, dtype=torch.float64) * 3


@pytest.mark.parametrize(("batch", "other"), [(4, 4), (1, 1), (3, 5)])
def test_values_and_gradients_are_the_twin_s(batch: int, other: int) -> None:
    """Through the student's mean and deviation; the teacher gets none."""
    goal, teacher = maps(9, batch, 5, 3, 2), maps(1, other, 5, 4, 3)
    assert not align_scale(goal, teacher.clone().requires_grad_()).requires_grad
    met, wanted = (
        differentiated(lambda student, align=align: (align(student, teacher) * goal).sum(), maps(0, batch, 5, 3, 2))
        for align in (align_scale, align_scale_twin)
    )
    assert_equal(met, wanted)
    torch.testing.assert_close(align_scale(goal, teacher), align_scale_twin(goal, teacher), rtol=1e-10, atol=1e-10)
    assert wanted[1].abs().max() > 1e-3


def test_the_student_gets_the_teacher_s_statistics_whatever_its_own() -> None:
    student, teacher = maps(0, 6, 4, 3, 3), maps(1, 6, 4, 3, 3)
    met = align_scale(student, teacher)
    torch.testing.assert_close(met.mean((0, 2, 3)), teacher.mean((0, 2, 3)))
    deviations = [each.transpose(0, 1).flatten(1).std(1) for each in (met, teacher)]
    torch.testing.assert_close(*deviations, rtol=1e-5, atol=1e-5)
    # What is the same but for scale and offset is the same afterwards.
    torch.testing.assert_close(align_scale(student * 7 - 3, teacher), met, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_maps_are_aligned_in_float32(dtype: torch.dtype) -> None:
    student, teacher = maps(0, 4, 5, 3, 3).to(dtype), maps(1, 4, 5, 3, 3).to(dtype)
    met = align_scale(student, teacher)
    assert met.dtype == torch.float32
    torch.testing.assert_close(met.double(), align_scale_twin(student.double(), teacher.double()), rtol=1e-4, atol=1e-4)


def test_a_channel_with_one_value_everywhere_and_an_empty_batch_are_finite() -> None:
    """A dead channel of a student at its beginning."""
    dead = maps(0, 2, 3, 2, 2)
    dead[:, 1] = 0.5
    for student in (dead, maps(0, 0, 3, 2, 2)):
        teacher = maps(1, len(student), 3, 2, 2)
        assert align_scale(student, teacher).shape == student.shape
        found = differentiated(lambda s, t=teacher: align_scale(s, t).square().sum(), student)
        assert all(each.isfinite().all() for each in found)


@pytest.mark.parametrize(
    ("student", "teacher", "said"),
    [
        ((2, 3, 4), (2, 3, 4, 4), "wanted"),
        ((2, 3, 4, 4), (2, 5, 4, 4), r"\(2, 3, 4, 4\) and \(2, 5, 4, 4\)"),
        ((1, 3, 1, 1), (1, 3, 1, 1), "one value in a channel"),
    ],
)
def test_maps_that_cannot_be_aligned_are_refused(student: list[int], teacher: list[int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        align_scale(torch.randn(student), torch.randn(teacher))
