r"""Margin softmax and distillation of logits in one pass: two classifiers whose classes are split over ranks.

With normalised embeddings f, class centers w, the logit scale s, the temperature T and x = s cos / T, for student and
teacher each against its own class centers:

    ce        = mean_i [ logsumexp_j z_ij - z_iy ]                 the margin softmax of the student
    kl        = T^2 mean_i KL(p_t || p_s)                          p = softmax(x) over all classes
    primary   = T^2 mean_i KL(p_t in P || p_s in P)                renormalised inside the primary group P of a row
    secondary = T^2 mean_i KL(p_t in S || p_s in S)                inside its complement S
    binary    = T^2 mean_i KL([p_t(P), p_t(S)] || [p_s(P), p_s(S)])

(Hinton et al., arXiv 1503.02531; Grouped KD, Zhao et al., AAAI 2023, arXiv 2304.04462.) Exactly,
``KL(p_t || p_s) = KL_binary + p_t(P) KL_P + p_t(S) KL_S`` in every row.

All of them follow from a few sums over classes: of exp(x) for student and teacher in P and in S, of
``exp(x_t) (x_t - x_s)`` in P and in S, and of exp(z). S is summed for itself and not as a difference, and group
probabilities come as logistic functions of differences of log-sum-exps, so that no logarithm meets a zero where
one group holds all of the probability. The target's terms are added on every rank from its own two logits.

The cross entropy is that of :func:`~arcface_kd.losses.margin_softmax.margin_softmax`. It is found here along with the
rest because the student's logits are at hand: called beside this, that function would multiply as often again.
"""

import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import logsigmoid

from arcface_kd.distributed.ranks import RankGroup
from arcface_kd.losses.class_groups import GroupRule, RankedLogits
from arcface_kd.losses.class_weights import ClassWeights, inverse_norm, visited_classes
from arcface_kd.losses.margin import Margin
from arcface_kd.losses.margin_softmax import chunk_size, through_normalisation
from arcface_kd.losses.sharded_logits import ShardedLogits, gradients_through_cosines, pass_size, sharded_logits, slices

RankedBy = Literal["student", "teacher"]
Logits = Literal["margin", "plain"]

# exp(64), exp(-64) and the sum of two thousand million of them are normal numbers of fp32.
_LARGEST_BARE_SCALE = 64.0

# fp16 holds up to 65504: sums of derivatives stay inside.
_LARGEST_NARROW_SUM = 32768.0


class Distillation(NamedTuple):
    """The loss terms of a step, scalars, the same on every rank; and what is worth a curve, without gradient.

    Attributes:
        ce: the student's margin softmax.
        primary: T^2 times the mean KL inside the primary group; of all classes where no groups are asked for.
        binary: T^2 times the mean KL of the groups' probabilities; 0 without groups.
        secondary: T^2 times the mean KL inside the secondary group; 0 without groups, or where it is not wanted.
        group_size: mean number of primary classes of a row; 0 without groups.
        student_mass: mean p_s(P) of the student; 1 without groups.
        teacher_mass: mean p_t(P) of the teacher; 1 without groups.
    """

    ce: Tensor
    primary: Tensor
    binary: Tensor
    secondary: Tensor
    group_size: Tensor
    student_mass: Tensor
    teacher_mass: Tensor


class Grouping(NamedTuple):
    """How Grouped KD splits the classes of a row in two; the target is always in the primary group.

    Attributes:
        rule: how large the primary group is.
        ranked_by: whose logits say which classes are in it.
        secondary: whether the KL inside the secondary group is wanted too.
    """

    rule: GroupRule
    ranked_by: RankedBy = "student"
    secondary: bool = False


class TeacherLogits(NamedTuple):
    """The teacher's logits of a batch, for one or several calls of :func:`logit_distillation`.

    Attributes:
        logits: over the temperature.
        temperature: that they were divided by.
    """

    logits: ShardedLogits
    temperature: float


class _Sums(NamedTuple):
    """Sums over the classes of all ranks but the target, each (B,); exponentials are taken relative to the shifts."""

    softmax: Tensor  # of exp(z) of the student, temperature 1
    student_primary: Tensor  # of exp(x_s) in P
    student_secondary: Tensor
    teacher_primary: Tensor
    teacher_secondary: Tensor
    product_primary: Tensor  # of exp(x_t) (x_t - x_s) in P
    product_secondary: Tensor
    size: Tensor  # classes in P


class _Rows(NamedTuple):
    """What the backward pass keeps of each row, (B,) each."""

    weight: Tensor  # of the row in the mean
    student_shift: Tensor | None
    teacher_shift: Tensor | None
    threshold: Tensor | None  # of the primary group
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
    slope: Tensor  # of the target's margin, d psi / d cos
    kd_slope: Tensor  # the same for the logit that is distilled


class _Factors(NamedTuple):
    """What the exponentials are multiplied by to become derivatives in the cosine, (B,) each.

    None stands for nothing to do, for student or teacher in both groups at once.
    """

    softmax: Tensor | None
    student_primary: Tensor | None
    student_secondary: Tensor | None
    teacher_primary: Tensor | None
    teacher_secondary: Tensor | None


class _Setting(NamedTuple):
    """What a call fixes for both passes."""

    margin: Margin
    temperature: float
    grouping: Grouping | None
    with_margin: bool
    ranks: RankGroup
    chunk: int  # classes at a time in products
    passing: int  # and in passes over kept logits
    product_dtype: torch.dtype


def _exponentials(values: Tensor, shift: Tensor | None, out: Tensor) -> Tensor:
    return torch.exp(values, out=out) if shift is None else torch.sub(values, shift, out=out).exp_()


def _relative(shift: Tensor | None, total: Tensor) -> Tensor:
    """What makes exponentials relative to a shift into shares of a sum, given as its logarithm.

    A sum too far below the shift has no exponentials left that could be enlarged; all that is to be had is a finite
    number.
    """
    # With room for a logit scale.
    largest = 0.9 * math.log(torch.finfo(total.dtype).max)
    return (-total if shift is None else shift - total).clamp_max(largest).exp()


class _Passes:
    """The two passes over kept logits, in buffers that all chunks share.

    Args:
        student: the student's logits over the temperature.
        teacher: the teacher's.
        setting: of the call.
    """

    def __init__(self, student: ShardedLogits, teacher: ShardedLogits, setting: _Setting) -> None:
        self.student, self.teacher, self.setting = student.values, teacher.values, setting
        visited, batch = student.values.shape
        size = min(setting.passing, visited)
        self._buffers = [student.values.new_empty(size, batch) for _ in range(4)]
        self._filter_threshold = setting.margin.filter_threshold * student.factor
        self.ranked = self.student
        if setting.grouping is not None and setting.grouping.ranked_by == "teacher":
            self.ranked = self.teacher

    def _softmax(self, part: slice, shift: Tensor | None, out: Tensor) -> Tensor:
        """exp(z - shift) at temperature 1; 0 for what interclass filtering hides."""
        values, temperature = self.student[part], self.setting.temperature
        torch.mul(values, temperature, out=out)
        if shift is not None:
            out.sub_(shift * temperature)
        out.exp_()
        if self._filter_threshold > 0:
            out.masked_fill_(values > self._filter_threshold, 0.0)
        return out

    def sums(self, threshold: Tensor | None, student_shift: Tensor | None, teacher_shift: Tensor | None) -> Tensor:
        """What :class:`_Sums` names, of this shard, as one (8, B) tensor."""
        visited, batch = self.student.shape
        result = self.student.new_zeros(len(_Sums._fields), batch)
        sums = _Sums(*result)
        secondary = self.setting.grouping is not None and self.setting.grouping.secondary
        for part in slices(visited, self.setting.passing):
            count = self.student[part].shape[0]
            inside, a, b, c = (buffer[:count] for buffer in self._buffers)
            sums.softmax.add_(self._softmax(part, student_shift, a).sum(0))
            if self._filter_threshold > 0:
                filtered = torch.gt(self.student[part], self._filter_threshold, out=a).sum(0)
                # Their logits are 0.
                one = 1.0 if student_shift is None else (student_shift * -self.setting.temperature).exp()
                sums.softmax.add_(filtered * one)
            _exponentials(self.student[part], student_shift, a)
            if threshold is None:
                sums.student_primary.add_(a.sum(0))
                _exponentials(self.teacher[part], teacher_shift, b)
                sums.teacher_primary.add_(b.sum(0))
                torch.sub(self.teacher[part], self.student[part], out=c)
                sums.product_primary.add_(b.mul_(c).sum(0))
                continue
            torch.ge(self.ranked[part], threshold, out=inside)
            sums.size.add_(inside.sum(0))
            torch.mul(a, inside, out=b)
            sums.student_primary.add_(b.sum(0))
            sums.student_secondary.add_(a.sub_(b).sum(0))
            _exponentials(self.teacher[part], teacher_shift, a)
            torch.mul(a, inside, out=b)
            sums.teacher_primary.add_(b.sum(0))
            sums.teacher_secondary.add_(a.sub_(b).sum(0))
            torch.sub(self.teacher[part], self.student[part], out=c)
            sums.product_primary.add_(b.mul_(c).sum(0))
            if secondary:
                sums.product_secondary.add_(a.mul_(c).sum(0))
        return result

    def derivatives(self, part: slice, out: Tensor, rows: _Rows, factors: _Factors) -> None:
        """Write the loss's derivatives (k, B) in the cosines of some classes, 0 for targets."""
        inside, a, b = (buffer[: out.shape[0]] for buffer in self._buffers[:3])
        if factors.softmax is None:
            out.zero_()
        else:
            self._softmax(part, rows.student_shift, out).mul_(factors.softmax)
        if factors.student_primary is None:
            return
        _exponentials(self.student[part], rows.student_shift, a)
        if rows.threshold is None:
            out.addcmul_(a, factors.student_primary)
        else:
            torch.ge(self.ranked[part], rows.threshold, out=inside)
            # At weights of 0 and 1 an interpolation is the one or the other end.
            assert factors.student_secondary is not None
            out.addcmul_(a, torch.lerp(factors.student_secondary, factors.student_primary, inside, out=b))
        if factors.teacher_primary is None:
            return
        _exponentials(self.teacher[part], rows.teacher_shift, a)
        if rows.threshold is None:
            out.addcmul_(a, factors.teacher_primary, value=-1)
        else:
            assert factors.teacher_secondary is not None
            b = torch.lerp(factors.teacher_secondary, factors.teacher_primary, inside, out=b)
            out.addcmul_(a, b, value=-1)


class _LogitDistillation(torch.autograd.Function):
    """The terms of the gathered batch; one backward pass serves whichever of them are differentiated."""

    @staticmethod
    def forward(
        ctx: Any,
        embeddings: Tensor,
        centers: Tensor,
        labels: Tensor,
        weights: ClassWeights,
        teacher: ShardedLogits,
        setting: _Setting,
    ) -> tuple[Tensor, ...]:
        margin, temperature, grouping, ranks = setting.margin, setting.temperature, setting.grouping, setting.ranks
        raw = embeddings.to(_format_of_sums(embeddings))
        inverse = inverse_norm(raw).unsqueeze(1)
        unit = raw * inverse
        classes = visited_classes(weights, labels)
        factor = margin.scale / temperature
        student = sharded_logits(unit, classes, factor, setting.chunk, setting.product_dtype)
        passes = _Passes(student, teacher, setting)

        psi, slope = margin.target(student.own)
        kd_psi, kd_slope = (psi, slope) if setting.with_margin else (student.own, torch.ones_like(slope))
        teacher_psi = margin.target(teacher.own)[0] if setting.with_margin else teacher.own
        # One reduction brings every target's logits from the one rank that holds it, and the largest ones.
        found = torch.stack([margin.scale * psi, factor * kd_psi, factor * teacher_psi])
        found.masked_fill_(~classes.owned, -torch.inf)
        follows = margin.scale * max(1.0, 1 / temperature) > _LARGEST_BARE_SCALE
        if follows and classes.visited:
            found = torch.cat([found, torch.stack([student.values.amax(0), teacher.values.amax(0)])])
        elif follows:
            found = torch.nn.functional.pad(found, (0, 0, 0, 2), value=-torch.inf)
        found = ranks.max_(found)
        valid = labels >= 0
        target, student_target, teacher_target = found[:3].masked_fill(~valid, 0.0).unbind()
        student_shift = teacher_shift = threshold = None
        if follows:
            student_shift, teacher_shift = found[3].maximum(student_target), found[4].maximum(teacher_target)
        if grouping is not None:
            by_teacher = grouping.ranked_by == "teacher"
            threshold = RankedLogits(
                passes.ranked,
                teacher_target if by_teacher else student_target,
                valid,
                classes,
                factor,
                temperature,
                teacher_shift if by_teacher else student_shift,
                ranks,
                setting.passing,
            ).thresholds(grouping.rule)
        sums = _Sums(*ranks.sum_(passes.sums(threshold, student_shift, teacher_shift)))
        student_offset = torch.zeros_like(target) if student_shift is None else student_shift
        teacher_offset = torch.zeros_like(target) if teacher_shift is None else teacher_shift

        weight = valid / valid.sum().clamp_min(1).to(unit.dtype)
        # log(1 + others / own) and 1 - p_y by their small parts: nothing cancels where p_y is nearly 1.
        others = sums.softmax.log() + temperature * student_offset
        odds = others - target
        ce = (torch.logaddexp(odds, torch.zeros_like(odds)) * weight).sum()

        def mean(divergence: Tensor) -> Tensor:
            return (divergence * weight).sum() * temperature**2

        student_primary = torch.logaddexp(sums.student_primary.log() + student_offset, student_target)
        teacher_primary = torch.logaddexp(sums.teacher_primary.log() + teacher_offset, teacher_target)
        difference = sums.product_primary * _relative(teacher_shift, teacher_primary)
        difference += (teacher_target - teacher_primary).exp() * (teacher_target - student_target)
        primary = mean(difference - (teacher_primary - student_primary))
        # An empty group weighs as little as the format can say.
        least = torch.finfo(unit.dtype).tiny
        student_secondary = sums.student_secondary.clamp_min(least).log() + student_offset
        teacher_secondary = sums.teacher_secondary.clamp_min(least).log() + teacher_offset
        has_secondary = (sums.student_secondary > 0) & (sums.teacher_secondary > 0)
        binary, secondary = torch.zeros_like(ce), torch.zeros_like(ce)
        student_odds, teacher_odds = student_secondary - student_primary, teacher_secondary - teacher_primary
        if grouping is not None:
            in_primary = logsigmoid(-teacher_odds) - logsigmoid(-student_odds)
            in_secondary = logsigmoid(teacher_odds) - logsigmoid(student_odds)
            binary = mean(torch.lerp(in_primary, in_secondary, teacher_odds.sigmoid()))
            if grouping.secondary:
                difference = sums.product_secondary / sums.teacher_secondary.clamp_min(least)
                inside = difference - (teacher_secondary - student_secondary)
                secondary = mean(inside.masked_fill(~has_secondary, 0.0))

        rows = _Rows(
            weight=weight,
            student_shift=student_shift,
            teacher_shift=teacher_shift,
            threshold=threshold,
            softmax_all=torch.logaddexp(others, target),
            student_primary=student_primary,
            teacher_primary=teacher_primary,
            student_secondary=student_secondary,
            teacher_secondary=teacher_secondary,
            has_secondary=has_secondary,
            excess=student_odds.sigmoid() - teacher_odds.sigmoid(),
            miss=odds.sigmoid(),
            student_target=student_target,
            teacher_target=teacher_target,
            slope=slope,
            kd_slope=kd_slope,
        )
        ctx.save_for_backward(unit, inverse, labels, *weights.tensors(), *student[:3], *teacher[:3], *rows)
        ctx.settings = (weights, setting, embeddings.dtype)
        # A term that nobody differentiates costs nothing in the backward pass.
        ctx.set_materialize_grads(False)
        observed = (
            ((sums.size + 1) * weight).sum() if grouping is not None else torch.zeros_like(ce),
            (torch.sigmoid(-student_odds) * weight).sum(),
            (torch.sigmoid(-teacher_odds) * weight).sum(),
        )
        constant: tuple[Tensor, ...] = () if grouping is not None and grouping.secondary else (secondary,)
        constant += () if grouping is not None else (binary,)
        ctx.mark_non_differentiable(*constant, *observed)
        return ce, primary, binary, secondary, *observed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        weights, setting, embedding_dtype = ctx.settings
        unit, inverse, labels, centers, inverse_norms, index, *saved = ctx.saved_tensors
        factor = setting.margin.scale / setting.temperature
        student = ShardedLogits(saved[0], saved[1], saved[2], factor)
        teacher = ShardedLogits(saved[3], saved[4], saved[5], factor)
        rows = _Rows(*saved[6:])
        classes = visited_classes(weights.with_tensors(centers, inverse_norms, index), labels)
        upstream = _Upstream(*gradients[:4])
        passes = _Passes(student, teacher, setting)
        factors, own_weight = _factors(rows, upstream, setting)
        own_weight = own_weight * classes.owned
        enlarged = _enlargement(rows, upstream, setting)
        if enlarged is not None:
            factors = _Factors(*(None if each is None else each * enlarged for each in factors))
        # As in the forward pass, the products' format is chosen here and nowhere else.
        with torch.autocast(unit.device.type, enabled=False):
            in_unit, in_centers = gradients_through_cosines(
                lambda part, out: passes.derivatives(part, out, rows, factors),
                unit,
                classes,
                student,
                setting.chunk,
                setting.product_dtype,
                in_centers=ctx.needs_input_grad[1],
            )
        if enlarged is not None:
            in_unit.div_(enlarged)
            in_centers = None if in_centers is None else in_centers.div_(enlarged)
        own = centers[classes.target].to(unit.dtype)
        own_inverse = inverse_norm(own).unsqueeze(1)
        own = own * own_inverse
        in_embeddings = through_normalisation(in_unit + own * own_weight.unsqueeze(1), unit, inverse)
        if in_centers is not None:
            # Rows of other ranks add zero to row 0.
            pull = through_normalisation(unit * own_weight.unsqueeze(1), own, own_inverse)
            in_centers.index_add_(0, classes.target, pull.to(in_centers.dtype))
        wanted = ctx.needs_input_grad[0]
        return in_embeddings.to(embedding_dtype) if wanted else None, in_centers, *(None,) * 4


class _Upstream(NamedTuple):
    """The gradient in each term, a scalar; None for 0."""

    ce: Tensor | None
    primary: Tensor | None
    binary: Tensor | None
    secondary: Tensor | None


def _factors(rows: _Rows, upstream: _Upstream, setting: _Setting) -> tuple[_Factors, Tensor]:
    """What exponentials are multiplied by, and the derivative in the target's cosine, (B,)."""
    common = rows.weight * setting.margin.scale
    kd_common = common * setting.temperature
    own = torch.zeros_like(common)
    softmax = student_primary = student_secondary = teacher_primary = teacher_secondary = None

    if upstream.ce is not None:
        shift = None if rows.student_shift is None else rows.student_shift * setting.temperature
        softmax = common * upstream.ce * _relative(shift, rows.softmax_all)
        own = own - common * upstream.ce * rows.miss * rows.slope
    if upstream.primary is None and upstream.binary is None and upstream.secondary is None:
        return _Factors(softmax, None, None, None, None), own
    zero = torch.zeros_like(common)
    primary = zero if upstream.primary is None else kd_common * upstream.primary
    binary = zero if upstream.binary is None else kd_common * upstream.binary * rows.excess
    secondary = zero if upstream.secondary is None else kd_common * upstream.secondary
    student_primary = (primary - binary) * _relative(rows.student_shift, rows.student_primary)
    own = own + (primary - binary) * (rows.student_target - rows.student_primary).exp() * rows.kd_slope
    student_secondary = (secondary + binary) * _relative(rows.student_shift, rows.student_secondary)
    student_secondary = torch.where(rows.has_secondary, student_secondary, zero)
    if upstream.primary is not None or upstream.secondary is not None:
        teacher_primary = primary * _relative(rows.teacher_shift, rows.teacher_primary)
        own = own - primary * (rows.teacher_target - rows.teacher_primary).exp() * rows.kd_slope
        teacher_secondary = secondary * _relative(rows.teacher_shift, rows.teacher_secondary)
        teacher_secondary = torch.where(rows.has_secondary, teacher_secondary, zero)
    return _Factors(softmax, student_primary, student_secondary, teacher_primary, teacher_secondary), own


def _enlargement(rows: _Rows, upstream: _Upstream, setting: _Setting) -> Tensor | None:
    """A factor that brings the derivatives into the middle of fp16's range, scalar; None for other formats.

    A row's derivatives add up to no more than the bound, and a class's over all rows to no more than B times that.
    """
    if setting.product_dtype != torch.float16:
        return None
    bound = rows.weight.new_zeros(())
    for gradient, share in zip(upstream, (1.0, *(2 * setting.temperature,) * 3), strict=True):
        bound = bound if gradient is None else bound + gradient.abs() * share
    bound = bound * setting.margin.scale * rows.weight.amax() if rows.weight.numel() else bound
    return _LARGEST_NARROW_SUM / (bound * max(rows.weight.shape[0], 1)).clamp_min(1e-30)


def _format_of_sums(embeddings: Tensor) -> torch.dtype:
    return torch.float64 if embeddings.dtype == torch.float64 else torch.float32


def _check_matrices(embeddings: Tensor, centers: Tensor, labels: Tensor, whose: str) -> None:
    if embeddings.ndim != 2 or centers.ndim != 2 or embeddings.shape[1] != centers.shape[1]:
        raise ValueError(
            f"the {whose}'s embeddings {tuple(embeddings.shape)} and class centers {tuple(centers.shape)} must be "
            "matrices of one dimension"
        )
    if labels.shape != embeddings.shape[:1]:
        raise ValueError(
            f"labels {tuple(labels.shape)} must be one a row of the {whose}'s embeddings {tuple(embeddings.shape)}"
        )


@torch.no_grad()
def teacher_logits(
    embeddings: Tensor,
    labels: Tensor,
    weights: ClassWeights,
    scale: float,
    temperature: float,
    *,
    chunk: int | None = None,
) -> TeacherLogits:
    """The teacher's logits of a gathered batch against this rank's shard of its classifier.

    Args:
        embeddings: (B, Dt) the teacher's embeddings, any norm. fp64 is computed in fp64, all else in fp32.
        labels: (B,) int64 labels over all classes, negative ones for none.
        weights: the teacher's classifier, (C, Dt).
        scale: the logit scale s.
        temperature: T.
        chunk: classes at a time; None chooses by device.

    Returns:
        The logits, (K, B) in memory, without gradient.

    Raises:
        ValueError: shapes that do not belong together.
    """
    _check_matrices(embeddings, weights.centers, labels, "teacher")
    with torch.autocast(embeddings.device.type, enabled=False):
        raw = embeddings.to(_format_of_sums(embeddings))
        unit = raw * inverse_norm(raw).unsqueeze(1)
        classes = visited_classes(weights, labels)
        chunk = chunk or chunk_size(unit.shape[0], unit.device)
        logits = sharded_logits(unit, classes, scale / temperature, chunk, weights.product_dtype or unit.dtype)
    return TeacherLogits(logits, temperature)


def logit_distillation(
    embeddings: Tensor,
    labels: Tensor,
    weights: ClassWeights,
    teacher: TeacherLogits,
    margin: Margin,
    *,
    grouping: Grouping | None = None,
    logits: Logits = "plain",
    chunk: int | None = None,
) -> Distillation:
    """Margin softmax and distilled logits of a gathered batch against this rank's shard of the student's classes.

    Every rank calls it with the same batch and gets the same values; the gradient in ``embeddings`` is this shard's
    part, to be summed over ranks. Class centers receive a gradient only where they ask for one: the teacher's own
    classifier, frozen, may stand in for the student's. Nothing reaches the teacher.

    Where only a sample of the classes takes part, so it does in all terms. The KL of a sample is biased:
    probabilities are renormalised over the classes that were drawn.

    The interclass filter of the margin belongs to the cross entropy; logits are distilled as they are.

    Memory: two matrices (classes of this rank, B) until the backward pass. Products: one here (another made the
    teacher's logits) and two in the backward pass, one for frozen centers.

    Args:
        embeddings: (B, D) gathered embeddings, any norm. fp64 is computed in fp64, all else in fp32.
        labels: (B,) int64 labels over all classes. A negative label takes its row out of all terms and means.
        weights: this rank's classes of the student.
        teacher: logits of the same rows and classes.
        margin: the margin and the logit scale.
        grouping: Grouped KD's groups; None distils all classes together.
        logits: whether the targets' logits are distilled as they are (``plain``) or with the margin, on both sides
            (``margin``, as Grouped KD's published code does).
        chunk: classes at a time; None chooses by device.

    Returns:
        The terms: means over rows with a label, 0 if there is none.

    Raises:
        ValueError: shapes, formats or a temperature that do not belong together.
    """
    _check_matrices(embeddings, weights.centers, labels, "student")
    wanted = (weights.visited, embeddings.shape[0])
    met = teacher.logits.values
    if met.shape != wanted or met.dtype != _format_of_sums(embeddings):
        raise ValueError(
            f"the teacher's logits are {tuple(met.shape)} of {met.dtype}; wanted {wanted} of "
            f"{_format_of_sums(embeddings)}, for the student's classes and rows"
        )
    chunk = chunk or chunk_size(embeddings.shape[0], embeddings.device)
    setting = _Setting(
        margin=margin,
        temperature=teacher.temperature,
        grouping=grouping,
        with_margin=logits == "margin",
        ranks=weights.ranks,
        chunk=chunk,
        passing=pass_size(chunk, embeddings.shape[0], embeddings.device),
        product_dtype=weights.product_dtype or _format_of_sums(embeddings),
    )
    # The products' format is chosen here and nowhere else, so an autocast region around the call must not touch them.
    with torch.autocast(embeddings.device.type, enabled=False):
        return Distillation(
            *_LogitDistillation.apply(
                embeddings,
                weights.centers,
                labels,
                weights,
                teacher.logits,
                setting,
            )
        )
