"""Grouped KD as its published code counts and weighs it, row by row in probabilities (arXiv 2304.04462)."""

import torch
from torch import Tensor


def batch_group_size(logits: Tensor, mass: float, step: int) -> int:
    """K of the published adaptive group: classes of the batch's mean softmax, the largest first, until ``mass``."""
    mean = logits.softmax(1).mean(0)
    held = mean.sort(descending=True).values.cumsum(0)
    return next(size for size in range(1, logits.shape[1] + 1, step) if held[size - 1] >= mass)


def grouped_kd(
    student: Tensor, teacher: Tensor, labels: Tensor, size: int, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(primary, binary, secondary) of (B, C) logits; the group is the ``size`` highest of the student, target first."""
    terms = []
    for z, wanted, label in zip(student, teacher, labels, strict=True):
        others = [each for each in z.detach().argsort(descending=True).tolist() if each != label]
        inside, outside = torch.tensor([int(label), *others[: size - 1]]), torch.tensor(others[size - 1 :])
        p, q = (wanted / temperature).softmax(0), (z / temperature).softmax(0)
        groups = [(p[group], q[group]) for group in (inside, outside)]
        primary, secondary = ((a / a.sum() * ((a / a.sum()).log() - (b / b.sum()).log())).sum() for a, b in groups)
        binary = sum(a.sum() * (a.sum() / b.sum()).log() for a, b in groups)
        terms.append(torch.stack([primary, torch.as_tensor(binary), secondary]))
    primary, binary, secondary = temperature**2 * torch.stack(terms).mean(0)
    return primary, binary, secondary
