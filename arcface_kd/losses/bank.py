r"""How rows stand to a bank of fixed unit vectors: the softmax over it, and the cosines with the nearest of it.

Both compare (B, R) cosines of the student with those of the teacher. Nothing of size (B, R, D) is made.
"""

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax, normalize

from arcface_kd.losses.class_weights import format_of_sums


def bank_cosines(embeddings: Tensor, bank: Tensor) -> Tensor:
    """The cosines of some rows with a bank.

    Args:
        embeddings: (B, D), any norm. fp64 is computed in fp64, all else in fp32.
        bank: (R, D) unit vectors.

    Returns:
        (B, R) cosines.
    """
    dtype = format_of_sums(embeddings)
    with torch.autocast(embeddings.device.type, enabled=False):
        return normalize(embeddings.to(dtype)) @ bank.to(dtype).T


def bank_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """The sum over rows of KL(softmax(teacher / T) || softmax(student / T)), in nats.

    Args:
        student: (B, R) cosines.
        teacher: (B, R) cosines; they get no gradient.
        temperature: T, in units of the cosine, positive.

    Returns:
        A scalar, at least 0.
    """
    wanted = log_softmax(teacher.detach().to(student.dtype) / temperature, dim=1)
    return kl_div(log_softmax(student / temperature, dim=1), wanted, reduction="sum", log_target=True)


def nearest_difference(student: Tensor, teacher: Tensor, nearest: int) -> Tensor:
    """The sum over rows of the mean ``|cos_s - cos_t|`` over the entries that are nearest to the teacher.

    Args:
        student: (B, R) cosines.
        teacher: (B, R) cosines; they choose the entries, and get no gradient.
        nearest: how many, at least 1; all where there are fewer.

    Returns:
        A scalar in [0, 2 B].
    """
    wanted, places = teacher.detach().to(student.dtype).topk(min(nearest, teacher.shape[1]), dim=1)
    return (student.gather(1, places) - wanted).abs().sum() / places.shape[1]
