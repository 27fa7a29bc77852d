r"""Margin softmax over class centers that are split over ranks, in one pass over chunks of classes.

For a normalised embedding f_i with label y, normalised class centers w_j and the margin's psi,

    z_ij = s cos(f_i, w_j)  for j != y,      z_iy = s psi(cos(f_i, w_y)),
    loss = mean_i [ log sum_j exp(z_ij) - z_iy ].

The pass keeps, per row, a running maximum, the sum of exponentials and the exponentially weighted sum of centers, as
flash attention does (Dao et al., arXiv 2205.14135), so that loss and embedding gradient come out together
and nothing of size (batch, classes) is ever kept. The margin touches one column: the target is left out of the sum and
added at the end. Where the class centers want a gradient too (a learned classifier), the backward pass walks over the
chunks once more.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from arcface_kd.losses.margin import Margin
from arcface_kd.sharding import RankGroup, positions_in_shard

# A chunk's logits should stay in the processor's cache on a CPU, and fill the device on a GPU.
_CHUNK_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 24}


# A chunk's weighted sum of unit centers stays below this number of classes, so that fp16 (up to 65504) can hold it.
_LARGEST_CHUNK = 1 << 15


def chunk_size(batch: int, device: torch.device) -> int:
    """Classes in one chunk for a gathered batch, chosen so that a chunk's logits suit the device's memory."""
    budget = _CHUNK_ELEMENTS.get(device.type, _CHUNK_ELEMENTS["cuda"])
    return min(max(256, budget // max(batch, 1) // 256 * 256), _LARGEST_CHUNK)


class _Classes(NamedTuple):
    """This rank's classes as one pass sees them: the centers, the sampled rows and where the targets stand.

    Attributes:
        centers: (C, D) class centers of this shard, not normalised.
        inverse_norms: (C,) one over each center's norm, or None to find it on the way.
        sampled: (K,) sorted positions of the sampled classes, or None for all.
        position: (B,) the target's position among the classes that the pass visits; -1 where it is not here.
        target: (B,) the target's position in ``centers``; 0 where it is not here.
        owned: (B,) bool, whether the target is on this rank.
    """

    centers: Tensor
    inverse_norms: Tensor | None
    sampled: Tensor | None
    position: Tensor
    target: Tensor
    owned: Tensor

    @property
    def visited(self) -> int:
        return self.centers.shape[0] if self.sampled is None else self.sampled.shape[0]

    def rows(self, start: int, dtype: torch.dtype, chunk: int) -> tuple[Tensor, Tensor]:
        """One chunk's centers (K, D) as they are and one over their norms (K,)."""
        stop = min(start + chunk, self.visited)
        chosen = slice(start, stop) if self.sampled is None else self.sampled[start:stop]
        rows = self.centers[chosen].to(dtype)
        if self.inverse_norms is None:
            return rows, inverse_norm(rows)
        return rows, self.inverse_norms[chosen].to(dtype)


def inverse_norm(rows: Tensor) -> Tensor:
    """One over the L2 norm of each row of a (..., D) tensor; finite for rows of zeros."""
    return rows.norm(dim=-1).clamp_min(1e-12).reciprocal()


def _classes(
    centers: Tensor, inverse_norms: Tensor | None, labels: Tensor, class_start: int, index: Tensor | None
) -> _Classes:
    target, owned = positions_in_shard(labels, class_start, centers.shape[0])
    if index is None:
        return _Classes(centers, inverse_norms, None, torch.where(owned, target, -1), target, owned)
    place = torch.searchsorted(index, target).clamp_max(max(index.shape[0] - 1, 0))
    if index.shape[0] == 0:
        return _Classes(centers, inverse_norms, index, torch.full_like(target, -1), target, owned)
    visited = owned & (index[place] == target)
    return _Classes(centers, inverse_norms, index, torch.where(visited, place, -1), target, owned)


def _hide_target(logits: Tensor, classes: _Classes, start: int, value: float) -> None:
    """Overwrite each row's target, where this chunk holds it. Without a branch on data: no wait for the device."""
    column = classes.position - start
    here = (column >= 0) & (column < logits.shape[1])
    column = torch.where(here, column, torch.zeros_like(column)).unsqueeze(1)
    kept = logits.gather(1, column)
    logits.scatter_(1, column, torch.where(here.unsqueeze(1), torch.full_like(kept, value), kept))


class _Chunk(NamedTuple):
    """One chunk of classes, ready for products: ``factor * inverse`` is the matrix of unit centers.

    In the sums' own format the norms are divided out of the (batch, K) products, which is cheaper than a normalised
    copy of (K, D); a narrower format needs a copy anyhow, and unit rows keep fp16 away from its smallest numbers.
    """

    factor: Tensor  # (K, D) in the products' format
    inverse: Tensor | None  # (K,) or None where the factor has unit rows already

    def cosines(self, unit: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, K) products of (B, D) rows with the unit centers."""
        product = (unit @ self.factor.T).to(dtype)
        return product if self.inverse is None else product.mul_(self.inverse)

    def add_weighted_sum(self, weights: Tensor, result: Tensor) -> None:
        """Add ``weights @ unit centers`` to the (B, D) result; the weights (B, K) are used up."""
        if self.inverse is None:
            result.add_(weights.to(self.factor.dtype) @ self.factor)
        else:
            result.addmm_(weights.mul_(self.inverse), self.factor)


def _chunk_of(rows: Tensor, inverse: Tensor, product_dtype: torch.dtype) -> _Chunk:
    if product_dtype == rows.dtype:
        return _Chunk(rows, inverse)
    return _Chunk((rows * inverse.unsqueeze(1)).to(product_dtype), None)


class _Pass(NamedTuple):
    maximum: Tensor  # (B,) largest non-target logit of this shard, -inf where there is none
    total: Tensor  # (B,) sum of exp(z - maximum) over the non-target classes of this shard
    pull: Tensor  # (B, D) sum of exp(z - maximum) w over them


def _pass_over_classes(
    embeddings: Tensor, classes: _Classes, margin: Margin, chunk: int, product_dtype: torch.dtype
) -> _Pass:
    """The running maximum, sum and weighted sum of centers over this shard's classes but the target.

    Args:
        embeddings: (B, D) normalised embeddings times the logit scale.
        classes: this rank's classes.
        margin: for the scale and the interclass filter.
        chunk: classes at a time.
        product_dtype: number format of the factors of the two matrix products.
    """
    batch, dtype = embeddings.shape[0], embeddings.dtype
    maximum = embeddings.new_full((batch, 1), -torch.inf)
    total = embeddings.new_zeros(batch, 1)
    pull = torch.zeros_like(embeddings)
    factor = embeddings.to(product_dtype)
    for start in range(0, classes.visited, chunk):
        part = _chunk_of(*classes.rows(start, dtype, chunk), product_dtype)
        logits = part.cosines(factor, dtype)
        _hide_target(logits, classes, start, -torch.inf)
        filtered = None
        if margin.filter_threshold > 0:
            filtered = logits > margin.filter_threshold * margin.scale
            logits.masked_fill_(filtered, 0.0)
        risen = torch.maximum(maximum, logits.amax(1, keepdim=True))
        # A row whose every class is its target has no maximum yet: -inf - -inf would be nan.
        shift = torch.where(risen.isinf(), torch.zeros_like(risen), risen)
        fade = (maximum - shift).exp_()
        weights = logits.sub_(shift).exp_()
        total.mul_(fade).add_(weights.sum(1, keepdim=True))
        if filtered is not None:
            weights.masked_fill_(filtered, 0.0)
        part.add_weighted_sum(weights, pull.mul_(fade))
        maximum = risen
    return _Pass(maximum.squeeze(1), total.squeeze(1), pull)


def _through_normalisation(gradient: Tensor, unit: Tensor, inverse: Tensor) -> Tensor:
    """The gradient in x of a function of x / |x|, given its gradient in the unit vector and 1 / |x| as (B, 1)."""
    return (gradient - (gradient * unit).sum(1, keepdim=True) * unit) * inverse


class _MarginSoftmax(torch.autograd.Function):
    """The loss of the gathered batch; its backward pass hands out what the forward pass has found already."""

    @staticmethod
    def forward(
        ctx: Any,
        embeddings: Tensor,
        centers: Tensor,
        inverse_norms: Tensor | None,
        labels: Tensor,
        index: Tensor | None,
        margin: Margin,
        class_start: int,
        ranks: RankGroup,
        chunk: int,
        product_dtype: torch.dtype,
    ) -> Tensor:
        dtype = torch.float64 if embeddings.dtype == torch.float64 else torch.float32
        raw = embeddings.to(dtype)
        inverse = inverse_norm(raw).unsqueeze(1)
        unit = raw * inverse
        classes = _classes(centers, inverse_norms, labels, class_start, index)

        own = centers[classes.target].to(dtype)
        own_inverse = inverse_norm(own).unsqueeze(1)
        own = own * own_inverse
        psi, slope = margin.target((unit * own).sum(1))
        local = _pass_over_classes(unit * margin.scale, classes, margin, chunk, product_dtype)

        # One reduction finds the largest logit and brings every target from the one rank that holds it.
        target = torch.where(classes.owned, margin.scale * psi, torch.full_like(psi, -torch.inf))
        maximum, target = ranks.max_(torch.stack([local.maximum, target])).unbind()
        valid = labels >= 0
        target = torch.where(valid, target, torch.zeros_like(target))
        top = torch.maximum(maximum, target)
        others = ranks.sum_(local.total * (local.maximum - top).exp())
        whole = others + (target - top).exp()

        weight = valid.to(dtype) / valid.sum().clamp_min(1).to(dtype)
        # log(1 + others / own) and 1 - p_y by their small parts: nothing cancels where p_y is nearly 1.
        odds = others.log() + (top - target)
        loss = (torch.logaddexp(odds, torch.zeros_like(odds)) * weight).sum()

        scale = margin.scale * weight
        # Rows of other shards' maximum may be far above this shard's: the share underflows to 0 as it should.
        share = (local.maximum - top).exp() / whole * scale
        miss = -others / whole * slope * scale * classes.owned
        gradient = local.pull * share.unsqueeze(1) + own * miss.unsqueeze(1)
        in_embeddings = _through_normalisation(gradient, unit, inverse)
        ctx.settings = (margin, class_start, chunk, product_dtype, embeddings.dtype)
        if ctx.needs_input_grad[1]:
            ctx.save_for_backward(
                in_embeddings, unit, own, own_inverse, local.maximum, share, miss, centers, inverse_norms, labels, index
            )
        else:
            # Frozen centers may move before the backward pass, which does not look at them.
            ctx.save_for_backward(in_embeddings)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (upstream,) = gradients
        in_embeddings, *saved = ctx.saved_tensors
        margin, class_start, chunk, product_dtype, embedding_dtype = ctx.settings
        in_centers = None
        if saved:
            unit, own, own_inverse, maximum, share, miss, centers, inverse_norms, labels, index = saved
            classes = _classes(centers, inverse_norms, labels, class_start, index)
            # As in the forward pass, the products' format is chosen here and nowhere else.
            with torch.autocast(unit.device.type, enabled=False):
                in_centers = _gradient_in_centers(unit, classes, margin, chunk, product_dtype, maximum, share, upstream)
            # The target's own pull, which the margin's slope has scaled; rows of other ranks add zero to row 0.
            pull = _through_normalisation(unit * (miss * upstream).unsqueeze(1), own, own_inverse)
            in_centers.index_add_(0, classes.target, pull.to(in_centers.dtype))
        wanted = ctx.needs_input_grad[0]
        return (in_embeddings * upstream).to(embedding_dtype) if wanted else None, in_centers, *(None,) * 8


def _gradient_in_centers(
    unit: Tensor,
    classes: _Classes,
    margin: Margin,
    chunk: int,
    product_dtype: torch.dtype,
    maximum: Tensor,
    share: Tensor,
    upstream: Tensor,
) -> Tensor:
    """The second pass: softmax weights again, and their product with the embeddings, but for the targets' own pull.

    Args:
        unit: (B, D) normalised embeddings.
        classes: this rank's classes.
        margin: for the scale and the interclass filter.
        chunk: classes at a time.
        product_dtype: number format of the factors of the two matrix products.
        maximum: (B,) largest non-target logit of this shard, from the first pass.
        share: (B,) factor from ``exp(z - maximum)`` to the loss's derivative in the cosine.
        upstream: scalar, the gradient in the loss.
    """
    dtype, centers = unit.dtype, classes.centers
    result = torch.zeros_like(centers)
    if unit.shape[0] == 0:
        return result
    # The largest share is divided out of the product and put back behind it: a loss scaled for fp16 and a mean over a
    # large batch stay inside the format's range.
    largest = share.amax().clamp_min(torch.finfo(dtype).tiny)
    factor = (unit * margin.scale).to(product_dtype)
    weighted = (unit * (share / largest).unsqueeze(1)).to(product_dtype)
    restore = largest * upstream
    shift = torch.where(maximum.isinf(), torch.zeros_like(maximum), maximum).unsqueeze(1)
    for start in range(0, classes.visited, chunk):
        rows, inverse = classes.rows(start, dtype, chunk)
        logits = _chunk_of(rows, inverse, product_dtype).cosines(factor, dtype)
        _hide_target(logits, classes, start, -torch.inf)
        filtered = logits > margin.filter_threshold * margin.scale if margin.filter_threshold > 0 else None
        if filtered is not None:
            logits.masked_fill_(filtered, 0.0)
        weights = logits.sub_(shift).exp_()
        if filtered is not None:
            weights.masked_fill_(filtered, 0.0)
        gradient = (weights.to(product_dtype).T @ weighted).to(dtype)
        inverse = inverse.unsqueeze(1)
        gradient = _through_normalisation(gradient, rows * inverse, inverse * restore).to(centers.dtype)
        if classes.sampled is None:
            result[start : start + rows.shape[0]] = gradient
        else:
            result[classes.sampled[start : start + rows.shape[0]]] = gradient
    return result


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
) -> Tensor:
    """Margin softmax of a gathered batch against this rank's shard of the class centers.

    Every rank calls it with the same batch and gets the same loss; the gradient in ``embeddings`` is this shard's part,
    to be summed over ranks (:meth:`~arcface_kd.sharding.RankGroup.gather_with_gradient` does). Class centers receive a
    gradient only where they ask for one.

    Memory: O(batch x chunk) beside the inputs, whatever the number of classes. Products: two of size batch x classes x
    dimension for frozen centers, four for learned ones.

    Args:
        embeddings: (B, D) gathered embeddings, any norm. fp64 is computed in fp64, all else in fp32.
        labels: (B,) int64 labels over all classes. A negative label takes its row out of the loss and the mean.
        centers: (C, D) class centers of this shard, any norm.
        margin: the margin and the logit scale.
        inverse_norms: (C,) one over each center's norm, where the caller keeps it; None finds it in every pass.
        class_start: the first class of this shard.
        index: (K,) int64, sorted positions of the classes that take part (PartialFC's sample), or None for all. Targets
            take part always.
        ranks: the ranks that share the classes; None for a single process.
        product_dtype: number format of the matrix products' factors (``torch.bfloat16``, ``torch.float16``); sums and
            exponentials stay in fp32. None means the format of the sums.
        chunk: classes at a time; None chooses by device.

    Returns:
        The loss, a scalar: the mean over rows with a label, 0 if there is none.

    Raises:
        ValueError: shapes that do not belong together.
    """
    if embeddings.ndim != 2 or centers.ndim != 2 or embeddings.shape[1] != centers.shape[1]:
        raise ValueError(
            f"embeddings {tuple(embeddings.shape)} and centers {tuple(centers.shape)} must be matrices of one dimension"
        )
    if labels.shape != embeddings.shape[:1]:
        raise ValueError(f"labels {tuple(labels.shape)} must be one a row of embeddings {tuple(embeddings.shape)}")
    dtype = torch.float64 if embeddings.dtype == torch.float64 else torch.float32
    # The products' format is chosen here and nowhere else, so an autocast region around the call must not touch them.
    with torch.autocast(embeddings.device.type, enabled=False):
        loss: Tensor = _MarginSoftmax.apply(
            embeddings,
            centers,
            inverse_norms,
            labels,
            None if index is None else index.contiguous(),
            margin,
            class_start,
            ranks or RankGroup(alone=True),
            chunk or chunk_size(embeddings.shape[0], embeddings.device),
            product_dtype or dtype,
        )
    return loss
