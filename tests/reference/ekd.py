"""EKD as the paper writes it: lists of pairs, sorted; thresholds that are read off and averaged."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

RATES = (10, 100, 1_000, 10_000, 100_000, 1_000_000)


class Thresholds(NamedTuple):
    """Of the student and the teacher, one for each rate."""

    student: list[float]
    teacher: list[float]


class Step(NamedTuple):
    """One step's weighted terms and the thresholds behind it."""

    positive: Tensor
    negative: Tensor
    thresholds: Thresholds | None


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return a @ b / (a.norm() * b.norm())


def _rank(cosine: Tensor, thresholds: list[float]) -> Tensor:
    counted = [1 / (1 + torch.exp(-(cosine - threshold) / 0.01)) for threshold in thresholds]
    return torch.stack(counted).sum()


def ekd_step(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    before: Thresholds | None = None,
    *,
    hardest: int = 2000,
    momentum: float = 0.01,
    weights: tuple[float, float] = (0.02, 0.01),
) -> Step:
    """One step over a whole (gathered) batch; ``before`` are the thresholds before it, None in the first."""
    positive: list[tuple[Tensor, Tensor]] = []
    negative: list[tuple[Tensor, Tensor]] = []
    for i in range(len(labels)):
        for j in range(i + 1, len(labels)):
            if labels[i] < 0 or labels[j] < 0:
                continue
            pair = (_cosine(student[i], student[j]), _cosine(teacher[i], teacher[j]))
            (positive if labels[i] == labels[j] else negative).append(pair)
    after = before
    if negative:
        met = [sorted((float(pair[side].detach()) for pair in negative), reverse=True) for side in (0, 1)]
        read = [[cosines[math.floor(len(negative) / rate)] for rate in RATES] for cosines in met]
        if before is None:
            after = Thresholds(*read)
        else:
            after = Thresholds(
                *(
                    [(1 - momentum) * old + momentum * new for old, new in zip(olds, news, strict=True)]
                    for olds, news in zip(before, read, strict=True)
                )
            )
    at = after or Thresholds([0.0] * len(RATES), [0.0] * len(RATES))
    hard = sorted(negative, key=lambda pair: float(pair[0].detach()), reverse=True)[:hardest]

    def difference(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
        if not pairs:
            return student.sum() * 0
        return torch.stack([(_rank(s, at.student) - _rank(t, at.teacher)) ** 2 for s, t in pairs]).mean()

    return Step(weights[0] * difference(positive), weights[1] * difference(hard), after)
