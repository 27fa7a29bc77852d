"""AdaFace as the paper and its code write it: the norms' statistics, and one row after the other in dense logits."""

import math

import torch
from torch import Tensor


def target_cosine(cosine: Tensor, quality: float, m: float = 0.4) -> Tensor:
    """The target's cosine under the margin, by autograd's own arc cosine."""
    q = min(max(quality, -1.0), 1.0)
    angle = torch.clip(torch.acos(cosine) - m * q, 1e-3, math.pi - 1e-3)
    return torch.cos(angle) - (m + m * q)


def adaface_softmax(
    embeddings: Tensor,
    labels: Tensor,
    centers: Tensor,
    qualities: list[float],
    scale: float,
    *,
    index: Tensor | None = None,
    filter_threshold: float = 0.0,
) -> Tensor:
    """The loss over all classes, or those of ``index`` beside each row's own; rows of label -1 are left out."""
    losses = []
    for row, label, quality in zip(embeddings, labels.tolist(), qualities, strict=True):
        if label < 0:
            continue
        logits = []
        for number, center in enumerate(centers):
            cosine = row @ center / (row.norm() * center.norm())
            if number == label:
                own = scale * target_cosine(cosine, quality)
                logits.append(own)
            elif index is None or number in index.tolist():
                passed = filter_threshold > 0 and bool(cosine > filter_threshold)
                logits.append(scale * cosine * (0 if passed else 1))
        losses.append(torch.logsumexp(torch.stack(logits), 0) - own)
    return torch.stack(losses).mean()


class Statistics:
    """Running mean and deviation of the norms, and the qualities that follow."""

    def __init__(self) -> None:
        self.mean, self.std = 20.0, 100.0

    def qualities(self, embeddings: Tensor, labels: Tensor) -> list[float]:
        """Take in a batch and score its rows."""
        norms = [min(max(float(row.detach().norm()), 1e-3), 100.0) for row in embeddings]
        known = [norm for norm, label in zip(norms, labels.tolist(), strict=True) if label >= 0]
        if known:
            mean = sum(known) / len(known)
            self.mean = 0.01 * mean + 0.99 * self.mean
        if len(known) > 1:
            std = math.sqrt(sum((norm - mean) ** 2 for norm in known) / (len(known) - 1))
            self.std = 0.01 * std + 0.99 * self.std
        return [0.333 * (norm - self.mean) / (self.std + 1e-3) for norm in norms]


def lag(student: Tensor, teacher: Tensor, center: Tensor) -> float:
    """The fork's geometry term of one row, before its weight."""

    def cosine(a: Tensor, b: Tensor) -> float:
        return float(a @ b / (a.norm() * b.norm()))

    known = min(max(cosine(center, teacher), 1e-6), 1.0)
    return known * max(0.0, known - cosine(student, teacher))
