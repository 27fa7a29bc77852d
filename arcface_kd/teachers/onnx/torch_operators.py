"""ONNX operators as torch functions, with gradient: those that face networks are exported with.

Each function takes a :class:`~arcface_kd.teachers.onnx.operator_call.Call` and the node's inputs (None where an
optional one is left out) and returns its first output, or a tuple of outputs. Integers, which shapes are made of, stay
on the CPU, and nothing here waits for a GPU. Semantics are those of ONNX's operator specification, at the opset that
the graph declares.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from arcface_kd.teachers.onnx.operator_call import Call, Operator, UnsupportedError, axes_of, numbers, registering
from arcface_kd.teachers.onnx.torch_layout import LAYOUT_OPERATORS, pad_by

OPERATORS: dict[str, Operator] = dict(LAYOUT_OPERATORS)
"""Operators of ONNX's own domain by name."""

_operator = registering(OPERATORS)

# Types of ONNX's TensorProto that are whole numbers or truth values; every other one is a floating-point type.
_DISCRETE = {
    2: torch.uint8,
    3: torch.int8,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
}


# ---- element by element


_PLAIN: dict[str, Any] = {
    "Relu": torch.relu,
    "Sigmoid": torch.sigmoid,
    "Tanh": torch.tanh,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Log": torch.log,
    "Sqrt": torch.sqrt,
    "Abs": torch.abs,
    "Neg": torch.neg,
    "Floor": torch.floor,
    "Ceil": torch.ceil,
    "Reciprocal": torch.reciprocal,
    "Softplus": functional.softplus,
    "HardSwish": functional.hardswish,
    "Not": torch.logical_not,
    "Add": torch.add,
    "Sub": torch.sub,
    "Mul": torch.mul,
    "Pow": torch.pow,
    "MatMul": torch.matmul,
    "Equal": torch.eq,
    "Less": torch.lt,
    "Greater": torch.gt,
    "And": torch.logical_and,
    "Or": torch.logical_or,
    "Where": torch.where,
}
for _name, _function in _PLAIN.items():
    OPERATORS[_name] = lambda call, *inputs, function=_function: function(*inputs)


@_operator("Identity", "Dropout")
def _identity(call: Call, x: Tensor, *unused: Tensor) -> Tensor:
    return x


@_operator("Div")
def _div(call: Call, x: Tensor, y: Tensor) -> Tensor:
    whole = not x.is_floating_point() and not y.is_floating_point()
    return torch.div(x, y, rounding_mode="trunc" if whole else None)


@_operator("Max")
def _max(call: Call, x: Tensor, *others: Tensor) -> Tensor:
    for other in others:
        x = torch.maximum(x, other.to(x.device))
    return x


@_operator("Min")
def _min(call: Call, x: Tensor, *others: Tensor) -> Tensor:
    for other in others:
        x = torch.minimum(x, other.to(x.device))
    return x


@_operator("LeakyRelu")
def _leaky_relu(call: Call, x: Tensor) -> Tensor:
    return functional.leaky_relu(x, call.get("alpha", 0.01))


@_operator("Elu")
def _elu(call: Call, x: Tensor) -> Tensor:
    return functional.elu(x, call.get("alpha", 1.0))


@_operator("PRelu")
def _prelu(call: Call, x: Tensor, slope: Tensor) -> Tensor:
    slope = slope.to(x.dtype)
    if slope.numel() == 1 or slope.shape == (x.shape[1], *[1] * (x.dim() - 2)):
        return functional.prelu(x, slope.reshape(-1))
    return x.clamp_min(0) + slope * x.clamp_max(0)


@_operator("Clip")
def _clip(call: Call, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    least = call.get("min", None) if low is None else float(low)
    most = call.get("max", None) if high is None else float(high)
    return x if least is None and most is None else x.clamp(least, most)


@_operator("HardSigmoid")
def _hard_sigmoid(call: Call, x: Tensor) -> Tensor:
    return cast(Tensor, (x * call.get("alpha", 0.2) + call.get("beta", 0.5)).clamp(0, 1))


@_operator("Gelu")
def _gelu(call: Call, x: Tensor) -> Tensor:
    return functional.gelu(x, approximate=call.get("approximate", "none"))


@_operator("Cast")
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


@_operator("Conv")
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


@_operator("Gemm")
def _gemm(call: Call, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    a = a.T if call.get("transA", 0) else a
    b = b.T if call.get("transB", 0) else b
    product = a @ b
    alpha, beta = call.get("alpha", 1.0), call.get("beta", 1.0)
    product = product if alpha == 1 else alpha * product
    return product if c is None else product + (c if beta == 1 else beta * c)


@_operator("Einsum")
def _einsum(call: Call, *inputs: Tensor) -> Tensor:
    return torch.einsum(call.attributes["equation"], *inputs)


def _pool_shape(call: Call, x: Tensor) -> tuple[list[int], list[int], list[int], list[int], list[int]]:
    kernel = numbers(call.attributes["kernel_shape"])
    stride = numbers(call.get("strides", [1] * len(kernel)))
    dilation = numbers(call.get("dilations", [1] * len(kernel)))
    if len(kernel) != 2:
        raise UnsupportedError(f"a pool over {len(kernel)} spatial dimensions")
    return kernel, stride, dilation, *_padding(call, x.shape[2:], kernel, stride, dilation)


@_operator("MaxPool")
def _max_pool(call: Call, x: Tensor) -> Tensor:
    if call.outputs > 1:
        raise UnsupportedError("the places of the maxima")
    kernel, stride, dilation, before, behind = _pool_shape(call, x)
    if before != behind or any(2 * pad > size for pad, size in zip(before, kernel, strict=True)):
        x, before = pad_by(x, before, behind, -math.inf), [0, 0]
    return functional.max_pool2d(x, kernel, stride, before, dilation, bool(call.get("ceil_mode", 0)))


@_operator("AveragePool")
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


@_operator("GlobalAveragePool")
def _global_average_pool(call: Call, x: Tensor) -> Tensor:
    return x.mean(list(range(2, x.dim())), keepdim=True)


@_operator("GlobalMaxPool")
def _global_max_pool(call: Call, x: Tensor) -> Tensor:
    return x.amax(list(range(2, x.dim())), keepdim=True)


# ---- normalisations


@_operator("BatchNormalization")
def _batch_norm(call: Call, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    if call.get("training_mode", 0):
        raise UnsupportedError("the batch's own statistics as outputs")
    if not call.get("spatial", 1) and x.dim() > 2:
        # Statistics of each place of the map, which are never trained.
        return cast(Tensor, (x - mean) * (variance + call.get("epsilon", 1e-5)).rsqrt() * scale + bias)
    # ONNX counts what stays of the running statistics, torch what is new.
    new = 1 - call.get("momentum", 0.9)
    return functional.batch_norm(x, mean, variance, scale, bias, call.training, new, call.get("epsilon", 1e-5))


@_operator("InstanceNormalization")
def _instance_norm(call: Call, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return functional.instance_norm(x, weight=scale, bias=bias, eps=call.get("epsilon", 1e-5))


@_operator("LayerNormalization")
def _layer_norm(call: Call, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    if call.outputs > 1:
        raise UnsupportedError("mean and deviation as outputs")
    shape = x.shape[call.get("axis", -1) :]
    return functional.layer_norm(
        x, shape, scale.expand(shape), None if bias is None else bias.expand(shape), call.get("epsilon", 1e-5)
    )


@_operator("LpNormalization")
def _lp_normalization(call: Call, x: Tensor) -> Tensor:
    return functional.normalize(x, call.get("p", 2), call.get("axis", -1))


def _over_rows(call: Call, x: Tensor, function: Callable[[Tensor, int], Tensor]) -> Tensor:
    if call.opset >= 13:
        return function(x, call.get("axis", -1))
    # Before opset 13, everything from the axis on is one row.
    axis = call.get("axis", 1) % max(x.dim(), 1)
    return function(x.flatten(axis), axis).reshape(x.shape)


@_operator("Softmax")
def _softmax(call: Call, x: Tensor) -> Tensor:
    return _over_rows(call, x, torch.softmax)


@_operator("LogSoftmax")
def _log_softmax(call: Call, x: Tensor) -> Tensor:
    return _over_rows(call, x, torch.log_softmax)


def _reduction(function: Callable[[Tensor, list[int], bool], Tensor]) -> Operator:
    def reduce(call: Call, x: Tensor, given: Tensor | None = None) -> Tensor:
        axes = axes_of(call, given)
        if not axes:
            if call.get("noop_with_empty_axes", 0):
                return x
            axes = list(range(x.dim()))
        return function(x, axes, bool(call.get("keepdims", 1)))

    return reduce


def _product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted((axis % x.dim() for axis in axes), reverse=True):
        x = x.prod(axis, keepdim=keep)
    return x


OPERATORS.update(
    ReduceMean=_reduction(lambda x, axes, keep: x.mean(axes, keepdim=keep)),
    ReduceSum=_reduction(lambda x, axes, keep: x.sum(axes, keepdim=keep)),
    ReduceSumSquare=_reduction(lambda x, axes, keep: x.pow(2).sum(axes, keepdim=keep)),
    ReduceMax=_reduction(lambda x, axes, keep: x.amax(axes, keepdim=keep)),
    ReduceMin=_reduction(lambda x, axes, keep: x.amin(axes, keepdim=keep)),
    ReduceL1=_reduction(lambda x, axes, keep: x.abs().sum(axes, keepdim=keep)),
    ReduceL2=_reduction(lambda x, axes, keep: torch.linalg.vector_norm(x, dim=axes, keepdim=keep)),
    ReduceProd=_reduction(_product),
)
