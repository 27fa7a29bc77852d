"""Products of narrow factors with fp32 results, and the softmax of a chunk of their logits.

Logits of up to 64 in 16 bits are what costs a narrow head its precision, not the narrow factors: an fp16 logit of 40 is
rounded to 1/32. So factors are narrow (tensor cores take them), products and sums are fp32.

On a GPU a chunk's softmax is one kernel in Triton: it hides the targets, follows each row's largest logit, and writes
exponentials as the next product's narrow factor with their sums. Elsewhere torch's own operations do the same.
"""

import functools
import importlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from arcface_kd.losses.fused import on_gpu

# Exponentials relative to the largest are at most 1. Times this, fp16 still holds all of them (up to 65504), and its
# smallest normal number, 6e-5, becomes 2e-9. The product's fp32 results have room for the sum.
WEIGHT_SCALE = 2.0**15


def product(a: Tensor, b: Tensor) -> Tensor:
    """The (M, N) product of narrow matrices (M, K) and (K, N), in fp32."""
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    # A CPU's product of narrow factors rounds its result to their format, and is no faster without AMX.
    return a.float() @ b.float()


class RunningSoftmax(NamedTuple):
    """What a pass over chunks of classes keeps of each row, (B,) each; it starts as :meth:`none` and is written to."""

    shift: Tensor  # the largest logit so far but for the target's; -inf before the first
    total: Tensor  # sum of ``exp(z - shift)``
    fade: Tensor  # what sums of the chunks before the last are multiplied by, now that the shift has risen

    @classmethod
    def none(cls, like: Tensor) -> "RunningSoftmax":
        """That of no classes, for (B, ...) rows."""
        rows = like.new_zeros(2, like.shape[0])
        return cls(torch.full_like(rows[0], -torch.inf), rows[0], rows[1])


def add_chunk(
    logits: Tensor, weights: Tensor, position: Tensor, first: int, threshold: float, running: RunningSoftmax
) -> None:
    """Take a chunk's logits into the running softmax, and write the weights of its classes.

    ``logits`` (B, K), fp32 and contiguous, are used up. ``weights`` (B, K), narrow and contiguous, get ``WEIGHT_SCALE *
    exp(z - shift)``, 0 for targets and for what interclass filtering (logits above ``threshold``) hides. ``position``
    (B,) is the target's among all classes, ``first`` that of the chunk's first class.
    """
    chosen = on_gpu(_add_chunk, 1, _add_chunk_by_kernel) if logits.is_cuda else _add_chunk
    chosen(logits, weights, position, first, threshold, running)


def _add_chunk(
    logits: Tensor, weights: Tensor, position: Tensor, first: int, threshold: float, running: RunningSoftmax
) -> None:
    columns = torch.arange(first, first + logits.shape[1], device=logits.device)
    logits.masked_fill_(columns == position.unsqueeze(1), -torch.inf)
    filtered = None
    if threshold > 0:
        filtered = logits > threshold
        logits.masked_fill_(filtered, 0.0)
    risen = torch.maximum(running.shift, logits.amax(1))
    # A row whose every class is its target has no logits: -inf - -inf would be nan.
    base = risen.nan_to_num(nan=torch.nan, neginf=0.0)
    torch.exp(running.shift - base, out=running.fade)
    running.shift.copy_(risen)
    logits.sub_(base.unsqueeze(1)).exp_()
    running.total.mul_(running.fade).add_(logits.sum(1))
    if filtered is not None:
        logits.masked_fill_(filtered, 0.0)
    torch.mul(logits, WEIGHT_SCALE, out=logits)
    weights.copy_(logits)


def _add_chunk_by_kernel(
    logits: Tensor, weights: Tensor, position: Tensor, first: int, threshold: float, running: RunningSoftmax
) -> None:
    batch, classes = logits.shape
    if not batch:
        return
    block = min(2048, max(16, 1 << (classes - 1).bit_length()))
    with torch.cuda.device_of(logits):
        kernel()[(batch,)](
            *(logits, weights, position, *running, classes, first, threshold, WEIGHT_SCALE),
            FILTERS=threshold > 0,
            BLOCK=block,
        )


@functools.cache
def kernel() -> Any:
    """The Triton kernel of :func:`add_chunk`: a program a row, which goes over the chunk twice."""
    # Not everywhere where torch is.
    triton = importlib.import_module("triton")
    tl = importlib.import_module("triton.language")

    def add_chunk_kernel(  # type: ignore[no-untyped-def]
        logits, weights, position, shift, total, fade, classes, first, threshold, scale,
        FILTERS: tl.constexpr, BLOCK: tl.constexpr,  # type: ignore[name-defined]
    ):  # fmt: skip
        row = tl.program_id(0)
        begin_of_row = row.to(tl.int64) * classes
        target = tl.load(position + row) - first
        before = tl.load(shift + row)
        largest = before
        for begin in range(0, classes, BLOCK):
            column = begin + tl.arange(0, BLOCK)
            z = tl.load(logits + begin_of_row + column, mask=column < classes, other=-float("inf"))
            z = tl.where(column == target, -float("inf"), z)
            if FILTERS:
                z = tl.where(z > threshold, 0.0, z)
            largest = tl.maximum(largest, tl.max(z, 0))
        base = tl.where(largest == -float("inf"), 0.0, largest)
        added = base * 0.0
        for begin in range(0, classes, BLOCK):
            column = begin + tl.arange(0, BLOCK)
            z = tl.load(logits + begin_of_row + column, mask=column < classes, other=-float("inf"))
            z = tl.where(column == target, -float("inf"), z)
            hidden = z > threshold
            if FILTERS:
                z = tl.where(hidden, 0.0, z)
            weight = tl.exp(z - base)
            added += tl.sum(weight, 0)
            if FILTERS:
                weight = tl.where(hidden, 0.0, weight)
            narrow = (weight * scale).to(weights.dtype.element_ty)
            tl.store(weights + begin_of_row + column, narrow, mask=column < classes)
        faded = tl.exp(before - base)
        tl.store(total + row, tl.load(total + row) * faded + added)
        tl.store(shift + row, largest)
        tl.store(fade + row, faded)

    return triton.jit(add_chunk_kernel)
