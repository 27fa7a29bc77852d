"""MarginDistillation as the paper writes it: a margin for each image, then ProxylessKD's twin."""

from torch import Tensor

from arcface_kd.losses.margin import Margin
from tests.reference.proxylesskd import proxylesskd_loss


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
    """Mean cross entropy of the student's rows under the teacher's classes, each with its margin."""
    margins = margins_of(teacher, labels, classifier, largest, smallest)
    return proxylesskd_loss(student, labels, classifier, [Margin(scale, 1.0, m2) for m2 in margins])
