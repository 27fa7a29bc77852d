"""The distance between what student and teacher make of one image."""

import torch
from torch import Tensor
from torch.nn.functional import normalize


def squared_distance(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Squared L2 distance of unit embeddings, summed over the dimension and averaged over the batch.

    For unit vectors ``||f_s - f_t||^2 = 2 (1 - cos(f_s, f_t))``; the difference is taken first, so that nothing cancels
    where the two are near.

    Args:
        student: (B, D) embeddings, any norm. fp64 is computed in fp64, all else in fp32.
        teacher: (B, D) embeddings, any norm; they get no gradient.

    Returns:
        A scalar in [0, 4]; 0 for an empty batch.
    """
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    difference = normalize(student.to(dtype)) - normalize(teacher.detach().to(dtype))
    return difference.square().sum() / max(student.shape[0], 1)
