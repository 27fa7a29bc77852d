"""Relative distances and angles against the loops over pairs and triples."""

import weakref

import pytest
import torch
from torch import Tensor

from arcface_kd.losses import embedding_losses as relation
from arcface_kd.losses.embedding_losses import angle_loss, distance_loss, inner_products
from tests.reference.compare import assert_equal, differentiated
from tests.reference.rkd import rkd_angle, rkd_distance

LOSSES = {"distance": (distance_loss, rkd_distance), "angle": (angle_loss, rkd_angle)}
ALL = slice(None)


class _Held:
    """What the graph keeps of a tensor; gone with the graph."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _problem(seed: int, batch: int = 6) -> tuple[Tensor, Tensor]:
    """Student (B, 4) and teacher (B, 7); rows 1 and 2 of both are one image."""
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(batch, 4, generator=generator, dtype=torch.float64) * 2
    teacher = torch.randn(batch, 7, generator=generator, dtype=torch.float64)
    if batch > 2:
        student[2], teacher[2] = student[1], teacher[1]
    return student, teacher


def _ours(name: str, student: Tensor, teacher: Tensor, rows: slice = ALL) -> tuple[Tensor, ...]:
    return differentiated(lambda s: LOSSES[name][0](s, teacher, rows), student)


@pytest.mark.parametrize("batch", [1, 2, 5, 6])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient_equal_the_twin(name: str, batch: int) -> None:
    student, teacher = _problem(batch, batch)
    met = _ours(name, student, teacher)
    if batch == 1:
        assert not any(each.any() for each in met)
        return
    wanted = differentiated(lambda s: LOSSES[name][1](s, teacher), student)
    assert_equal(met, wanted)
    if batch > 2:
        assert wanted[1].abs().max() > 1e-4


def test_differences_beyond_one_are_linear() -> None:
    """Two clusters for the student, one for the teacher: relative distances differ by more than Huber's bend."""
    student = torch.tensor([[1.0, 0.0], [1.0, 0.02], [1.0, -0.02], [1.0, 0.01], [-1.0, 0.0]], dtype=torch.float64)
    teacher = torch.eye(5, dtype=torch.float64)
    assert_equal(_ours("distance", student, teacher), differentiated(lambda s: rkd_distance(s, teacher), student))
    gram = [relation._relative_distances(inner_products(rows)) for rows in (student, teacher)]
    assert (gram[0] - gram[1]).abs().max() > 1


@pytest.mark.parametrize("name", LOSSES)
def test_parts_of_the_rows_add_up_gradients_too(name: str) -> None:
    student, teacher = _problem(3)
    parts = [_ours(name, student, teacher, rows) for rows in (slice(0, 2), slice(2, 2), slice(2, 6))]
    together = tuple(torch.stack(each).sum(0) for each in zip(*parts, strict=True))
    assert_equal(together, _ours(name, student, teacher), 1e-13)
    assert (parts[1][1] == 0).all()


@pytest.mark.parametrize("chunk", [1, 4, None])
def test_chunks_change_nothing(chunk: int | None) -> None:
    student, teacher = _problem(4)
    met, wanted = (differentiated(lambda s, c=c: angle_loss(s, teacher, ALL, c), student) for c in (chunk, 6))
    assert_equal(met, wanted, 1e-13)


@pytest.mark.parametrize("name", LOSSES)
def test_a_student_that_is_the_teacher_turned_has_no_loss(name: str) -> None:
    """Relations do not ask where the rows are: a rotation, and another length of the vectors, change nothing."""
    _, teacher = _problem(5)
    rotation, _ = torch.linalg.qr(torch.randn(7, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    assert LOSSES[name][0](3 * teacher @ rotation, teacher, ALL) < 1e-24
    assert LOSSES[name][0](teacher.flip(0), teacher, ALL) > 1e-3


@pytest.mark.parametrize("name", LOSSES)
def test_fp32_is_near_the_truth_and_one_point_is_finite(name: str) -> None:
    student, teacher = _problem(6, 12)
    truth, met = _ours(name, student, teacher), _ours(name, student.float(), teacher.float())
    torch.testing.assert_close(met[0].double(), truth[0], rtol=1e-4, atol=1e-6)
    assert (met[1].double() - truth[1]).norm() < 1e-3 * truth[1].norm()
    assert all(each.isfinite().all() for each in _ours(name, torch.ones(4, 3), teacher[:4].float()))


@pytest.mark.parametrize("name", LOSSES)
def test_an_enclosing_autocast_changes_nothing(name: str) -> None:
    student, teacher = (each.float() for each in _problem(7, 8))
    wanted = LOSSES[name][0](student, teacher, ALL)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(LOSSES[name][0](student, teacher, ALL), wanted)


def test_no_chunk_of_angles_outlives_the_forward_pass() -> None:
    student, teacher = (each.float() for each in _problem(8, 40))
    kept: weakref.WeakSet[_Held] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Held:
        held = _Held(tensor)
        kept.add(held)
        return held

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        loss = angle_loss(student.requires_grad_(), teacher, ALL)
    assert max(held.tensor.numel() for held in kept) == 40 * 40
    loss.backward()
