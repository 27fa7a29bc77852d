"""ONNX operators that move values and do not compute with them: shapes, slices, padding, broadcasting."""

import itertools
import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional

from arcface_kd.teachers.onnx.operator_call import OPERATORS, Call, UnsupportedError, axes_of, numbers, operator

ONE_BY_ONE = 8
"""Up to so many slices are gathered one by one, which needs no index on the device."""


def pad_by(x: Tensor, before: Sequence[int], behind: Sequence[int], value: float = 0.0) -> Tensor:
    """Pad the last dimensions by a number: so much before each of them, so much behind."""
    pairs = [(a, b) for a, b in zip(before, behind, strict=True)]
    return functional.pad(x, list(itertools.chain.from_iterable(reversed(pairs))), value=value)


@operator("Shape")
def _shape(call: Call, x: Tensor) -> Tensor:
    return torch.tensor(x.shape[call.get("start", 0) : call.get("end", None)], dtype=torch.int64)


@operator("Flatten")
def _flatten(call: Call, x: Tensor) -> Tensor:
    axis = call.get("axis", 1)
    axis = axis + x.dim() if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


@operator("Reshape")
def _reshape(call: Call, x: Tensor, given: Tensor | None = None) -> Tensor:
    shape = numbers(call.attributes["shape"] if given is None else given)
    if not call.get("allowzero", 0):
        shape = [x.shape[place] if size == 0 else size for place, size in enumerate(shape)]
    return x.reshape(shape)


@operator("Squeeze")
def _squeeze(call: Call, x: Tensor, given: Tensor | None = None) -> Tensor:
    axes = axes_of(call, given)
    return x.squeeze() if axes is None else x.squeeze(axes)


@operator("Unsqueeze")
def _unsqueeze(call: Call, x: Tensor, given: Tensor | None = None) -> Tensor:
    axes = axes_of(call, given) or []
    rank = x.dim() + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


@operator("Split")
def _split(call: Call, x: Tensor, given: Tensor | None = None) -> tuple[Tensor, ...]:
    axis = call.get("axis", 0)
    sizes = given if given is not None else call.get("split", None)
    if sizes is None:
        return cast("tuple[Tensor, ...]", x.split(-(-x.shape[axis] // call.outputs), axis))
    return cast("tuple[Tensor, ...]", x.split(numbers(sizes), axis))


@operator("Slice")
def _slice(
    call: Call,
    x: Tensor,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
    axes: Tensor | None = None,
    steps: Tensor | None = None,
) -> Tensor:
    first = numbers(call.attributes["starts"] if starts is None else starts)
    last = numbers(call.attributes["ends"] if ends is None else ends)
    which = axes_of(call, axes) or list(range(len(first)))
    stride = [1] * len(first) if steps is None else numbers(steps)
    for axis, start, end, step in zip(which, first, last, stride, strict=True):
        size, width = x.shape[axis], abs(step)
        places = range(*slice(start, end, step).indices(size))
        begin = places.start
        if step < 0:
            # torch has no steps backwards.
            x, begin = x.flip(axis), size - 1 - places.start
        chosen = [slice(None)] * x.dim()
        chosen[axis] = slice(begin, begin + width * (len(places) - 1) + 1, width) if places else slice(0, 0)
        x = x[tuple(chosen)]
    return x


@operator("Gather")
def _gather(call: Call, x: Tensor, index: Tensor) -> Tensor:
    axis = call.get("axis", 0) % x.dim()
    if index.device.type == "cpu" and 0 < index.numel() <= ONE_BY_ONE:
        rows = torch.stack([x.select(axis, place) for place in numbers(index.reshape(-1))], axis)
    else:
        index = torch.where(index < 0, index + x.shape[axis], index).long()
        rows = x.index_select(axis, index.reshape(-1).to(x.device))
    return rows.reshape([*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]])


@operator("ConstantOfShape")
def _constant_of_shape(call: Call, shape: Tensor) -> Tensor:
    value = call.get("value", torch.zeros(1)).reshape(())
    if value.is_floating_point():
        value = call.floats.new_full((), float(value))
    return cast(Tensor, value.expand(numbers(shape)))


@operator("Pad")
def _pad(
    call: Call, x: Tensor, pads: Tensor | None = None, value: Tensor | None = None, axes: Tensor | None = None
) -> Tensor:
    amounts = numbers(call.attributes["pads"] if pads is None else pads)
    which = list(range(x.dim())) if axes is None else [axis % x.dim() for axis in numbers(axes)]
    before, behind = [0] * x.dim(), [0] * x.dim()
    for axis, less, more in zip(which, amounts[: len(which)], amounts[len(which) :], strict=True):
        before[axis], behind[axis] = less, more
    mode = call.get("mode", "constant")
    if mode == "constant":
        return pad_by(x, before, behind, call.get("value", 0.0) if value is None else float(value))
    modes = {"reflect": "reflect", "edge": "replicate"}
    touched = [axis for axis in range(x.dim()) if before[axis] or behind[axis]]
    if mode not in modes or x.dim() != 4 or any(axis < 2 for axis in touched):
        raise UnsupportedError(f"mode {mode!r} for {x.dim()} dimensions, of which {touched} are padded")
    return functional.pad(x, [before[3], behind[3], before[2], behind[2]], mode=modes[mode])


OPERATORS.update(
    Concat=lambda call, *inputs: torch.cat(inputs, call.attributes["axis"]),
    Expand=lambda call, x, shape: x.expand(torch.broadcast_shapes(x.shape, numbers(shape))),
    Range=lambda call, start, limit, step: torch.arange(start.item(), limit.item(), step.item(), dtype=start.dtype),
    Tile=lambda call, x, repeats: x.repeat(numbers(repeats)),
    Transpose=lambda call, x: x.permute(numbers(call.get("perm", range(x.dim() - 1, -1, -1)))),
)
