"""ONNX operators that compute, as torch functions with gradient: those that face networks are exported with.

Each takes a :class:`~arcface_kd.teachers.onnx.operator_call.Call` and the node's inputs (None where an optional one is
left out) and returns its first output, or a tuple of outputs, as ONNX's specification says for the graph's opset.
Integers, which shapes are made of, stay on the CPU, and nothing here waits for a GPU.
"""

import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from arcface_kd.teachers.onnx.operator_call import (
    OPERATORS,
    Call,
    Operator,
    UnsupportedError,
    axes_of,
    numbers,
    operator,
)
from arcface_kd.teachers.onnx.torch_layout import pad_by

__all__ = ["OPERATORS"]

# Types of ONNX's TensorProto that are whole numbers or truth values; every other one is a floating-point type.
_DISCRETE = {2: torch.uint8, 3: torch.int8, 5: torch.int16, 6: torch.int32, 7: torch.int64, 9: torch.bool}


# ---- element by element


_NAMED_ALIKE = (
    *("Abs", "Add", "Ceil", "Erf", "Exp", "Floor", "Log", "MatMul", "Mul", "Neg", "Pow", "Reciprocal", "Relu"),
    *("Sigmoid", "Sqrt", "Sub", "Tanh", "Where"),
)
_PLAIN: dict[str, Any] = {
    **{name: getattr(torch, name.lower()) for name in _NAMED_ALIKE},
    **{"And": torch.logical_and, "Or": torch.logical_or, "Not": torch.logical_not},
    **{"Equal": torch.eq, "Less": torch.lt, "Greater": torch.gt},
    **{"HardSwish": functional.hardswish, "Softplus": functional.softplus},
}
for _name, _function in _PLAIN.items():
    OPERATORS[_name] = lambda call, *inputs, function=_function: function(*inputs)
OPERATORS.update(
    Dropout=lambda call, x, *unused: x,
    Elu=lambda call, x: functional.elu(x, call.get("alpha", 1.0)),
    Gelu=lambda call, x: functional.gelu(x, approximate=call.get("approximate", "none")),
    HardSigmoid=lambda call, x: (x * call.get("alpha", 0.2) + call.get("beta", 0.5)).clamp(0, 1),
    Identity=lambda call, x: x,
    LeakyRelu=lambda call, x: functional.leaky_relu(x, call.get("alpha", 0.01)),
    Max=lambda call, x, *others: reduce(torch.maximum, (other.to(x.device) for other in others), x),
    Min=lambda call, x, *others: reduce(torch.minimum, (other.to(x.device) for other in others), x),
)


@operator("Div")
def _div(call: Call, x: Tensor, y: Tensor) -> Tensor:
    whole = not x.is_floating_point() and not y.is_floating_point()
    return torch.div(x, y, rounding_mode="trunc" if whole else None)


@operator("PRelu")
def _prelu(call: Call, x: Tensor, slope: Tensor) -> Tensor:
    slope = slope.to(x.dtype)
    if slope.numel() == 1 or slope.shape == (x.shape[1], *[1] * (x.dim() - 2)):
        return functional.prelu(x, slope.reshape(-1))
    return x.clamp_min(0) + slope * x.clamp_max(0)


@operator("Clip")
def _clip(call: Call, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    least = call.get("min", None) if low is None else float(low)
    most = call.get("max", None) if high is None else float(high)
    return x if least is None and most is None else x.clamp(least, most)


@operator("Cast")
def _cast(call: Call, x: Tensor) -> Tensor:
    kind = _DISCRETE.get(call.attributes["to"])
    if kind is not None:
        return x.to(kind)
    # The whole graph computes in its weights' format, whatever mixture the file asks for.
    if x.is_floating_point():
        return x
    # A number goes along with tensors of any device; it comes out of a shape as a rule.
    return x.to(call.floats.dtype) if x.dim() == 0 else x.to(call.floats)


# ---- convolutions, products and pools


def _padding(
    call: Call, size: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> tuple[list[int], list[int]]:
    """What is put before and behind each spatial dimension."""
    mode = call.get("auto_pad", "NOTSET")
    dimensions = len(kernel)
    if mode in ("", "NOTSET"):
        pads = numbers(call.get("pads", [0] * 2 * dimensions))
        return pads[:dimensions], pads[dimensions:]
    if mode == "VALID":
        return [0] * dimensions, [0] * dimensions
    if mode not in ("SAME_UPPER", "SAME_LOWER"):
        raise UnsupportedError(f"auto_pad {mode!r}")
    wanted = [
        max((math.ceil(n / s) - 1) * s + (k - 1) * d + 1 - n, 0)
        for n, k, s, d in zip(size, kernel, stride, dilation, strict=True)
    ]
    less, more = [total // 2 for total in wanted], [total - total // 2 for total in wanted]
    return (less, more) if mode == "SAME_UPPER" else (more, less)


@operator("Conv")
def _conv(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    dimensions = weight.dim() - 2
    stride = numbers(call.get("strides", [1] * dimensions))
    dilation = numbers(call.get("dilations", [1] * dimensions))
    before, behind = _padding(call, x.shape[2:], weight.shape[2:], stride, dilation)
    if before != behind:
        x = pad_by(x, before, behind)
        before = [0] * dimensions
    convolve: Any = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}.get(dimensions)
    if convolve is None:
        raise UnsupportedError(f"{dimensions} spatial dimensions")
    result: Tensor = convolve(x, weight, bias, stride, before, dilation, call.get("group", 1))
    return result


@operator("Gemm")
def _gemm(call: Call, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    a = a.T if call.get("transA", 0) else a
    b = b.T if call.get("transB", 0) else b
    product = a @ b
    alpha, beta = call.get("alpha", 1.0), call.get("beta", 1.0)
    product = product if alpha == 1 else alpha * product
    return product if c is None else product + (c if beta == 1 else beta * c)


def _pool_shape(call: Call, x: Tensor) -> tuple[list[int], list[int], list[int], list[int], list[int]]:
    kernel = numbers(call.attributes["kernel_shape"])
    stride = numbers(call.get("strides", [1] * len(kernel)))
    dilation = numbers(call.get("dilations", [1] * len(kernel)))
    if len(kernel) != 2:
        raise UnsupportedError(f"a pool over {len(kernel)} spatial dimensions")
    return kernel, stride, dilation, *_padding(call, x.shape[2:], kernel, stride, dilation)


@operator("MaxPool")
def _max_pool(call: Call, x: Tensor) -> Tensor:
    if call.outputs > 1:
        raise UnsupportedError("the places of the maxima")
    kernel, stride, dilation, before, behind = _pool_shape(call, x)
    if before != behind or any(2 * pad > size for pad, size in zip(before, kernel, strict=True)):
        x, before = pad_by(x, before, behind, -math.inf), [0, 0]
    return functional.max_pool2d(x, kernel, stride, before, dilation, bool(call.get("ceil_mode", 0)))


@operator("AveragePool")
def _average_pool(call: Call, x: Tensor) -> Tensor:
    kernel, stride, dilation, before, behind = _pool_shape(call, x)
    count_padding = bool(call.get("count_include_pad", 0))
    if dilation != [1, 1]:
        raise UnsupportedError("dilations")
    if before != behind:
        if not count_padding:
            raise UnsupportedError("uneven pads that are not counted")
        x, before = pad_by(x, before, behind), [0, 0]
    return functional.avg_pool2d(x, kernel, stride, before, bool(call.get("ceil_mode", 0)), count_padding)


# ---- normalisations


@operator("BatchNormalization")
def _batch_norm(call: Call, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    if call.get("training_mode", 0):
        raise UnsupportedError("the batch's own statistics as outputs")
    if not call.get("spatial", 1) and x.dim() > 2:
        # Statistics of each place of the map, which are never trained.
        return cast(Tensor, (x - mean) * (variance + call.get("epsilon", 1e-5)).rsqrt() * scale + bias)
    # ONNX counts what stays of the running statistics, torch what is new.
    new = 1 - call.get("momentum", 0.9)
    return functional.batch_norm(x, mean, variance, scale, bias, call.training, new, call.get("epsilon", 1e-5))


@operator("LayerNormalization")
def _layer_norm(call: Call, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    if call.outputs > 1:
        raise UnsupportedError("mean and deviation as outputs")
    shape = x.shape[call.get("axis", -1) :]
    return functional.layer_norm(
        x, shape, scale.expand(shape), None if bias is None else bias.expand(shape), call.get("epsilon", 1e-5)
    )


def _over_rows(call: Call, x: Tensor, function: Callable[[Tensor, int], Tensor]) -> Tensor:
    if call.opset >= 13:
        return function(x, call.get("axis", -1))
    # Before opset 13, everything from the axis on is one row.
    axis = call.get("axis", 1) % max(x.dim(), 1)
    return function(x.flatten(axis), axis).reshape(x.shape)


def _reduction(function: Callable[[Tensor, list[int], bool], Tensor]) -> Operator:
    def over_axes(call: Call, x: Tensor, given: Tensor | None = None) -> Tensor:
        axes = axes_of(call, given)
        if not axes:
            if call.get("noop_with_empty_axes", 0):
                return x
            axes = list(range(x.dim()))
        return function(x, axes, bool(call.get("keepdims", 1)))

    return over_axes


def _product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted((axis % x.dim() for axis in axes), reverse=True):
        x = x.prod(axis, keepdim=keep)
    return x


OPERATORS.update(
    Einsum=lambda call, *inputs: torch.einsum(call.attributes["equation"], *inputs),
    GlobalAveragePool=lambda call, x: x.mean(list(range(2, x.dim())), keepdim=True),
    GlobalMaxPool=lambda call, x: x.amax(list(range(2, x.dim())), keepdim=True),
    InstanceNormalization=lambda call, x, scale, bias: functional.instance_norm(
        x, weight=scale, bias=bias, eps=call.get("epsilon", 1e-5)
    ),
    LogSoftmax=lambda call, x: _over_rows(call, x, torch.log_softmax),
    LpNormalization=lambda call, x: functional.normalize(x, call.get("p", 2), call.get("axis", -1)),
    Softmax=lambda call, x: _over_rows(call, x, torch.softmax),
    ReduceMean=_reduction(lambda x, axes, keep: x.mean(axes, keepdim=keep)),
    ReduceSum=_reduction(lambda x, axes, keep: x.sum(axes, keepdim=keep)),
    ReduceSumSquare=_reduction(lambda x, axes, keep: x.pow(2).sum(axes, keepdim=keep)),
    ReduceMax=_reduction(lambda x, axes, keep: x.amax(axes, keepdim=keep)),
    ReduceMin=_reduction(lambda x, axes, keep: x.amin(axes, keepdim=keep)),
    ReduceL1=_reduction(lambda x, axes, keep: x.abs().sum(axes, keepdim=keep)),
    ReduceL2=_reduction(lambda x, axes, keep: torch.linalg.vector_norm(x, dim=axes, keepdim=keep)),
    ReduceProd=_reduction(_product),
)
