"""AdaDistill as the paper writes it: one sample after the other, in the number format of the inputs."""

from typing import NamedTuple

import torch
from torch import Tensor

from arcface_kd.losses.margin import Margin
from tests.reference.margin_softmax import dense_margin_softmax


class Step(NamedTuple):
    """One step's results: loss, alpha per sample and the new centers."""

    loss: Tensor
    alpha: Tensor
    centers: Tensor


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def _clip(value: float, low: float) -> float:
    return min(max(value, low), 1.0)


def adadistill_step(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    centers: Tensor,
    margin: Margin,
    *,
    alpha: str = "weighted",
    repeated: str = "mean",
) -> Step:
    """Alpha, the moving average and the loss of a gathered batch; ``centers`` stay as they are."""
    before, after = centers, centers.clone()
    alphas = torch.full((len(labels),), torch.nan, dtype=centers.dtype)
    proposals: dict[int, list[Tensor]] = {}
    for i, label in enumerate(labels.tolist()):
        if label < 0:
            continue
        f_s, f_t = student[i].detach(), teacher[i] / teacher[i].norm()
        if alpha == "plain":
            a = _clip(_cosine(f_s, f_t), 0.0)
        else:
            a = _clip(_clip(_cosine(f_s, f_t), 1e-6) * _clip(_cosine(before[label], f_t), 1e-6), 1e-6)
        alphas[i] = a
        proposals.setdefault(label, []).append(a * before[label] + (1 - a) * f_t)
    for label, proposed in proposals.items():
        after[label] = proposed[-1] if repeated == "last" else torch.stack(proposed).mean(0)
    return Step(dense_margin_softmax(student, labels, after, margin), alphas, after)
