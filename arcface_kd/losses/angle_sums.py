r"""RKD's angles between the rows of a batch: sums over them and their gradient, without keeping the B^3 angles.

With G the inner products of unit embeddings, d_vi the distance of rows v and i, and a_vi = G_vi - G_vv / 2, the cosine
of the angle at v between i and k is

    A_vik = (G_ik - a_vi - a_vk) / (d_vi d_vk)

A loss over them and its gradient in G need sums over one index only: over v, and over k. On a GPU one Triton kernel
finds these sums; elsewhere angles are made for a few v at a time.
"""

import functools
import importlib
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from arcface_kd.losses.fused import fused, on_gpu

# Angles of one chunk: they should stay in the processor's cache on a CPU.
_CHUNK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 25}


def distances(gram: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """Distances (R, B) of some rows to all, 0 where two are the same point, and bool (R, B), where they are not."""
    own = gram.diagonal()
    squared = own[rows].unsqueeze(1) + own - 2 * gram[rows]
    # What inner products of unit vectors lose by rounding is no distance.
    apart = squared > 16 * torch.finfo(gram.dtype).eps
    # The square root has no derivative at 0.
    return torch.where(apart, squared, 1).sqrt() * apart, apart


class AngleSums(NamedTuple):
    """Sums over the angles at V vertices, with D = A of the student - A of the teacher, cut to [-1, 1]."""

    loss: Tensor  # scalar: of Huber's differences
    over_vertices: Tensor  # (B, B) sum over v of D / (d_vi d_vk)
    over_rows: Tensor  # (V, B) sum over k of the same
    of_angles: Tensor  # (V, B) sum over k of D A of the student


class _Side(NamedTuple):
    """What the angles at V vertices follow from."""

    gram: Tensor  # (B, B)
    near: Tensor  # (V, B) a_vi
    inverse: Tensor  # (V, B) 1 / d_vi, 0 where the two are one point


@fused()
def _side(gram: Tensor, first: int, last: int) -> _Side:
    vertices = slice(first, last)
    distance, apart = distances(gram, vertices)
    near = gram[vertices] - gram.diagonal()[vertices].unsqueeze(1) / 2
    return _Side(gram, near, apart / torch.where(apart, distance, 1))


def _angle_sums(student: _Side, teacher: _Side) -> AngleSums:
    def angles(side: _Side) -> Tensor:
        along = side.gram - side.near.unsqueeze(2) - side.near.unsqueeze(1)
        return along.mul_(side.inverse.unsqueeze(2)).mul_(side.inverse.unsqueeze(1))

    own = angles(student)
    difference = own - angles(teacher)
    cut = difference.clamp(-1, 1)
    loss = (cut * (difference - cut / 2)).sum()
    of_angles = (cut * own).sum(2)
    cut.mul_(student.inverse.unsqueeze(2)).mul_(student.inverse.unsqueeze(1))
    return AngleSums(loss, cut.sum(0), cut.sum(2), of_angles)


def _angle_sums_by_kernel(student: _Side, teacher: _Side) -> AngleSums:
    vertices, batch = student.near.shape
    loss, rows = student.gram.new_zeros(1), student.gram.new_zeros(2, vertices, batch)
    over_vertices = torch.empty_like(student.gram)
    tile, triton = (32, 64), importlib.import_module("triton")
    with torch.cuda.device_of(student.gram):
        kernel()[(triton.cdiv(batch, tile[0]), triton.cdiv(batch, tile[1]))](
            *(student.gram.contiguous(), teacher.gram.contiguous(), student.near, teacher.near),
            *(student.inverse, teacher.inverse, over_vertices, rows[0], rows[1], loss, vertices, batch),
            ROWS=tile[0],
            COLUMNS=tile[1],
        )
    return AngleSums(loss[0], over_vertices, rows[0], rows[1])


@functools.cache
def kernel() -> Any:
    """The Triton kernel of the sums: a program for each tile of pairs (i, k), which goes over the vertices."""
    # Not everywhere where torch is.
    triton = importlib.import_module("triton")
    tl = importlib.import_module("triton.language")

    def angle_kernel(  # type: ignore[no-untyped-def]
        gram, gram_t, near, near_t, inverse, inverse_t, over_vertices, over_rows, of_angles, loss, vertices, batch,
        ROWS: tl.constexpr, COLUMNS: tl.constexpr,  # type: ignore[name-defined]
    ):  # fmt: skip
        i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        k = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        in_i, in_k = i < batch, k < batch
        pairs = i[:, None] * batch + k[None, :]
        inside = in_i[:, None] & in_k[None, :]
        g = tl.load(gram + pairs, mask=inside, other=0.0)
        g_t = tl.load(gram_t + pairs, mask=inside, other=0.0)
        total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        sum_of_losses = tl.zeros((ROWS,), dtype=tl.float32)
        for vertex in range(0, vertices):
            at_i, at_k = vertex * batch + i, vertex * batch + k
            # Outside of the batch inverse distances are 0, and so is all that follows.
            scale = (
                tl.load(inverse + at_i, mask=in_i, other=0.0)[:, None]
                * tl.load(inverse + at_k, mask=in_k, other=0.0)[None, :]
            )
            scale_t = (
                tl.load(inverse_t + at_i, mask=in_i, other=0.0)[:, None]
                * tl.load(inverse_t + at_k, mask=in_k, other=0.0)[None, :]
            )
            near_i = tl.load(near + at_i, mask=in_i, other=0.0)[:, None]
            near_k = tl.load(near + at_k, mask=in_k, other=0.0)[None, :]
            near_i_t = tl.load(near_t + at_i, mask=in_i, other=0.0)[:, None]
            near_k_t = tl.load(near_t + at_k, mask=in_k, other=0.0)[None, :]
            angle = (g - near_i - near_k) * scale
            difference = angle - (g_t - near_i_t - near_k_t) * scale_t
            cut = tl.minimum(tl.maximum(difference, -1.0), 1.0)
            sum_of_losses += tl.sum(cut * (difference - cut * 0.5), 1)
            weight = cut * scale
            total += weight
            tl.atomic_add(over_rows + at_i, tl.sum(weight, 1), mask=in_i)
            tl.atomic_add(of_angles + at_i, tl.sum(cut * angle, 1), mask=in_i)
        tl.store(over_vertices + pairs, total, mask=inside)
        tl.atomic_add(loss, tl.sum(sum_of_losses, 0))

    return triton.jit(angle_kernel)


@fused(kernels=3)
def _in_gram(gradient: Tensor, sums: AngleSums, inverse: Tensor, first: int) -> Tensor:
    """A chunk's gradient in the inner products (B, B), added to that of the chunks before."""
    in_squares = -sums.of_angles * inverse.square()
    vertices = slice(first, first + len(inverse))
    gradient = gradient + sums.over_vertices
    gradient[vertices] -= 2 * (sums.over_rows + in_squares)
    diagonal = gradient.diagonal()
    diagonal += in_squares.sum(0)
    diagonal[vertices] += (sums.over_rows + in_squares).sum(1)
    return gradient


def sum_over_angles(student: Tensor, teacher: Tensor, rows: slice, chunk: int | None = None) -> Tensor:
    """The sum of Huber's differences (quadratic below 1, then linear) of the angles at some rows, a scalar.

    Both are (B, B) inner products of unit embeddings in one format; the teacher's get no gradient. ``chunk`` vertices
    are taken at a time; None chooses by device.
    """
    total: Tensor = _SumOverAngles.apply(student, teacher, rows, chunk)  # type: ignore[no-untyped-call]
    return total


class _SumOverAngles(torch.autograd.Function):
    """The sum; its backward pass hands out what the forward pass has found already."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, rows: slice, chunk: int | None) -> Tensor:
        total, gradient = student.new_zeros(()), torch.zeros_like(student)
        first, last, _ = rows.indices(student.shape[0])
        sums_of, at_once = _angle_sums, chunk
        if student.is_cuda and student.dtype == torch.float32:
            sums_of = on_gpu(_angle_sums, 1, _angle_sums_by_kernel)
        if sums_of is not _angle_sums:
            at_once = max(last - first, 1)
        elif at_once is None:
            budget = _CHUNK_ELEMENTS["cuda" if student.is_cuda else "cpu"]
            at_once = max(1, budget // max(student.shape[0], 1) ** 2)
        for begin in range(first, last, at_once):
            end = min(begin + at_once, last)
            sides = _side(student, begin, end), _side(teacher, begin, end)
            sums = sums_of(*sides)
            total = total + sums.loss
            gradient = _in_gram(gradient, sums, sides[0].inverse, begin)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0], None, None, None
