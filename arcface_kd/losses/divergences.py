r"""Cross entropy and divergences of each row from its sums over classes, and the factors of their gradients.

S is summed for itself and not as a difference, and group probabilities come as logistic functions of differences of
log-sum-exps, so that no logarithm meets a zero where one group holds all of the probability. The target's terms are
added on every rank from its own two logits.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from arcface_kd.losses.fused import fused
from arcface_kd.losses.logit_passes import Factors, GroupSplit, LogitSums

# fp16 holds up to 65504: sums of derivatives stay inside.
_LARGEST_NARROW_SUM = 32768.0


class TargetLogits(NamedTuple):
    """The logits of the rows' targets, (B,) each, the same on every rank; 0 for rows without label."""

    softmax: Tensor  # of the student under the margin, temperature 1
    student: Tensor  # that is distilled
    teacher: Tensor


class DivergenceRows(NamedTuple):
    """What the backward pass keeps of each row, (B,) each."""

    weight: Tensor  # of the row in the mean
    softmax_all: Tensor  # log-sum-exp at temperature 1, with the target
    student_primary: Tensor  # log-sum-exp of x_s in P, with the target
    teacher_primary: Tensor
    student_secondary: Tensor
    teacher_secondary: Tensor
    has_secondary: Tensor  # bool, whether S holds a class
    excess: Tensor  # p_s(S) - p_t(S)
    miss: Tensor  # 1 - p_y of the margin softmax
    student_target: Tensor  # x_s of the target
    teacher_target: Tensor


class Distillation(NamedTuple):
    """The loss terms of a step, scalars, the same on every rank; and what is worth a curve, without gradient."""

    ce: Tensor  # the student's margin softmax
    primary: Tensor  # T^2 times the mean KL inside the primary group; of all classes where no groups are asked for
    binary: Tensor  # T^2 times the mean KL of the groups' probabilities; 0 without groups
    secondary: Tensor  # T^2 times the mean KL inside the secondary group; 0 without groups, or where it is not wanted
    group_size: Tensor  # mean number of primary classes of a row; 0 without groups
    student_mass: Tensor  # mean p_s(P) of the student; 1 without groups
    teacher_mass: Tensor  # mean p_t(P) of the teacher; 1 without groups


class Upstream(NamedTuple):
    """The gradient in each term, a scalar; None for 0."""

    ce: Tensor | None
    primary: Tensor | None
    binary: Tensor | None
    secondary: Tensor | None


def _relative(shift: Tensor | None, total: Tensor) -> Tensor:
    """The factor from exponentials relative to a shift to shares of a sum, which is given as its logarithm.

    Where the sum is too far below the shift, all exponentials are 0, and the factor has to be finite only.
    """
    # With room for a logit scale.
    largest = 0.9 * math.log(torch.finfo(total.dtype).max)
    return (-total if shift is None else shift - total).clamp_max(largest).exp()


@fused(kernels=3)
def divergences(
    summed: Tensor,
    targets: TargetLogits,
    split: GroupSplit,
    valid: Tensor,
    temperature: float,
    *,
    groups: bool,
    secondary: bool,
) -> tuple[Distillation, DivergenceRows]:
    """The terms of a batch from ``summed`` (8, B), the rows of :class:`LogitSums` over all ranks."""
    sums = LogitSums(*summed)
    target, student_target, teacher_target = targets
    student_offset = torch.zeros_like(target) if split.student_shift is None else split.student_shift
    teacher_offset = torch.zeros_like(target) if split.teacher_shift is None else split.teacher_shift
    weight = valid / valid.sum().clamp_min(1).to(target.dtype)
    # log(1 + others / own) and 1 - p_y by their small parts: nothing cancels where p_y is nearly 1.
    others = sums.softmax.log() + temperature * student_offset
    odds = others - target
    ce = (torch.logaddexp(odds, torch.zeros_like(odds)) * weight).sum()

    student_primary = torch.logaddexp(sums.student_primary.log() + student_offset, student_target)
    teacher_primary = torch.logaddexp(sums.teacher_primary.log() + teacher_offset, teacher_target)
    difference = sums.product_primary * _relative(split.teacher_shift, teacher_primary)
    difference = difference + (teacher_target - teacher_primary).exp() * (teacher_target - student_target)
    primary = ((difference - (teacher_primary - student_primary)) * weight).sum() * temperature**2
    # An empty group weighs as little as the format can say.
    least = torch.finfo(target.dtype).tiny
    student_secondary = sums.student_secondary.clamp_min(least).log() + student_offset
    teacher_secondary = sums.teacher_secondary.clamp_min(least).log() + teacher_offset
    has_secondary = (sums.student_secondary > 0) & (sums.teacher_secondary > 0)
    binary, rest = torch.zeros_like(ce), torch.zeros_like(ce)
    student_odds, teacher_odds = student_secondary - student_primary, teacher_secondary - teacher_primary
    if groups:
        in_primary = logsigmoid(-teacher_odds) - logsigmoid(-student_odds)
        in_secondary = logsigmoid(teacher_odds) - logsigmoid(student_odds)
        binary = (torch.lerp(in_primary, in_secondary, teacher_odds.sigmoid()) * weight).sum() * temperature**2
    if secondary:
        difference = sums.product_secondary / sums.teacher_secondary.clamp_min(least)
        inside = (difference - (teacher_secondary - student_secondary)).masked_fill(~has_secondary, 0.0)
        rest = (inside * weight).sum() * temperature**2
    size = ((sums.size + 1) * weight).sum() if groups else torch.zeros_like(ce)
    masses = [(torch.sigmoid(-each) * weight).sum() for each in (student_odds, teacher_odds)]
    rows = DivergenceRows(
        weight=weight,
        softmax_all=torch.logaddexp(others, target),
        student_primary=student_primary,
        teacher_primary=teacher_primary,
        student_secondary=student_secondary,
        teacher_secondary=teacher_secondary,
        has_secondary=has_secondary,
        excess=student_odds.sigmoid() - teacher_odds.sigmoid(),
        miss=odds.sigmoid(),
        student_target=student_target.clone(),
        teacher_target=teacher_target.clone(),
    )
    return Distillation(ce, primary, binary, rest, size, *masses), rows


@fused(kernels=2)
def derivative_factors(
    rows: DivergenceRows,
    split: GroupSplit,
    upstream: Upstream,
    slope: Tensor,
    kd_slope: Tensor,
    owned: Tensor,
    scale: float,
    temperature: float,
    *,
    narrow: bool,
) -> tuple[Factors, Tensor, Tensor | None]:
    """What exponentials are multiplied by, and the derivative (B,) in the target's cosine.

    ``slope`` and ``kd_slope`` (B,) are d psi / d cos of the target's margin and of the logit that is distilled.
    ``narrow`` says that the derivatives go into fp16: factors are then multiplied by the scalar that is returned last,
    which brings them into the middle of its range.
    """
    common = rows.weight * scale
    kd_common = common * temperature
    own = torch.zeros_like(common)
    softmax = student_primary = student_secondary = teacher_primary = teacher_secondary = None
    if upstream.ce is not None:
        shift = None if split.student_shift is None else split.student_shift * temperature
        softmax = common * upstream.ce * _relative(shift, rows.softmax_all)
        own = own - common * upstream.ce * rows.miss * slope
    if not (upstream.primary is None and upstream.binary is None and upstream.secondary is None):
        zero = torch.zeros_like(common)
        primary = zero if upstream.primary is None else kd_common * upstream.primary
        binary = zero if upstream.binary is None else kd_common * upstream.binary * rows.excess
        secondary = zero if upstream.secondary is None else kd_common * upstream.secondary
        student_primary = (primary - binary) * _relative(split.student_shift, rows.student_primary)
        own = own + (primary - binary) * (rows.student_target - rows.student_primary).exp() * kd_slope
        student_secondary = (secondary + binary) * _relative(split.student_shift, rows.student_secondary)
        student_secondary = torch.where(rows.has_secondary, student_secondary, zero)
        if upstream.primary is not None or upstream.secondary is not None:
            teacher_primary = primary * _relative(split.teacher_shift, rows.teacher_primary)
            own = own - primary * (rows.teacher_target - rows.teacher_primary).exp() * kd_slope
            teacher_secondary = secondary * _relative(split.teacher_shift, rows.teacher_secondary)
            teacher_secondary = torch.where(rows.has_secondary, teacher_secondary, zero)
    factors = Factors(softmax, student_primary, student_secondary, teacher_primary, teacher_secondary)
    if not narrow:
        return factors, own * owned, None
    enlarged = _enlargement(rows.weight, upstream, scale, temperature)
    factors = Factors(*(None if each is None else each * enlarged for each in factors))
    return factors, own * owned, enlarged


def _enlargement(weight: Tensor, upstream: Upstream, scale: float, temperature: float) -> Tensor:
    """A factor, scalar, that brings the derivatives into the middle of fp16's range.

    A row's derivatives add up to no more than the bound, and a class's over all rows to no more than B times that.
    """
    bound = weight.new_zeros(())
    for gradient, share in zip(upstream, (1.0, *(2 * temperature,) * 3), strict=True):
        bound = bound if gradient is None else bound + gradient.abs() * share
    bound = bound * scale * weight.amax() if weight.numel() else bound
    return _LARGEST_NARROW_SUM / (bound * max(weight.shape[0], 1)).clamp_min(1e-30)
