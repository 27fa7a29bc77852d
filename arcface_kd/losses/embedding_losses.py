r"""Losses of embeddings: the distance to the teacher's, and RKD's distances and angles between the rows of a batch.

For RKD, student and teacher are each compared with themselves, so their dimensions may differ. Everything follows from
the matrix of inner products G of unit embeddings:

    || f_i - f_j ||^2 = G_ii - 2 G_ij + G_jj
    cos(angle at j between i and k) = (G_ik - G_ij - G_kj + G_jj) / (|| f_i - f_j || || f_k - f_j ||)

so that nothing of size (batch, batch, dimension) is ever made. For the batch^3 angles see
:mod:`~arcface_kd.losses.angle_sums`.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize, smooth_l1_loss

from arcface_kd.losses.angle_sums import distances, sum_over_angles
from arcface_kd.losses.class_weights import format_of_sums


def inner_products(embeddings: Tensor) -> Tensor:
    """The (B, B) cosines of embeddings (B, D) of any norm; fp64 is computed in fp64, all else in fp32."""
    dtype = format_of_sums(embeddings)
    with torch.autocast(embeddings.device.type, enabled=False):
        unit = normalize(embeddings.to(dtype))
        return unit @ unit.T


def _relative_distances(gram: Tensor) -> Tensor:
    distance, apart = distances(gram, slice(None))
    return distance / (distance.sum() / apart.sum().clamp_min(1)).clamp_min(torch.finfo(gram.dtype).tiny)


def distance_loss(student: Tensor, teacher: Tensor, rows: slice) -> Tensor:
    """Some rows' part of the mean difference of relative distances (Park et al., CVPR 2019, equations 5 to 8).

    A distance is taken relative to the mean distance in the batch, over pairs that are apart. Differences are Huber's
    (quadratic below 1, then linear), and their mean is over all ``B * B`` ordered pairs, a row with itself included, as
    in the published code. Student (B, D) and teacher (B, Dt), which gets no gradient, may have any norm. Parts of
    disjoint ``rows`` add up to the loss.
    """
    of_student = _relative_distances(inner_products(student))
    of_teacher = _relative_distances(inner_products(teacher.detach())).to(of_student.dtype)
    return smooth_l1_loss(of_student[rows], of_teacher[rows], reduction="sum") / max(student.shape[0], 1) ** 2


def angle_loss(student: Tensor, teacher: Tensor, rows: slice, chunk: int | None = None) -> Tensor:
    """Some rows' part of the mean difference of angles (Park et al., CVPR 2019, equations 9 to 11).

    What is compared is the cosine at a row between every two rows, by Huber's difference. The mean is over all
    B^3 ordered triples, degenerate ones included, as in the published code; the direction between two rows at one
    point counts as 0. ``rows`` are the vertices; the rest is as in :func:`distance_loss`.

    Memory: O(chunk x B x B), on a GPU with Triton O(B x B). Time: O(rows x B x B). ``chunk`` vertices are taken at a
    time; None chooses by device.
    """
    of_student, of_teacher = inner_products(student), inner_products(teacher.detach())
    batch = max(student.shape[0], 1)
    return sum_over_angles(of_student, of_teacher.to(of_student.dtype), rows, chunk) / batch**3


def squared_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared L2 distance of unit embeddings, summed over the dimension, averaged over the batch, in [0, 4].

    For unit vectors ``||f_s - f_t||^2 = 2 (1 - cos(f_s, f_t))``; the difference is taken first, so that nothing cancels
    where the two are near. Both are (B, D), of any norm; the teacher's get no gradient. fp64 is computed in fp64, all
    else in fp32. An empty batch has a distance of 0.
    """
    dtype = format_of_sums(student)
    difference = normalize(student.to(dtype)) - normalize(teacher.detach().to(dtype))
    return difference.square().sum() / max(student.shape[0], 1)
