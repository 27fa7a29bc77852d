"""TCS as one would write it down: the student's place in the teacher's space, and each step of the loss row by row."""

import torch
from torch import Tensor

from arcface_kd.losses.margin import Margin
from tests.reference.proxylesskd import proxylesskd_loss


def unfolded_coordinates(features: Tensor, matrix: Tensor, offset: Tensor, mean: Tensor, axes: Tensor) -> Tensor:
    """``(f_s - mu) V`` for the student's place ``f_s`` in the teacher's space, which a linear map leads to.

    ``features`` (B, H) are what the student's last layers are given, ``matrix`` (k, H) and ``offset`` (k,) lead to its
    distances along the orthonormal axes (k, Dt).
    """
    rows = []
    for feature in features:
        place = mean + axes.T @ (matrix @ feature + offset)
        rows.append(axes @ (place - mean))
    return torch.stack(rows)


def classification(student: Tensor, labels: Tensor, classifier: Tensor, margin: Margin, mask: Tensor) -> Tensor:
    """Margin softmax of coordinates (B, D) along the axes that the mask (D,) leaves."""
    return proxylesskd_loss(student * mask, labels, classifier * mask.detach(), margin)


def mimic_distance(student: Tensor, teacher: Tensor, mean: Tensor, axes: Tensor, mask: Tensor) -> Tensor:
    """Mean over the rows of the squared distance to the teacher along the axes that the mask leaves."""
    total = student.new_zeros(())
    for row, embedding in zip(student, teacher, strict=True):
        for number, axis in enumerate(axes):
            if mask[number] > 0:
                total = total + (row[number] - axis @ (embedding - mean)) ** 2
    return total / len(student)


def step_importance(student: Tensor, labels: Tensor, classifier: Tensor, margin: Margin, mask: Tensor) -> Tensor:
    """What a step adds to each axis's importance: (D,), its sum is 1."""
    mask = mask.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(classification(student.detach(), labels, classifier, margin, mask), mask)
    score = (gradient * mask).abs().detach()
    return score / score.sum()
