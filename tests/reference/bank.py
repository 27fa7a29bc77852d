"""The bank's two terms as their formulas read: one row and one entry after the other."""

import math

import torch
from torch import Tensor


def _cosines(row: Tensor, bank: Tensor) -> list[Tensor]:
    return [row @ entry / row.norm() for entry in bank]


def _softmax(values: list[Tensor]) -> list[Tensor]:
    total = torch.stack([value.exp() for value in values]).sum()
    return [value.exp() / total for value in values]


def bank_divergence(student: Tensor, teacher: Tensor, bank: Tensor, temperature: float) -> Tensor:
    """The mean over rows of KL(teacher || student), unweighted, of (B, D) and (B, D) over (R, D)."""
    found = []
    for s, t in zip(student, teacher, strict=True):
        of_student = _softmax([cosine / temperature for cosine in _cosines(s, bank)])
        of_teacher = _softmax([cosine / temperature for cosine in _cosines(t, bank)])
        terms = [p.detach() * (math.log(p) - q.log()) for p, q in zip(of_teacher, of_student, strict=True)]
        found.append(torch.stack(terms).sum())
    return torch.stack(found).mean()


def nearest_difference(student: Tensor, teacher: Tensor, bank: Tensor, nearest: int) -> Tensor:
    """The mean over rows of the mean |cos_s - cos_t| over the teacher's nearest entries, unweighted."""
    found = []
    for s, t in zip(student, teacher, strict=True):
        of_student, of_teacher = _cosines(s, bank), [cosine.detach() for cosine in _cosines(t, bank)]
        order = sorted(range(len(bank)), key=lambda place: -float(of_teacher[place]))[:nearest]
        found.append(torch.stack([(of_student[place] - of_teacher[place]).abs() for place in order]).mean())
    return torch.stack(found).mean()
