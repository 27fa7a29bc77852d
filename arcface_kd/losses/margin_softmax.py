r"""Margin softmax over class centers that are split over ranks, in one pass over chunks of classes.

For a normalised embedding f_i with label y, normalised class centers w_j and the margin's psi,

    z_ij = s cos(f_i, w_j)  for j != y,      z_iy = s psi(cos(f_i, w_y)),
    loss = mean_i [ log sum_j exp(z_ij) - z_iy ].

The pass keeps, per row, the sum of exponentials and the exponentially weighted sum of centers, as flash attention does
(Dao et al., arXiv 2205.14135), so that loss and embedding gradient come out together and nothing of size
(batch, classes) is ever kept. Flash attention needs a running maximum besides; a logit here is at most s, so that the
maximum is only followed where exp(s) would leave the number format. The margin touches one column: the target is left
out of the sum and added at the end. Where the class centers want a gradient too (a learned classifier), the backward
pass walks over the chunks once more.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from arcface_kd.distributed.ranks import RankGroup
from arcface_kd.losses.class_chunks import chunk_size, gradient_in_centers, sum_over_classes
from arcface_kd.losses.class_weights import ClassWeights, check_matrices, format_of_sums, inverse_norm, visited_classes
from arcface_kd.losses.fused import fused
from arcface_kd.losses.gradients import finds_center_gradients
from arcface_kd.losses.margin import Margin


@fused()
def unit_and_inverse(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Normalised rows (B, D), and one over their norms (B, 1)."""
    inverse = inverse_norm(raw).unsqueeze(1)
    return raw * inverse, inverse


@fused()
def through_normalisation(gradient: Tensor, unit: Tensor, inverse: Tensor) -> Tensor:
    """The gradient in x of a function of x / |x|: from (B, D), that in the unit vector, and (B, 1), 1 / |x|."""
    return (gradient - (gradient * unit).sum(1, keepdim=True) * unit) * inverse


class _OwnClass(NamedTuple):
    """Each row's own class center, and its logit under the margin."""

    unit: Tensor  # (B, D)
    inverse: Tensor  # (B, 1) one over its norm
    logit: Tensor  # (B,), -inf where the class is another shard's
    slope: Tensor  # (B,) d psi / d cos


@fused()
def _own_class(unit: Tensor, centers: Tensor, target: Tensor, owned: Tensor, margin: Margin, m2: Tensor | None) -> Any:
    own = centers[target].to(unit.dtype)
    inverse = inverse_norm(own).unsqueeze(1)
    own = own * inverse
    psi, slope = margin.target((unit * own).sum(1), m2)
    return own, inverse, torch.where(owned, margin.scale * psi, -torch.inf), slope


@fused()
def _relative_to_top(shift: Tensor, total: Tensor, maximum: Tensor, target: Tensor, labels: Tensor) -> Any:
    """The other classes' sum relative to the largest logit of all, and each row's weight but for the mean."""
    valid = labels >= 0
    target = torch.where(valid, target, torch.zeros_like(target))
    top = torch.maximum(maximum, target)
    ours = (shift - top).exp()
    return total * ours, ours, top, target, valid.to(total.dtype)


@fused(kernels=3)
def _loss_and_shares(
    others: Tensor, ours: Tensor, top: Tensor, target: Tensor, valid: Tensor, slope: Tensor, owned: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and what the other classes' pull and the own center (B,) are multiplied by in its gradient."""
    whole = others + (target - top).exp()
    weight = valid / valid.sum().clamp_min(1)
    # log(1 + others / own) and 1 - p_y by their small parts: nothing cancels where p_y is nearly 1.
    odds = others.log() + (top - target)
    loss = (torch.logaddexp(odds, torch.zeros_like(odds)) * weight).sum()
    weight = scale * weight
    # Rows of other shards' maximum may be far above this shard's: the share underflows to 0 as it should.
    return loss, ours / whole * weight, -others / whole * slope * weight * owned


@fused()
def _gradient(
    pull: Tensor, share: Tensor, own: Tensor, miss: Tensor, unit: Tensor, inverse: Tensor, restore: float
) -> Tensor:
    return through_normalisation(pull * (share * restore).unsqueeze(1) + own * miss.unsqueeze(1), unit, inverse)


class _MarginSoftmax(torch.autograd.Function):
    """The loss of the gathered batch; its backward pass hands out what the forward pass has found already."""

    @staticmethod
    def forward(
        ctx: Any,
        embeddings: Tensor,
        centers: Tensor,
        labels: Tensor,
        weights: ClassWeights,
        margin: Margin,
        chunk: int,
        row_m2: Tensor | None,
    ) -> Tensor:
        dtype = format_of_sums(embeddings)
        product_dtype, ranks = weights.product_dtype or dtype, weights.ranks
        unit, inverse = unit_and_inverse(embeddings.to(dtype))
        classes = visited_classes(weights, labels)
        m2 = None if row_m2 is None else row_m2.to(dtype)
        own = _OwnClass(*_own_class(unit, centers, classes.target, classes.owned, margin, m2))
        local = sum_over_classes(unit, classes, margin, chunk, product_dtype)

        # One reduction finds the largest logit and brings every target from the one rank that holds it.
        maximum, target = ranks.max_of(local.shift, own.logit)
        part, ours, top, target, valid = _relative_to_top(local.shift, local.total, maximum, target, labels)
        others = ranks.sum_(part)
        loss, share, miss = _loss_and_shares(others, ours, top, target, valid, own.slope, classes.owned, margin.scale)
        in_embeddings = _gradient(local.pull, share, own.unit, miss, unit, inverse, 1 / local.scale)
        ctx.settings = (weights, margin, chunk, product_dtype, embeddings.dtype)
        if ctx.needs_input_grad[1]:
            saved = (in_embeddings, unit, own.unit, own.inverse, local.shift, share, miss, labels)
            ctx.save_for_backward(*saved, *weights.tensors())
        else:
            # Frozen centers may move before the backward pass, which does not look at them.
            ctx.save_for_backward(in_embeddings)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (upstream,) = gradients
        in_embeddings, *saved = ctx.saved_tensors
        weights, margin, chunk, product_dtype, embedding_dtype = ctx.settings
        in_centers = None
        if saved and finds_center_gradients():
            unit, own, own_inverse, shift, share, miss, labels, *tensors = saved
            classes = visited_classes(weights.with_tensors(*tensors), labels)
            # As in the forward pass, the products' format is chosen here and nowhere else.
            with torch.autocast(unit.device.type, enabled=False):
                in_centers = gradient_in_centers(unit, classes, margin, chunk, product_dtype, shift, share, upstream)
            # The target's own pull, which the margin's slope has scaled; rows of other ranks add zero.
            pull = through_normalisation(unit * (miss * upstream).unsqueeze(1), own, own_inverse)
            in_centers.index_add_(0, classes.target, pull.to(in_centers.dtype))
        wanted = ctx.needs_input_grad[0]
        return (in_embeddings * upstream).to(embedding_dtype) if wanted else None, in_centers, *(None,) * 5


def margin_softmax(
    embeddings: Tensor,
    labels: Tensor,
    centers: Tensor,
    margin: Margin,
    *,
    inverse_norms: Tensor | None = None,
    class_start: int = 0,
    index: Tensor | None = None,
    ranks: RankGroup | None = None,
    product_dtype: torch.dtype | None = None,
    chunk: int | None = None,
    row_m2: Tensor | None = None,
) -> Tensor:
    """:func:`sharded_margin_softmax` with the class weights given one by one.

    Args:
        embeddings: (B, D) gathered embeddings, any norm.
        labels: (B,) int64 labels over all classes, negative ones for none.
        centers: (C, D) class centers, any norm.
        margin: the margin and the logit scale.
        inverse_norms: (C,) one over the centers' norms, where they are known.
        class_start: the first class of this shard.
        index: (K,) int64, sorted positions of the classes that take part; None for all.
        ranks: the ranks that share the classes; None for a single process.
        product_dtype: number format of the matrix products' factors; None for that of the sums.
        chunk: classes at a time; None chooses by device.
        row_m2: (B,) an additive angular margin for each row in radians.

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: shapes that do not belong together.
    """
    ranks = ranks or RankGroup(alone=True)
    weights = ClassWeights(centers, inverse_norms, class_start, index, ranks, product_dtype)
    return sharded_margin_softmax(embeddings, labels, weights, margin, chunk=chunk, row_m2=row_m2)


def sharded_margin_softmax(
    embeddings: Tensor,
    labels: Tensor,
    weights: ClassWeights,
    margin: Margin,
    *,
    chunk: int | None = None,
    row_m2: Tensor | None = None,
) -> Tensor:
    """Margin softmax of a gathered batch against this rank's shard of the class centers.

    Every rank calls it with the same batch and gets the same loss; the gradient in ``embeddings`` is this shard's part,
    to be summed over ranks (``RankGroup.gather_with_gradient`` does). Class centers receive a gradient only where they
    ask for one.

    Memory: O(batch x chunk) beside the inputs, whatever the number of classes. Products: two of size batch x classes x
    dimension for frozen centers, four for learned ones.

    Args:
        embeddings: (B, D) gathered embeddings, any norm. fp64 is computed in fp64, all else in fp32.
        labels: (B,) int64 labels over all classes. A negative label takes its row out of the loss and the mean.
        weights: this rank's classes.
        margin: the margin and the logit scale.
        chunk: classes at a time; None chooses by device.
        row_m2: (B,) an additive angular margin for each row in radians, in [0, pi / 2], the same on every rank, in
            place of the margin's ``m2``; it gets no gradient. None gives all rows the margin's own. AdaFace's margin
            wants what its ``rows`` gives.

    Returns:
        The loss, a scalar: the mean over rows with a label, 0 if there is none.

    Raises:
        ValueError: shapes that do not belong together.
    """
    centers = weights.centers
    check_matrices(embeddings, centers, labels)
    if row_m2 is not None and row_m2.shape != labels.shape:
        raise ValueError(f"row_m2 {tuple(row_m2.shape)} must be one a row of embeddings {tuple(embeddings.shape)}")
    # The products' format is chosen here and nowhere else, so an autocast region around the call must not touch them.
    with torch.autocast(embeddings.device.type, enabled=False):
        loss: Tensor = _MarginSoftmax.apply(  # type: ignore[no-untyped-call]
            embeddings,
            centers,
            labels,
            weights,
            margin,
            chunk or chunk_size(embeddings.shape[0], embeddings.device),
            None if row_m2 is None else row_m2.detach(),
        )
    return loss
