"""CrossKD's align_scale: one network's feature map with the mean and deviation of another's."""

import torch
from torch import Tensor

from arcface_kd.distributed.ranks import RankGroup
from arcface_kd.losses.class_weights import format_of_sums
from arcface_kd.losses.fused import fused

# CrossKD's own, added to the deviation that is divided by.
EPSILON = 1e-6


def align_scale(student: Tensor, teacher: Tensor, ranks: RankGroup | None = None) -> Tensor:
    """CrossKD's ``align_scale`` (Wang et al., CVPR 2024, arXiv 2306.11369).

        (f - mean_s) / (std_s + 1e-6) * std_t + mean_t

    for each channel, with the mean and the unbiased standard deviation over batch, height and width of the maps at
    hand. The gradient goes through the student's mean and deviation as well; the teacher's are constants. A deviation
    of 0 gets no gradient. fp64 is computed in fp64, all else in fp32.

    ``student`` is (B, C, H, W), as is the result, ``teacher`` (B', C, H', W'). With ``ranks`` the statistics are those
    of all their maps, and all of them have to call; None takes those of this rank's maps, as the published code does. A
    ValueError names maps of other than four dimensions or of unequal channels, or one value in a channel.
    """
    if student.dim() != 4 or teacher.dim() != 4 or student.shape[1] != teacher.shape[1]:
        raise ValueError(
            f"maps are {tuple(student.shape)} and {tuple(teacher.shape)}; wanted (B, C, H, W) with as many channels"
        )
    dtype = format_of_sums(student)
    values = student.to(dtype)
    mean, deviation = _moments(values, ranks)
    with torch.no_grad():
        of_teacher = _moments if ranks is not None else _moments_in_few_kernels
        teacher_mean, teacher_deviation = of_teacher(teacher.to(dtype), ranks)
    return (values - mean) / (deviation + EPSILON) * teacher_deviation + teacher_mean


def _moments(values: Tensor, ranks: RankGroup | None) -> tuple[Tensor, Tensor]:
    """Mean and unbiased deviation of each channel of (B, C, H, W), each (C, 1, 1)."""
    count = values.shape[0] * values.shape[2] * values.shape[3]
    if ranks is None and count == 1:
        raise ValueError(
            f"a map of {tuple(values.shape)} has one value in a channel, which has no deviation: take a larger map or "
            "batch"
        )
    sums = torch.cat([values.sum((0, 2, 3)), values.new_full((1,), count)])
    sums = sums if ranks is None else ranks.sum_with_gradient(sums)
    total = sums[-1].detach()
    mean = (sums[:-1] / total.clamp_min(1)).view(-1, 1, 1)
    squares = (values - mean).square().sum((0, 2, 3))
    squares = squares if ranks is None else ranks.sum_with_gradient(squares)
    variance = squares / (total - 1).clamp_min(1)
    constant = variance == 0
    # The root's derivative at 0 would make NaN of every value.
    return mean, torch.where(constant, variance, variance.masked_fill(constant, 1).sqrt()).view(-1, 1, 1)


# The teacher's have no gradient to be found, and need no other rank.
_moments_in_few_kernels = fused(kernels=2)(_moments)
