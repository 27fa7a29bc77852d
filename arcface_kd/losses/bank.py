r"""Losses against a bank of fixed unit vectors: KL of the softmax over it, difference of the nearest cosines.

Both compare (B, R) cosines of the student with those of the teacher. Nothing of size (B, R, D) is made.
"""

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax, normalize

from arcface_kd.losses.class_weights import format_of_sums


def bank_cosines(embeddings: Tensor, bank: Tensor) -> Tensor:
    """The cosines (B, R) of embeddings (B, D), any norm, with a bank (R, D) of unit vectors; fp32 but for fp64."""
    dtype = format_of_sums(embeddings)
    with torch.autocast(embeddings.device.type, enabled=False):
        return normalize(embeddings.to(dtype)) @ bank.to(dtype).T


def bank_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """The sum over rows of KL(softmax(teacher / T) || softmax(student / T)), a scalar of at least 0, in nats.

    ``student`` and ``teacher``, which gets no gradient, are (B, R) cosines; T, positive, is in units of the cosine.
    """
    wanted = log_softmax(teacher.detach().to(student.dtype) / temperature, dim=1)
    return kl_div(log_softmax(student / temperature, dim=1), wanted, reduction="sum", log_target=True)


def nearest_difference(student: Tensor, teacher: Tensor, nearest: int) -> Tensor:
    """The sum over rows of the mean ``|cos_s - cos_t|`` over the ``nearest`` entries, a scalar in [0, 2 B].

    The teacher's cosines (B, R) choose the entries, at least one and all where there are fewer, and get no gradient.
    """
    wanted, places = teacher.detach().to(student.dtype).topk(min(nearest, teacher.shape[1]), dim=1)
    return (student.gather(1, places) - wanted).abs().sum() / places.shape[1]
