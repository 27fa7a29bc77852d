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
``exp(x_t) (x_t - x_s)`` in P and in S, and of exp(z); see :mod:`~arcface_kd.losses.divergences`.

The cross entropy is that of :func:`~arcface_kd.losses.margin_softmax.margin_softmax`. It is found here along with the
rest because the student's logits are at hand: called beside this, that function would multiply as often again.
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from arcface_kd.distributed.ranks import RankGroup
from arcface_kd.losses.class_chunks import LARGEST_BARE_SCALE, chunk_size
from arcface_kd.losses.class_groups import GroupRule, RankedLogits
from arcface_kd.losses.class_weights import ClassWeights, check_matrices, format_of_sums, inverse_norm, visited_classes
from arcface_kd.losses.divergences import (
    Distillation,
    DivergenceRows,
    TargetLogits,
    Upstream,
    derivative_factors,
    divergences,
)
from arcface_kd.losses.fused import fused
from arcface_kd.losses.gradients import finds_center_gradients
from arcface_kd.losses.logit_passes import GroupSplit, LogitPasses
from arcface_kd.losses.margin import Margin
from arcface_kd.losses.margin_softmax import through_normalisation, unit_and_inverse
from arcface_kd.losses.sharded_logits import ShardedLogits, gradients_through_cosines, pass_size, sharded_logits

RankedBy = Literal["student", "teacher"]
Logits = Literal["margin", "plain"]


class Grouping(NamedTuple):
    """How Grouped KD splits the classes of a row in two; the target is always in the primary group."""

    rule: GroupRule  # how large the primary group is
    ranked_by: RankedBy = "student"  # whose logits say which classes are in it
    secondary: bool = False  # whether the KL inside the secondary group is wanted too


class TeacherLogits(NamedTuple):
    """The teacher's logits of a batch over ``temperature``, for calls of :func:`logit_distillation`."""

    logits: ShardedLogits
    temperature: float


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

    def passes(self, student: ShardedLogits, teacher: ShardedLogits) -> LogitPasses:
        """The passes over the logits of a call."""
        filter_threshold = self.margin.filter_threshold * student.factor
        by_teacher = self.grouping is not None and self.grouping.ranked_by == "teacher"
        return LogitPasses(student, teacher, self.temperature, filter_threshold, by_teacher, self.passing)


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
        row_m2: Tensor | None,
    ) -> tuple[Tensor, ...]:
        margin, temperature, grouping, ranks = setting.margin, setting.temperature, setting.grouping, setting.ranks
        unit, inverse = unit_and_inverse(embeddings.to(format_of_sums(embeddings)))
        classes = visited_classes(weights, labels)
        factor = margin.scale / temperature
        student = sharded_logits(unit, classes, factor, setting.chunk, setting.product_dtype)
        passes = setting.passes(student, teacher)

        # One reduction brings every target's logits from the one rank that holds it, and the largest ones.
        m2 = None if row_m2 is None else row_m2.to(unit.dtype)
        found, slope, kd_slope = _own_logits(
            student.own, teacher.own, classes.owned, margin, factor, m2, with_margin=setting.with_margin
        )
        follows = margin.scale * max(1.0, 1 / temperature) > LARGEST_BARE_SCALE
        if follows and classes.visited:
            found = torch.cat([found, torch.stack([student.values.amax(0), teacher.values.amax(0)])])
        elif follows:
            found = torch.nn.functional.pad(found, (0, 0, 0, 2), value=-torch.inf)
        found = ranks.max_(found)
        valid, *own = _of_labelled(labels, found[0], found[1], found[2])
        targets = TargetLogits(*own)
        split = GroupSplit(None, None, None)
        if follows:
            split = GroupSplit(found[3].maximum(targets.student), found[4].maximum(targets.teacher), None)
        if grouping is not None:
            by_teacher = grouping.ranked_by == "teacher"
            threshold = RankedLogits(
                passes.ranked,
                targets.teacher if by_teacher else targets.student,
                valid,
                classes,
                factor,
                temperature,
                split.teacher_shift if by_teacher else split.student_shift,
                ranks,
                setting.passing,
                weights.of_each_rank(),
            ).thresholds(grouping.rule)
            split = split._replace(threshold=threshold)
        secondary = grouping is not None and grouping.secondary
        sums = ranks.sum_(passes.sums(split, secondary=secondary))
        terms, rows = divergences(
            sums, targets, split, valid, temperature, groups=grouping is not None, secondary=secondary
        )
        kept = (unit, inverse, labels, *weights.tensors(), *student[:3], *teacher[:3], slope, kd_slope, *split, *rows)
        ctx.save_for_backward(*kept)
        ctx.settings = (weights, setting, embeddings.dtype)
        # A term that nobody differentiates costs nothing in the backward pass.
        ctx.set_materialize_grads(False)
        constant: tuple[Tensor, ...] = () if secondary else (terms.secondary,)
        constant += () if grouping is not None else (terms.binary,)
        ctx.mark_non_differentiable(*constant, *terms[4:])
        return tuple(terms)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        weights, setting, embedding_dtype = ctx.settings
        unit, inverse, labels, centers, inverse_norms, index, *saved = ctx.saved_tensors
        factor = setting.margin.scale / setting.temperature
        student = ShardedLogits(saved[0], saved[1], saved[2], factor)
        teacher = ShardedLogits(saved[3], saved[4], saved[5], factor)
        slope, kd_slope, split, rows = saved[6], saved[7], GroupSplit(*saved[8:11]), DivergenceRows(*saved[11:])
        classes = visited_classes(weights.with_tensors(centers, inverse_norms, index), labels)
        passes = setting.passes(student, teacher)
        factors, own_weight, enlarged = derivative_factors(
            *(rows, split, Upstream(*gradients[:4]), slope, kd_slope, classes.owned),
            *(setting.margin.scale, setting.temperature),
            narrow=setting.product_dtype == torch.float16,
        )
        # As in the forward pass, the products' format is chosen here and nowhere else.
        with torch.autocast(unit.device.type, enabled=False):
            in_unit, in_centers = gradients_through_cosines(
                lambda part, out: passes.derivatives(part, out, split, factors),
                unit,
                classes,
                student,
                setting.chunk,
                setting.product_dtype,
                in_centers=ctx.needs_input_grad[1] and finds_center_gradients(),
            )
        if enlarged is not None:
            in_unit.div_(enlarged)
            in_centers = None if in_centers is None else in_centers.div_(enlarged)
        in_embeddings, pull = _with_targets(in_unit, own_weight, centers, classes.target, unit, inverse)
        if in_centers is not None:
            # Rows of other ranks add zero.
            in_centers.index_add_(0, classes.target, pull.to(in_centers.dtype))
        wanted = ctx.needs_input_grad[0]
        return in_embeddings.to(embedding_dtype) if wanted else None, in_centers, *(None,) * 5


@fused()
def _of_labelled(labels: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
    """Which rows have a label, and values (B,) that are 0 for the others."""
    valid = labels >= 0
    return valid, *(each.masked_fill(~valid, 0.0) for each in values)


@fused()
def _own_logits(
    student: Tensor,
    teacher: Tensor,
    owned: Tensor,
    margin: Margin,
    factor: float,
    m2: Tensor | None,
    *,
    with_margin: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The targets' logits (3, B) as in :class:`TargetLogits`, and the slopes of the first two.

    ``student`` and ``teacher`` are cosines (B,); other shards' logits are -inf.
    """
    psi, slope = margin.target(student, m2)
    kd_psi, kd_slope = (psi, slope.clone()) if with_margin else (student, torch.ones_like(slope))
    teacher_psi = margin.target(teacher, m2)[0] if with_margin else teacher
    found = torch.stack([margin.scale * psi, factor * kd_psi, factor * teacher_psi])
    return found.masked_fill(~owned, -torch.inf), slope, kd_slope


@fused()
def _with_targets(
    in_unit: Tensor, own_weight: Tensor, centers: Tensor, target: Tensor, unit: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradient in the embeddings with the targets' share, and the targets' pull on their class centers, (B, D)."""
    own = centers[target].to(unit.dtype)
    own_inverse = inverse_norm(own).unsqueeze(1)
    own = own * own_inverse
    in_embeddings = through_normalisation(in_unit + own * own_weight.unsqueeze(1), unit, inverse)
    return in_embeddings, through_normalisation(unit * own_weight.unsqueeze(1), own, own_inverse)


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
    """The teacher's logits (K, B) of a gathered batch against this rank's shard of its classifier, without gradient.

    ``embeddings`` are (B, Dt), any norm: fp64 is computed in fp64, all else in fp32; ``labels`` (B,) int64 over all
    classes, negative ones for none; ``weights`` the classifier, (C, Dt). ``scale`` is the logit scale s,
    ``temperature`` T. ``chunk`` classes are taken at a time; None chooses by device. A ValueError names shapes that do
    not belong together.
    """
    check_matrices(embeddings, weights.centers, labels, "the teacher's ")
    with torch.autocast(embeddings.device.type, enabled=False):
        unit, _ = unit_and_inverse(embeddings.to(format_of_sums(embeddings)))
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
    row_m2: Tensor | None = None,
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
        row_m2: (B,) an angular margin for each row, as in
            :func:`~arcface_kd.losses.margin_softmax.sharded_margin_softmax`.

    Returns:
        The terms: means over rows with a label, 0 if there is none.

    Raises:
        ValueError: shapes, formats or a temperature that do not belong together.
    """
    check_matrices(embeddings, weights.centers, labels, "the student's ")
    wanted = (weights.visited, embeddings.shape[0])
    met = teacher.logits.values
    if met.shape != wanted or met.dtype != format_of_sums(embeddings):
        raise ValueError(
            f"the teacher's logits are {tuple(met.shape)} of {met.dtype}; wanted {wanted} of "
            f"{format_of_sums(embeddings)}, for the student's classes and rows"
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
        product_dtype=weights.product_dtype or format_of_sums(embeddings),
    )
    # The products' format is chosen here and nowhere else, so an autocast region around the call must not touch them.
    with torch.autocast(embeddings.device.type, enabled=False):
        return Distillation(
            *_LogitDistillation.apply(  # type: ignore[no-untyped-call]
                embeddings,
                weights.centers,
                labels,
                weights,
                teacher.logits,
                setting,
                None if row_m2 is None else row_m2.detach(),
            )
        )
