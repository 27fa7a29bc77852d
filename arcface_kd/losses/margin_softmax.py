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
from arcface_kd.losses.class_weights import ClassWeights, VisitedClasses, inverse_norm, visited_classes
from arcface_kd.losses.margin import Margin

# A chunk's logits should stay in the processor's cache on a CPU, and fill the device on a GPU.
_CHUNK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 24}

# A chunk's weighted sum of unit centers stays below this number of classes, so that fp16 (up to 65504) can hold it.
_LARGEST_CHUNK = 1 << 15

# exp(64), exp(-64) and the sum of two thousand million of them are normal numbers of fp32 and bf16.
_LARGEST_BARE_SCALE = 64.0


def chunk_size(batch: int, device: torch.device) -> int:
    """Classes in one chunk for a gathered batch, chosen so that a chunk's logits suit the device's memory."""
    budget = _CHUNK_ELEMENTS.get(device.type, _CHUNK_ELEMENTS["cuda"])
    return min(max(256, budget // max(batch, 1) // 256 * 256), _LARGEST_CHUNK)


class _Chunk(NamedTuple):
    """One chunk of classes, ready for products: ``factor * inverse`` is the matrix of unit centers.

    In the sums' own format the norms are divided out of the (K, batch) products, which is cheaper than a normalised
    copy of (K, D); a narrower format needs a copy anyhow, and unit rows keep fp16 away from its smallest numbers.
    Classes stand in rows, as they do in memory: the products are faster that way round, and so is a factor per class.
    """

    rows: Tensor  # (K, D) centers as they are
    inverse: Tensor  # (K, 1) one over their norms
    factor: Tensor  # (K, D) rows, or unit rows in the products' narrower format
    logits: Tensor  # (K, B), the target's -inf
    filtered: Tensor | None  # (K, B) bool, logits that interclass filtering has set to 0


class _Chunks:
    """A shard's classes chunk by chunk beside one batch, in memory that all chunks share.

    Fresh memory for each chunk would cost more time than the exponentials.

    Args:
        unit: (B, D) normalised embeddings.
        classes: this rank's classes.
        margin: for the scale and the interclass filter.
        chunk: classes at a time.
        product_dtype: number format of the factors of the matrix products.
    """

    def __init__(
        self, unit: Tensor, classes: VisitedClasses, margin: Margin, chunk: int, product_dtype: torch.dtype
    ) -> None:
        batch, self._dtype = unit.shape[0], unit.dtype
        self._classes = classes
        self._threshold = margin.filter_threshold * margin.scale
        self._size = max(min(chunk, classes.visited), 1)
        self._scaled = (unit * margin.scale).to(product_dtype)
        self.narrow = product_dtype != unit.dtype
        # One element more takes what is written for rows whose target is in another chunk.
        self._spare = self._size * batch
        self._flat = unit.new_empty(self._spare + 1)
        self._logits = self._flat[:-1].view(self._size, batch)
        shape = (self._size, unit.shape[1])
        self._products = self._scaled.new_empty(self._size, batch) if self.narrow else self._logits
        self._factor = self._scaled.new_empty(shape) if self.narrow else None
        self._gathered = None if classes.sampled is None else classes.centers.new_empty(shape)
        self._target_chunk = classes.position.div(self._size, rounding_mode="floor")
        row = classes.position.remainder(self._size)
        self._target_place = row * batch + torch.arange(batch, device=unit.device)

    def __len__(self) -> int:
        return -(-self._classes.visited // self._size)

    def chosen(self, number: int) -> slice | Tensor:
        """A chunk's rows of the centers."""
        visited = slice(number * self._size, min((number + 1) * self._size, self._classes.visited))
        return visited if self._classes.sampled is None else self._classes.sampled[visited]

    def load(self, number: int) -> _Chunk:
        """A chunk's centers and logits; they stay until the next one is loaded."""
        chosen, centers, inverse_norms = self.chosen(number), self._classes.centers, self._classes.inverse_norms
        if isinstance(chosen, Tensor) and self._gathered is not None:
            rows = torch.index_select(centers, 0, chosen, out=self._gathered[: chosen.shape[0]])
        else:
            rows = centers[chosen]
        rows = rows.to(self._dtype)
        inverse = inverse_norm(rows) if inverse_norms is None else inverse_norms[chosen].to(self._dtype)
        inverse = inverse.unsqueeze(1)
        count = rows.shape[0]
        logits = self._logits[:count]
        if self._factor is None:
            factor = rows
            logits.addmm_(factor, self._scaled.T, beta=0).mul_(inverse)
        else:
            factor = torch.mul(rows, inverse, out=self._factor[:count])
            logits.copy_(self._products[:count].addmm_(factor, self._scaled.T, beta=0))
        # Without a branch on data: no wait for the device.
        hidden = torch.where(self._target_chunk == number, self._target_place, self._spare)
        self._flat.index_fill_(0, hidden, -torch.inf)
        filtered = None
        if self._threshold > 0:
            filtered = logits > self._threshold
            logits.masked_fill_(filtered, 0.0)
        return _Chunk(rows, inverse, factor, logits, filtered)

    def in_product_format(self, weights: Tensor) -> Tensor:
        """Weights (K, B) as a factor of a matrix product."""
        return self._products[: weights.shape[0]].copy_(weights) if self.narrow else weights

    def add_weighted_sum(self, part: _Chunk, weights: Tensor, result: Tensor) -> None:
        """Add ``weights.T @ unit centers`` to the (B, D) result; the weights (K, B) are used up."""
        if self.narrow:
            result.add_(self.in_product_format(weights).T @ part.factor)
        else:
            result.addmm_(weights.mul_(part.inverse).T, part.factor)


def _follows_maximum(margin: Margin, product_dtype: torch.dtype) -> bool:
    """Whether exponentials of the bare logits could leave the number format."""
    return margin.scale > _LARGEST_BARE_SCALE or product_dtype == torch.float16


class _Pass(NamedTuple):
    shift: Tensor  # (B,) this shard's largest non-target logit or log-sum-exp, -inf where it has none
    total: Tensor  # (B,) sum of exp(z - shift) over the non-target classes of this shard
    pull: Tensor  # (B, D) sum of exp(z - shift) w over them


def _pass_over_classes(
    unit: Tensor, classes: VisitedClasses, margin: Margin, chunk: int, product_dtype: torch.dtype
) -> _Pass:
    """The sum of exponentials and the weighted sum of centers over this shard's classes but the target.

    Args:
        unit: (B, D) normalised embeddings.
        classes: this rank's classes.
        margin: for the scale and the interclass filter.
        chunk: classes at a time.
        product_dtype: number format of the factors of the two matrix products.
    """
    follows = _follows_maximum(margin, product_dtype)
    shift = unit.new_full((unit.shape[0],), -torch.inf if follows else 0.0)
    total = torch.zeros_like(shift)
    pull = torch.zeros_like(unit)
    chunks = _Chunks(unit, classes, margin, chunk, product_dtype)
    for number in range(len(chunks)):
        part = chunks.load(number)
        if follows:
            risen = torch.maximum(shift, part.logits.amax(0))
            base = _finite(risen)
            fade = (shift - base).exp_()
            total.mul_(fade)
            pull.mul_(fade.unsqueeze(1))
            part.logits.sub_(base)
            shift = risen
        weights = part.logits.exp_()
        total.add_(weights.sum(0))
        if part.filtered is not None:
            weights.masked_fill_(part.filtered, 0.0)
        chunks.add_weighted_sum(part, weights, pull)
    if not follows:
        shift = total.log()
        fade = _finite(shift).neg().exp_()
        total.mul_(fade)
        pull.mul_(fade.unsqueeze(1))
    return _Pass(shift, total, pull)


def _finite(shift: Tensor) -> Tensor:
    """A row whose every class is its target has no logits: -inf - -inf would be nan."""
    return torch.where(shift.isinf(), torch.zeros_like(shift), shift)


def through_normalisation(gradient: Tensor, unit: Tensor, inverse: Tensor) -> Tensor:
    """The gradient in x of a function of x / |x|: from (B, D), that in the unit vector, and (B, 1), 1 / |x|."""
    return (gradient - (gradient * unit).sum(1, keepdim=True) * unit) * inverse


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
        dtype = torch.float64 if embeddings.dtype == torch.float64 else torch.float32
        product_dtype, ranks = weights.product_dtype or dtype, weights.ranks
        raw = embeddings.to(dtype)
        inverse = inverse_norm(raw).unsqueeze(1)
        unit = raw * inverse
        classes = visited_classes(weights, labels)

        own = centers[classes.target].to(dtype)
        own_inverse = inverse_norm(own).unsqueeze(1)
        own = own * own_inverse
        psi, slope = margin.target((unit * own).sum(1), None if row_m2 is None else row_m2.to(dtype))
        local = _pass_over_classes(unit, classes, margin, chunk, product_dtype)

        # One reduction finds the largest logit and brings every target from the one rank that holds it.
        target = torch.where(classes.owned, margin.scale * psi, torch.full_like(psi, -torch.inf))
        maximum, target = ranks.max_(torch.stack([local.shift, target])).unbind()
        valid = labels >= 0
        target = torch.where(valid, target, torch.zeros_like(target))
        top = torch.maximum(maximum, target)
        others = ranks.sum_(local.total * (local.shift - top).exp())
        whole = others + (target - top).exp()

        weight = valid.to(dtype) / valid.sum().clamp_min(1).to(dtype)
        # log(1 + others / own) and 1 - p_y by their small parts: nothing cancels where p_y is nearly 1.
        odds = others.log() + (top - target)
        loss = (torch.logaddexp(odds, torch.zeros_like(odds)) * weight).sum()

        scale = margin.scale * weight
        # Rows of other shards' maximum may be far above this shard's: the share underflows to 0 as it should.
        share = (local.shift - top).exp() / whole * scale
        miss = -others / whole * slope * scale * classes.owned
        gradient = local.pull * share.unsqueeze(1) + own * miss.unsqueeze(1)
        in_embeddings = through_normalisation(gradient, unit, inverse)
        ctx.settings = (weights, margin, chunk, product_dtype, embeddings.dtype)
        if ctx.needs_input_grad[1]:
            saved = (in_embeddings, unit, own, own_inverse, local.shift, share, miss, labels)
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
        if saved:
            unit, own, own_inverse, shift, share, miss, labels, *tensors = saved
            classes = visited_classes(weights.with_tensors(*tensors), labels)
            # As in the forward pass, the products' format is chosen here and nowhere else.
            with torch.autocast(unit.device.type, enabled=False):
                in_centers = _gradient_in_centers(unit, classes, margin, chunk, product_dtype, shift, share, upstream)
            # The target's own pull, which the margin's slope has scaled; rows of other ranks add zero to row 0.
            pull = through_normalisation(unit * (miss * upstream).unsqueeze(1), own, own_inverse)
            in_centers.index_add_(0, classes.target, pull.to(in_centers.dtype))
        wanted = ctx.needs_input_grad[0]
        return (in_embeddings * upstream).to(embedding_dtype) if wanted else None, in_centers, *(None,) * 5


def _gradient_in_centers(
    unit: Tensor,
    classes: VisitedClasses,
    margin: Margin,
    chunk: int,
    product_dtype: torch.dtype,
    shift: Tensor,
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
        shift: (B,) largest logit or log-sum-exp of this shard, from the first pass.
        share: (B,) factor from ``exp(z - shift)`` to the loss's derivative in the cosine.
        upstream: scalar, the gradient in the loss.
    """
    dtype, centers, sampled = unit.dtype, classes.centers, classes.sampled
    if unit.shape[0] == 0:
        return torch.zeros_like(centers)
    result = torch.empty_like(centers) if sampled is None else torch.zeros_like(centers)
    # The largest share is divided out of the product and put back behind it: a loss scaled for fp16 and a mean over a
    # large batch stay inside the format's range.
    largest = share.amax().clamp_min(torch.finfo(dtype).tiny)
    weighted = (unit * (share / largest).unsqueeze(1)).to(product_dtype)
    restore = largest * upstream
    shift = _finite(shift)
    chunks = _Chunks(unit, classes, margin, chunk, product_dtype)
    product = unit.new_empty(min(chunk, classes.visited), unit.shape[1])
    in_place = sampled is None and centers.dtype == product_dtype == dtype
    for number in range(len(chunks)):
        part, chosen = chunks.load(number), chunks.chosen(number)
        weights = part.logits.sub_(shift).exp_()
        if part.filtered is not None:
            weights.masked_fill_(part.filtered, 0.0)
        factor = chunks.in_product_format(weights)
        gradient = result[chosen].addmm_(factor, weighted, beta=0) if in_place else (factor @ weighted).to(dtype)
        # Through the normalisation without a copy: less its part along the center, over the center's norm.
        along = torch.mul(gradient, part.rows, out=product[: part.rows.shape[0]]).sum(1, keepdim=True)
        gradient.addcmul_(part.rows, along * part.inverse.square(), value=-1).mul_(part.inverse * restore)
        if not in_place:
            result[chosen] = gradient.to(result.dtype)
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
    row_m2: Tensor | None = None,
) -> Tensor:
    """:func:`sharded_margin_softmax` with the class weights given one by one.

    Args:
        embeddings: (B, D) gathered embeddings, any norm.
        labels: (B,) int64 labels over all classes, negative ones for none.
        centers: as in :class:`~arcface_kd.losses.class_weights.ClassWeights`, like the next five.
        margin: the margin and the logit scale.
        inverse_norms: see ``centers``.
        class_start: see ``centers``.
        index: see ``centers``.
        ranks: see ``centers``; None for a single process.
        product_dtype: see ``centers``.
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
            place of the margin's ``m2``; it gets no gradient. None gives all rows the margin's own.

    Returns:
        The loss, a scalar: the mean over rows with a label, 0 if there is none.

    Raises:
        ValueError: shapes that do not belong together.
    """
    centers = weights.centers
    if embeddings.ndim != 2 or centers.ndim != 2 or embeddings.shape[1] != centers.shape[1]:
        raise ValueError(
            f"embeddings {tuple(embeddings.shape)} and centers {tuple(centers.shape)} must be matrices of one dimension"
        )
    if labels.shape != embeddings.shape[:1]:
        raise ValueError(f"labels {tuple(labels.shape)} must be one a row of embeddings {tuple(embeddings.shape)}")
    if row_m2 is not None and row_m2.shape != labels.shape:
        raise ValueError(f"row_m2 {tuple(row_m2.shape)} must be one a row of embeddings {tuple(embeddings.shape)}")
    # The products' format is chosen here and nowhere else, so an autocast region around the call must not touch them.
    with torch.autocast(embeddings.device.type, enabled=False):
        loss: Tensor = _MarginSoftmax.apply(
            embeddings,
            centers,
            labels,
            weights,
            margin,
            chunk or chunk_size(embeddings.shape[0], embeddings.device),
            None if row_m2 is None else row_m2.detach(),
        )
    return loss
