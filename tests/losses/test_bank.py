"""The softmax over a bank and the cosines with its nearest rows against the loops over rows and entries."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from arcface_kd.losses.bank import bank_cosines, bank_divergence, nearest_difference
from tests.reference import bank as twin
from tests.reference.compare import assert_equal, differentiated

LOSSES = {
    "divergence": (bank_divergence, twin.bank_divergence),
    "nearest": (nearest_difference, twin.nearest_difference),
}


def _problem(rows: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Student (B, 4) and teacher (B, 4) of any norms, and a bank (7, 4) with the teacher's first row in it."""
    generator = torch.Generator().manual_seed(rows)
    student, teacher = (torch.randn(rows, 4, generator=generator, dtype=torch.float64) * 2 for _ in range(2))
    bank = normalize(torch.randn(7, 4, generator=generator, dtype=torch.float64))
    if rows:
        bank[3] = normalize(teacher[0], dim=0)
    return student, teacher, bank


def _ours(name: str, student: Tensor, teacher: Tensor, bank: Tensor, knob: float) -> Tensor:
    loss: Callable[..., Tensor] = LOSSES[name][0]
    return loss(bank_cosines(student, bank), bank_cosines(teacher, bank), knob) / max(1, len(student))


@pytest.mark.parametrize(
    ("name", "knob"), [("divergence", 0.07), ("divergence", 1.0), ("nearest", 1), ("nearest", 3), ("nearest", 99)]
)
def test_loss_and_gradient_equal_the_twin(name: str, knob: float) -> None:
    student, teacher, bank = _problem()
    naive: Callable[..., Tensor] = LOSSES[name][1]
    wanted = differentiated(lambda rows: naive(rows, teacher, bank, knob), student)
    assert_equal(differentiated(lambda rows: _ours(name, rows, teacher, bank, knob), student), wanted)
    assert wanted[1].abs().max() > 1e-4
    narrow = differentiated(lambda rows: _ours(name, rows, teacher, bank, knob), student.float())
    torch.testing.assert_close(narrow[0].double(), wanted[0], rtol=1e-4, atol=1e-6)
    assert (narrow[1].double() - wanted[1]).norm() < 1e-3 * wanted[1].norm()


@pytest.mark.parametrize("name", LOSSES)
def test_the_teacher_itself_has_no_loss_and_gets_no_gradient(name: str) -> None:
    _, teacher, bank = _problem()
    knob = 0.07 if name == "divergence" else 2
    assert _ours(name, 3 * teacher, teacher, bank, knob).abs() < 1e-12
    assert not _ours(name, teacher, teacher.clone().requires_grad_(), bank, knob).requires_grad


@pytest.mark.parametrize(("name", "knob", "rows"), [("divergence", 1, 0), ("nearest", 1, 0), ("divergence", 1e-4, 5)])
def test_no_rows_and_a_sharp_softmax_are_finite(name: str, knob: float, rows: int) -> None:
    student, teacher, bank = (each.float() for each in _problem(rows))
    found = differentiated(lambda s: _ours(name, s, teacher, bank, knob), student)
    assert all(each.isfinite().all() for each in found)


@pytest.mark.parametrize("name", LOSSES)
def test_an_enclosing_autocast_changes_nothing(name: str) -> None:
    student, teacher, bank = (each.float() for each in _problem())
    wanted = _ours(name, student, teacher, bank, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(_ours(name, student, teacher, bank, 1), wanted)
