"""The passes over a shard's classes that margin softmax makes, a chunk of classes at a time.

The first finds each row's sum of exponentials and its weighted sum of unit centers. The second, for learned class
centers alone, finds the centers' gradient. Neither holds more than a chunk of the (classes, batch) logits.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from arcface_kd.losses.class_weights import VisitedClasses
from arcface_kd.losses.fused import fused
from arcface_kd.losses.margin import Margin
from arcface_kd.losses.narrow_products import WEIGHT_SCALE, RunningSoftmax, add_chunk, product

# A chunk's logits should stay in the processor's cache on a CPU, and in the last-level cache of a GPU as a rule.
_CHUNK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 23}
_LARGEST_CHUNK = 1 << 15
# Below, a chunk of its own for what is left takes longer to launch than it saves.
_ALIGNED_FROM = 1024

# exp(64), exp(-64) and the sum of two thousand million of them are normal numbers of fp32.
LARGEST_BARE_SCALE = 64.0


def chunk_size(batch: int, device: torch.device) -> int:
    """Classes in one chunk for a gathered batch, chosen so that a chunk's logits suit the device's memory."""
    budget = _CHUNK_ELEMENTS.get(device.type, _CHUNK_ELEMENTS["cuda"])
    return min(max(256, budget // max(batch, 1) // 256 * 256), _LARGEST_CHUNK)


def slices(length: int, size: int) -> Iterator[slice]:
    """Ranges of ``size`` that cover ``length``; the last may be shorter."""
    for first in range(0, length, max(size, 1)):
        yield slice(first, min(first + size, length))


def aligned_chunks(classes: int, chunk: int) -> Iterator[slice]:
    """Chunks of about ``chunk`` classes, alike and in sixteens, and behind them the few classes that are left.

    Tensor cores want rows of 16-bit numbers in eights, and Triton loads them in sixteens: on an H200 a class of an odd
    chunk took the products five times as long.
    """
    size = classes // max(round(classes / chunk), 1)
    if size >= _ALIGNED_FROM:
        size -= size % 16
    return slices(classes, size)


class ClassSums(NamedTuple):
    """Sums over the classes of this shard but the rows' targets."""

    shift: Tensor  # (B,) what exponentials are relative to: the largest logit or the log-sum-exp; -inf for no classes
    total: Tensor  # (B,) sum of ``exp(z - shift)``
    pull: Tensor  # (B, D) sum of ``exp(z - shift) w`` with unit centers w, times ``scale``
    scale: float  # see ``pull``


class _Chunk(NamedTuple):
    """One chunk of classes, ready for products: ``factor * inverse`` is the matrix of unit centers.

    In the sums' own format the norms are divided out of the (K, batch) products, which is cheaper than a normalised
    copy of (K, D); a narrower format needs a copy anyhow, and unit rows keep fp16 away from its smallest numbers.
    Classes stand in rows, as they do in memory: on a CPU the products are faster that way round.
    """

    rows: Tensor  # (K, D) centers as they are
    inverse: Tensor  # (K, 1) one over their norms
    logits: Tensor  # (K, B), the target's -inf
    filtered: Tensor | None  # (K, B) bool, logits that interclass filtering has set to 0


class _Chunks:
    """A shard's classes chunk by chunk beside one batch (B, D) of unit rows, in memory that all chunks share.

    Fresh memory for each chunk would cost more time than the exponentials.
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
        self._gathered = None
        if classes.sampled is not None:
            self._gathered = classes.centers.new_empty(self._size, unit.shape[1])
        self._target_place = classes.position * batch + torch.arange(batch, device=unit.device)

    def __len__(self) -> int:
        return -(-self._classes.visited // self._size)

    def part(self, number: int) -> slice:
        """A chunk's classes among the visited ones."""
        return slice(number * self._size, min((number + 1) * self._size, self._classes.visited))

    def load(self, number: int) -> _Chunk:
        """A chunk's centers and logits; they stay until the next one is loaded."""
        part = self.part(number)
        chosen, centers = self._classes.chosen(part), self._classes.centers
        if isinstance(chosen, Tensor) and self._gathered is not None:
            rows = torch.index_select(centers, 0, chosen, out=self._gathered[: len(chosen)]).to(self._dtype)
        else:
            rows = centers[chosen].to(self._dtype)
        inverse = self._classes.inverses(part, rows)
        logits = self._logits[: rows.shape[0]]
        if self.narrow:
            logits.copy_(product(unit_rows(rows, inverse, self._scaled.dtype), self._scaled.T))
        else:
            logits.addmm_(rows, self._scaled.T, beta=0).mul_(inverse)
        # Without a branch on data: no wait for the device.
        self._flat.index_fill_(0, _within(self._target_place, number * self._spare, self._spare), -torch.inf)
        filtered = None
        if self._threshold > 0:
            filtered = logits > self._threshold
            logits.masked_fill_(filtered, 0.0)
        return _Chunk(rows, inverse, logits, filtered)


@fused()
def _within(place: Tensor, first: int, size: int) -> Tensor:
    """Places relative to the first of a chunk; ``size`` for those that are not in the chunk."""
    place = place - first
    return torch.where((place >= 0) & (place < size), place, size)


@fused()
def unit_rows(rows: Tensor, inverse: Tensor | float, dtype: torch.dtype) -> Tensor:
    """Rows (K, D) times a factor, such as one over their norms (K, 1), in a narrow format."""
    return (rows * inverse).to(dtype)


def sum_over_classes(
    unit: Tensor, classes: VisitedClasses, margin: Margin, chunk: int, product_dtype: torch.dtype
) -> ClassSums:
    """The sum of exponentials and the weighted sum of centers over this shard's classes but the target.

    ``unit`` is (B, D); ``product_dtype`` is the format of the factors of the two matrix products.
    """
    if product_dtype != unit.dtype:
        return _sum_by_narrow_products(unit, classes, margin, chunk, product_dtype)
    follows = margin.scale > LARGEST_BARE_SCALE
    shift = unit.new_full((unit.shape[0],), -torch.inf if follows else 0.0)
    total = torch.zeros_like(shift)
    pull = torch.zeros_like(unit)
    chunks = _Chunks(unit, classes, margin, chunk, product_dtype)
    for number in range(len(chunks)):
        part = chunks.load(number)
        if follows:
            risen = torch.maximum(shift, part.logits.amax(0))
            base = finite(risen)
            fade = (shift - base).exp_()
            total.mul_(fade)
            pull.mul_(fade.unsqueeze(1))
            part.logits.sub_(base)
            shift = risen
        _to_weights(part.logits, part.filtered, part.inverse, total)
        pull.addmm_(part.logits.T, part.rows)
    if not follows:
        shift, total, pull = _relative_to_sum(total, pull)
    return ClassSums(shift, total, pull, 1.0)


@fused()
def _to_weights(logits: Tensor, filtered: Tensor | None, inverse: Tensor, total: Tensor) -> None:
    """Turn logits (K, B) into the weights of raw centers, and add their exponentials to ``total``."""
    logits.exp_()
    total.add_(logits.sum(0))
    if filtered is not None:
        logits.masked_fill_(filtered, 0.0)
    logits.mul_(inverse)


@fused()
def _relative_to_sum(total: Tensor, pull: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    shift = total.log()
    fade = finite(shift).neg().exp()
    return shift, total * fade, pull * fade.unsqueeze(1)


def _sum_by_narrow_products(
    unit: Tensor, classes: VisitedClasses, margin: Margin, chunk: int, product_dtype: torch.dtype
) -> ClassSums:
    """The same with narrow factors: rows stand in rows, so that a GPU's kernel has each row's logits side by side."""
    scaled = unit_rows(unit, margin.scale, product_dtype)
    running = RunningSoftmax.none(unit)
    pull: Tensor | None = None
    for chosen in aligned_chunks(classes.visited, chunk):
        rows = narrow_rows(classes, chosen, unit.dtype, product_dtype)
        logits = product(scaled, rows.T)
        weights = torch.empty(logits.shape, dtype=product_dtype, device=unit.device)
        add_chunk(logits, weights, classes.position, chosen.start, margin.filter_threshold * margin.scale, running)
        part = product(weights, rows)
        pull = part if pull is None else torch.addcmul(part, pull, running.fade.unsqueeze(1))
    return ClassSums(running.shift, running.total, torch.zeros_like(unit) if pull is None else pull, WEIGHT_SCALE)


def narrow_rows(classes: VisitedClasses, part: slice, dtype: torch.dtype, product_dtype: torch.dtype) -> Tensor:
    """Unit centers (K, D) of some of the visited classes, kept ones where there are any."""
    if classes.units is not None and classes.units.dtype == product_dtype:
        return classes.units[classes.chosen(part)]
    rows = classes.rows(part, dtype)
    return unit_rows(rows, classes.inverses(part, rows), product_dtype)


def finite(shift: Tensor) -> Tensor:
    """A row whose every class is its target has no logits: -inf - -inf would be nan."""
    return shift.nan_to_num(nan=torch.nan, posinf=0.0, neginf=0.0)


def gradient_in_centers(
    unit: Tensor,
    classes: VisitedClasses,
    margin: Margin,
    chunk: int,
    product_dtype: torch.dtype,
    shift: Tensor,
    share: Tensor,
    upstream: Tensor,
) -> Tensor:
    """The second pass: softmax weights again, times the embeddings; without the targets' own pull.

    ``shift`` (B,) is that of the first pass, ``share`` (B,) the factor from ``exp(z - shift)`` to the loss's derivative
    in the cosine, ``upstream`` the gradient in the loss.
    """
    dtype, centers, sampled = unit.dtype, classes.centers, classes.sampled
    if unit.shape[0] == 0:
        return torch.zeros_like(centers)
    result = torch.empty_like(centers) if sampled is None else torch.zeros_like(centers)
    chunks = _Chunks(unit, classes, margin, chunk, product_dtype)
    weighted, restore, shift = _shares(
        unit, share, shift, upstream, WEIGHT_SCALE if chunks.narrow else 1, product_dtype
    )
    buffer = None if unit.is_cuda else unit.new_empty(min(chunk, classes.visited), unit.shape[1])
    in_place = sampled is None and centers.dtype == product_dtype == dtype
    for number in range(len(chunks)):
        part, chosen = chunks.load(number), classes.chosen(chunks.part(number))
        weights = _softmax(part.logits, shift, part.filtered)
        if chunks.narrow:
            gradient = product(unit_rows(weights, WEIGHT_SCALE, product_dtype), weighted)
        else:
            gradient = result[chosen].addmm_(weights, weighted, beta=0) if in_place else weights @ weighted
        _through_norms(gradient, part.rows, part.inverse, restore, None if buffer is None else buffer[: len(gradient)])
        if not in_place:
            result[chosen] = gradient.to(result.dtype)
    return result


@fused(kernels=2)
def _shares(
    unit: Tensor, share: Tensor, shift: Tensor, upstream: Tensor, scale: float, product_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The embeddings times their shares, as a factor; what the product is multiplied by; and a finite shift.

    The largest share is divided out of the product and put back behind it: a loss scaled for fp16 and a mean over a
    large batch stay inside the format's range.
    """
    largest = share.amax().clamp_min(torch.finfo(unit.dtype).tiny)
    weighted = (unit * (share / largest).unsqueeze(1)).to(product_dtype)
    return weighted, largest * upstream / scale, finite(shift)


@fused()
def _softmax(logits: Tensor, shift: Tensor, filtered: Tensor | None) -> Tensor:
    logits.sub_(shift).exp_()
    return logits if filtered is None else logits.masked_fill_(filtered, 0.0)


@fused()
def _through_norms(gradient: Tensor, rows: Tensor, inverse: Tensor, restore: Tensor, buffer: Tensor | None) -> None:
    """From the gradient in unit centers to that in raw ones: less its part along the center, over the norm."""
    along = torch.mul(gradient, rows, out=buffer).sum(1, keepdim=True)
    gradient.addcmul_(rows, along * inverse.square(), value=-1).mul_(inverse * restore)
