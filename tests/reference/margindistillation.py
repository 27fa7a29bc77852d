"""MarginDistillation as the paper writes it: a margin for each image, then one row after the other."""

from dataclasses import replace

import torch
from torch import Tensor

from arcface_kd.losses.margin import Margin
from tests.reference.margin_softmax import target_cosine


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return a @ b / (a.norm() * b.norm())


def margins_of(teacher: Tensor, labels: Tensor, classifier: Tensor, largest: float, smallest: float) -> list[float]:
    """A margin for each row; rows without a label have a distance of 0."""
    distances = [
        max(float(_cosine(row, classifier[label])), 0.0) if label >= 0 else 0.0
        for row, label in zip(teacher, labels.tolist(), strict=True)
    ]
    farthest = max(distances)
    if farthest == 0:
        return [smallest] * len(distances)
    return [(largest - smallest) / farthest * distance + smallest for distance in distances]


def margindistillation_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    classifier: Tensor,
    scale: float,
    largest: float = 0.5,
    smallest: float = 0.2,
) -> Tensor:
    """Mean cross entropy of the student's rows under the teacher's classes.

    Args:
        student: (B, D).
        teacher: (B, D).
        labels: (B,), -1 for none.
        classifier: (C, D), of the whole data set.
        scale: the logit scale.
        largest: M max.
        smallest: M min.
    """
    losses = []
    margins = margins_of(teacher, labels, classifier, largest, smallest)
    for row, label, m2 in zip(student, labels.tolist(), margins, strict=True):
        if label < 0:
            continue
        margin = replace(Margin(scale), m2=m2)
        logits = []
        for number, center in enumerate(classifier):
            cosine = _cosine(row, center)
            logits.append(scale * (target_cosine(cosine, margin) if number == label else cosine))
        losses.append(torch.stack(logits).logsumexp(0) - logits[label])
    return torch.stack(losses).mean()
