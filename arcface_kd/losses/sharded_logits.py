"""The scaled cosines of a gathered batch and this rank's classes, kept as one matrix; and the products back.

Where a loss needs the same logits several times (to rank them, to sum over a group, to differentiate), keeping them
costs less than multiplying again. Classes stand in rows, as they do in memory.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from arcface_kd.losses.class_chunks import narrow_rows, slices, unit_rows
from arcface_kd.losses.class_weights import VisitedClasses, inverse_norm
from arcface_kd.losses.fused import fused
from arcface_kd.losses.narrow_products import product

# Stands where a row's target is: its exponential is 0, and unlike -inf it may be multiplied by 0 and subtracted.
HIDDEN = -1e30

# Of a buffer for each thread of a CPU: 256 KB of fp32.
_PASS_ELEMENTS = 1 << 16


def pass_size(chunk: int, batch: int, device: torch.device) -> int:
    """Classes at a time in a pass over kept logits: on a CPU its few buffers should stay in each core's cache."""
    if device.type != "cpu":
        return chunk
    return min(chunk, max(_PASS_ELEMENTS * torch.get_num_threads() // max(batch, 1), 1))


class ShardedLogits(NamedTuple):
    """Scaled cosines of a batch and the classes that a pass over this shard visits."""

    values: Tensor  # (K, B) ``factor * cos``, :data:`HIDDEN` where the class is the row's target
    own: Tensor  # (B,) the cosine of row and target, on the rank that holds it; finite, but of no meaning elsewhere
    inverse: Tensor  # (K, 1) one over the norms of the class centers
    factor: float  # what cosines are multiplied by


def sharded_logits(
    unit: Tensor, classes: VisitedClasses, factor: float, chunk: int, product_dtype: torch.dtype
) -> ShardedLogits:
    """Multiply unit rows (B, D) by this shard's class centers, ``chunk`` classes at a time.

    The targets' cosines are found in the format of the sums, the others with factors in ``product_dtype``.
    """
    batch, dtype, visited = unit.shape[0], unit.dtype, classes.visited
    # One element more takes what is written for rows whose target is elsewhere.
    flat = unit.new_empty(visited * batch + 1)
    values = flat[:-1].view(visited, batch)
    inverse = unit.new_empty(visited, 1)
    scaled = unit_rows(unit, factor, product_dtype).T
    for part in slices(visited, chunk):
        rows = classes.rows(part, dtype)
        if product_dtype == dtype:
            values[part].addmm_(rows, scaled, beta=0)
            # After the product, which has brought the rows near.
            inverse[part] = classes.inverses(part, rows)
            values[part].mul_(inverse[part])
        else:
            inverse[part] = classes.inverses(part, rows)
            values[part] = product(narrow_rows(classes, part, dtype, product_dtype), scaled)
    flat.index_fill_(0, _places(classes.position, visited), HIDDEN)
    return ShardedLogits(values, _own_cosines(unit, classes.centers, classes.target), inverse, factor)


@fused()
def _places(position: Tensor, visited: int) -> Tensor:
    """Where the targets are in the flat (visited, B) logits; behind them for those that are not there."""
    batch = len(position)
    place = position * batch + torch.arange(batch, device=position.device)
    return torch.where(position >= 0, place, visited * batch)


@fused()
def _own_cosines(unit: Tensor, centers: Tensor, target: Tensor) -> Tensor:
    own = centers[target].to(unit.dtype)
    return (unit * own).sum(1) * inverse_norm(own)


def gradients_through_cosines(
    write_weights: Callable[[slice, Tensor], None],
    unit: Tensor,
    classes: VisitedClasses,
    logits: ShardedLogits,
    chunk: int,
    product_dtype: torch.dtype,
    *,
    in_centers: bool,
) -> tuple[Tensor, Tensor | None]:
    """From a loss's derivatives in the cosines to its gradients in unit rows and raw class centers.

    ``write_weights`` is called once for each piece of the visited classes and writes the derivatives (k, B); the
    targets' share is the caller's to add: their weights are 0 here. The gradient in the centers (C, D), None where it
    is not wanted, loses its part along the center, ``sum_b g_jb cos_jb``, found from the (K, B) matrices: it is written
    once.
    """
    dtype, centers = unit.dtype, classes.centers
    narrow = product_dtype != dtype
    factor = unit.to(product_dtype)
    in_unit = torch.zeros_like(unit)
    result: Tensor | None = None
    if in_centers:
        result = torch.empty_like(centers) if classes.sampled is None else torch.zeros_like(centers)
    in_place = classes.sampled is None and centers.dtype == dtype and not narrow
    buffer = unit.new_empty(min(chunk, classes.visited), unit.shape[0])
    size = pass_size(chunk, unit.shape[0], unit.device)
    # Fresh memory for each piece would cost a CPU time; one kernel needs none.
    products = None if unit.is_cuda else torch.empty_like(buffer[:size])
    along = unit.new_empty(buffer.shape[0], 1)
    for part in slices(classes.visited, chunk):
        rows = classes.rows(part, dtype)
        inverse = logits.inverse[part]
        weights = buffer[: rows.shape[0]]
        for piece in slices(weights.shape[0], size):
            whole = slice(part.start + piece.start, part.start + piece.stop)
            write_weights(whole, weights[piece])
            if result is not None:
                out = None if products is None else products[: piece.stop - piece.start]
                along[piece] = _row_products(weights[piece], logits.values[whole], out)
            if not narrow:
                weights[piece].mul_(inverse[piece])
        if narrow:
            narrow_weights = weights.to(product_dtype)
            in_unit.add_(product(narrow_weights.T, narrow_rows(classes, part, dtype, product_dtype)))
        else:
            in_unit.addmm_(weights.T, rows)
        if result is None:
            continue
        lost = _lost(along[: rows.shape[0]], inverse, logits.factor)
        if in_place:
            torch.mul(rows, lost, out=result[part]).addmm_(weights, factor)
            continue
        pull = product(narrow_weights, factor) if narrow else weights @ factor
        result[classes.chosen(part)] = _pull(pull, rows, inverse if narrow else None, lost).to(result.dtype)
    return in_unit, result


@fused()
def _row_products(weights: Tensor, values: Tensor, out: Tensor | None) -> Tensor:
    return torch.mul(weights, values, out=out).sum(1, keepdim=True)


@fused()
def _lost(along: Tensor, inverse: Tensor, factor: float) -> Tensor:
    """What of a center its gradient loses, (k, 1)."""
    return along * (inverse * inverse / -factor)


@fused()
def _pull(pull: Tensor, rows: Tensor, inverse: Tensor | None, lost: Tensor) -> Tensor:
    return (pull if inverse is None else pull * inverse).addcmul_(rows, lost)
