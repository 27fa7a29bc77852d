"""MXNet's symbol graph (``*-symbol.json``) as a torch module, for the operators that face networks are made of."""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from arcface_kd.errors import TeacherError, first_line
from arcface_kd.teachers.base import read_bytes

Operation = Callable[..., Tensor]

_MOST_NODES = 20_000
# Of JSON, which takes up to forty times its size in memory; r100's has half a megabyte.
_LARGEST_SYMBOL = 1 << 24
# Elements in one activation of one image: 2^25 float32 are 128 MB, forty times the largest of r100 at 112x112.
_MOST_ELEMENTS = 1 << 25
_LOSSES = frozenset(("SoftmaxOutput", "Softmax", "softmax", "LinearRegressionOutput", "MakeLoss"))
_EMBEDDING = "fc1"


class _Attributes:
    """One node's attributes, which MXNet keeps as text."""

    def __init__(self, node: str, texts: Mapping[str, str]) -> None:
        self.node = node
        self.texts = texts

    def _wrong(self, key: str, wanted: str) -> TeacherError:
        return TeacherError(f"node {self.node!r} has {key}={self.texts.get(key)!r}; wanted {wanted}")

    def word(self, key: str, default: str) -> str:
        return self.texts.get(key, default)

    def flag(self, key: str, default: bool) -> bool:
        text = self.texts.get(key, str(default)).lower()
        if text not in ("true", "false", "1", "0"):
            raise self._wrong(key, "True or False")
        return text in ("true", "1")

    def number(self, key: str, default: float | None = None) -> float:
        text = self.texts.get(key, None if default is None else repr(default))
        try:
            value = float(str(text))
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise self._wrong(key, "a number")
        return value

    def whole(self, key: str, default: int) -> int:
        text = self.texts.get(key, str(default))
        if not re.fullmatch(r"-?\d{1,6}L?", text):
            raise self._wrong(key, "a whole number")
        return int(text.rstrip("L"))

    def pair(self, key: str, default: tuple[int, int] | None = None) -> tuple[int, int]:
        text = self.texts.get(key)
        if text in (None, "()", "[]") and default is not None:
            return default
        numbers = re.fullmatch(r"[(\[]\s*(\d{1,5})L?\s*,\s*(\d{1,5})L?\s*,?\s*[)\]]", str(text))
        if numbers is None:
            raise self._wrong(key, "two whole numbers, as in (3, 3)")
        return int(numbers[1]), int(numbers[2])


def _convolution(attributes: _Attributes) -> Operation:
    kernel = attributes.pair("kernel")
    groups = attributes.whole("num_group", 1)
    filters = attributes.whole("num_filter", 0)
    stride, padding = attributes.pair("stride", (1, 1)), attributes.pair("pad", (0, 0))
    dilation = attributes.pair("dilate", (1, 1))
    if attributes.word("layout", "NCHW") not in ("NCHW", "None"):
        raise TeacherError(f"node {attributes.node!r} has layout {attributes.word('layout', '')}; wanted NCHW")

    def run(data: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if weight.shape[0] != filters or tuple(weight.shape[2:]) != kernel:
            raise TeacherError(
                f"node {attributes.node!r} has weights {tuple(weight.shape)}; wanted {filters} filters of {kernel}"
            )
        return F.conv2d(data, weight, bias, stride, padding, dilation, groups)

    return run


def _batch_norm(attributes: _Attributes) -> Operation:
    epsilon = attributes.number("eps", 1e-3)
    fixed_gamma = attributes.flag("fix_gamma", True)
    if attributes.whole("axis", 1) != 1:
        raise TeacherError(f"node {attributes.node!r} normalises axis {attributes.whole('axis', 1)}; wanted 1")

    def run(data: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        # With fix_gamma MXNet computes with 1, whatever the file says gamma is.
        return F.batch_norm(data, mean, variance, None if fixed_gamma else gamma, beta, eps=epsilon)

    return run


def _leaky_relu(attributes: _Attributes) -> Operation:
    kind = attributes.word("act_type", "leaky")
    slope = attributes.number("slope", 0.25)
    if kind == "prelu":
        return lambda data, gamma: F.prelu(data, gamma.flatten())
    if kind == "leaky":
        return lambda data: F.leaky_relu(data, slope)
    if kind == "elu":
        return lambda data: F.elu(data, slope)
    raise TeacherError(f"node {attributes.node!r} is a LeakyReLU of act_type {kind!r}; known are prelu, leaky, elu")


def _activation(attributes: _Attributes) -> Operation:
    known: dict[str, Operation] = {
        "relu": F.relu,
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
        "softrelu": F.softplus,
        "softsign": F.softsign,
    }
    kind = attributes.word("act_type", "")
    if kind not in known:
        raise TeacherError(
            f"node {attributes.node!r} is an Activation of act_type {kind!r}; known are {', '.join(known)}"
        )
    return known[kind]


def _fully_connected(attributes: _Attributes) -> Operation:
    flatten = attributes.flag("flatten", True)

    def run(data: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(data.flatten(1) if flatten else data, weight, bias)

    return run


def _pooling(attributes: _Attributes) -> Operation:
    kind = attributes.word("pool_type", "max")
    if kind not in ("max", "avg"):
        raise TeacherError(f"node {attributes.node!r} pools by {kind!r}; known are max, avg")
    if attributes.flag("global_pool", False):
        return lambda data: data.amax((2, 3), keepdim=True) if kind == "max" else data.mean((2, 3), keepdim=True)
    kernel, stride = attributes.pair("kernel"), attributes.pair("stride", (1, 1))
    padding = attributes.pair("pad", (0, 0))
    convention = attributes.word("pooling_convention", "valid")
    if convention not in ("valid", "full") or 0 in stride:
        raise TeacherError(f"node {attributes.node!r} pools with convention {convention!r} and stride {stride}")
    whole_windows = convention == "valid"
    counted = attributes.flag("count_include_pad", True)

    def run(data: Tensor) -> Tensor:
        if kind == "max":
            pooled = F.max_pool2d(data, kernel, stride, padding, ceil_mode=not whole_windows)
        else:
            pooled = F.avg_pool2d(data, kernel, stride, padding, not whole_windows, counted)
        # torch drops a last window that begins in the padding, MXNet's "full" keeps it.
        spans = [size + 2 * pad - width for size, pad, width in zip(data.shape[2:], padding, kernel, strict=True)]
        wanted = [
            (span if whole_windows else span + step - 1) // step + 1 for span, step in zip(spans, stride, strict=True)
        ]
        if list(pooled.shape[2:]) != wanted:
            raise TeacherError(f"node {attributes.node!r} pools {tuple(data.shape[2:])} in a way that torch has not")
        return pooled

    return run


def _normalise(attributes: _Attributes) -> Operation:
    epsilon = attributes.number("eps", 1e-10)
    mode = attributes.word("mode", "instance")
    if mode not in ("instance", "channel"):
        raise TeacherError(f"node {attributes.node!r} normalises per {mode!r}; known are instance, channel")

    def run(data: Tensor) -> Tensor:
        axes = [1] if mode == "channel" else list(range(1, data.dim()))
        return data / (data.square().sum(axes, keepdim=True) + epsilon).sqrt()

    return run


def _with_scalar(operation: Callable[[Tensor, float], Tensor], attributes: _Attributes) -> Operation:
    scalar = attributes.number("scalar")
    return lambda data: operation(data, scalar)


def _concat(attributes: _Attributes) -> Operation:
    axis = attributes.whole("dim", 1)
    return lambda *data: torch.cat(data, axis)


def _clip(attributes: _Attributes) -> Operation:
    low, high = attributes.number("a_min"), attributes.number("a_max")
    return lambda data: data.clamp(low, high)


def _cast(attributes: _Attributes) -> Operation:
    kind = attributes.word("dtype", "")
    if kind not in ("float16", "float32", "float64"):
        raise TeacherError(f"node {attributes.node!r} casts to {kind!r}; known are float16, float32, float64")
    # Graphs for float16 training narrow their input and widen their embedding; in between all is float32 here.
    return lambda data: data


def _as_is(attributes: _Attributes) -> Operation:
    return lambda data: data


def _sum(*data: Tensor) -> Tensor:
    total = data[0]
    for other in data[1:]:
        total = total + other
    return total


def _always(operation: Operation, attributes: _Attributes) -> Operation:
    return operation


_ADD, _SUBTRACT, _MULTIPLY = (partial(_always, operation) for operation in (torch.add, torch.sub, torch.mul))
_OPERATORS: dict[str, Callable[[_Attributes], Operation]] = {
    "Convolution": _convolution,
    "BatchNorm": _batch_norm,
    "LeakyReLU": _leaky_relu,
    "Activation": _activation,
    "FullyConnected": _fully_connected,
    "Pooling": _pooling,
    "L2Normalization": _normalise,
    "Flatten": partial(_always, lambda data: data.flatten(1)),
    "flatten": partial(_always, lambda data: data.flatten(1)),
    "Concat": _concat,
    "concat": _concat,
    "clip": _clip,
    **dict.fromkeys(("Cast", "cast", "amp_cast"), _cast),
    "relu": partial(_always, F.relu),
    "sigmoid": partial(_always, torch.sigmoid),
    **dict.fromkeys(("Dropout", "_copy", "identity", "BlockGrad"), _as_is),
    **dict.fromkeys(("elemwise_add", "_Plus", "_plus", "_add", "broadcast_add", "broadcast_plus"), _ADD),
    **dict.fromkeys(("elemwise_sub", "_Minus", "_minus", "_sub", "broadcast_sub", "broadcast_minus"), _SUBTRACT),
    **dict.fromkeys(("elemwise_mul", "_Mul", "_mul", "broadcast_mul"), _MULTIPLY),
    **dict.fromkeys(("add_n", "ElementWiseSum"), partial(_always, _sum)),
    **dict.fromkeys(("_plus_scalar", "_PlusScalar"), partial(_with_scalar, torch.add)),
    **dict.fromkeys(("_minus_scalar", "_MinusScalar"), partial(_with_scalar, torch.sub)),
    **dict.fromkeys(("_mul_scalar", "_MulScalar"), partial(_with_scalar, torch.mul)),
    **dict.fromkeys(("_div_scalar", "_DivScalar"), partial(_with_scalar, torch.div)),
}


@dataclass(frozen=True)
class _Node:
    operator: str
    name: str
    attributes: Mapping[str, str]
    inputs: tuple[int, ...]


def _nodes(content: bytes, path: Path) -> tuple[list[_Node], int]:
    """The graph's nodes and the number of its first head."""
    broken = f"teacher {path} is damaged or no MXNet symbol"
    try:
        graph = json.loads(content)
        entries, heads = graph["nodes"], graph["heads"]
        if len(entries) > _MOST_NODES:
            raise TeacherError(f"{broken}: {len(entries)} nodes")
        nodes = []
        for number, entry in enumerate(entries):
            texts = entry.get("attrs") or entry.get("param") or entry.get("attr") or {}
            inputs = [(int(origin), int(output)) for origin, output, *_ in entry["inputs"]]
            if any(not 0 <= origin < number or output != 0 for origin, output in inputs):
                raise TeacherError(
                    f"{broken}: node {number} takes input from {inputs}; wanted first outputs of earlier nodes"
                )
            attributes = {str(key): str(value) for key, value in texts.items()}
            nodes.append(_Node(str(entry["op"]), str(entry["name"]), attributes, tuple(origin for origin, _ in inputs)))
        head = int(heads[0][0])
    except TeacherError:
        raise
    # UnicodeDecodeError and JSONDecodeError are ValueErrors; the rest is JSON of another shape, or too deep.
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise TeacherError(f"{broken}: {type(error).__name__} {first_line(error)}") from error
    if not 0 <= head < len(nodes):
        raise TeacherError(f"{broken}: its head is node {head} of {len(nodes)}")
    return nodes, head


def _embedding_node(nodes: list[_Node], head: int) -> int:
    """InsightFace's embedding is ``fc1_output``; elsewhere it is what goes into the loss, or the head itself."""
    named = [number for number, node in enumerate(nodes) if node.name == _EMBEDDING and node.operator != "null"]
    if named:
        return named[-1]
    while nodes[head].operator in _LOSSES and nodes[head].inputs:
        head = nodes[head].inputs[0]
    return head


class SymbolGraph(nn.Module):
    """An MXNet symbol with its arrays, up to the embedding.

    Attributes:
        arrays: the arrays in use, by MXNet's names; the same tensors as the module's parameters.
    """

    def __init__(self, path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Read the symbol and bind its arrays, named as :func:`.arrays.read_arrays` returns them."""
        super().__init__()
        nodes, head = _nodes(read_bytes(path, _LARGEST_SYMBOL), path)
        self._path = path
        self._output = _embedding_node(nodes, head)
        self._nodes = nodes
        self._data: int | None = None
        self._weights: dict[int, str] = {}
        self._operations: dict[int, Operation] = {}
        self.arrays: dict[str, Tensor] = {}
        self._last_use: dict[int, int] = {}
        for number in self._needed():
            node = nodes[number]
            for origin in node.inputs:
                self._last_use[origin] = max(number, self._last_use.get(origin, 0))
            if node.operator == "null":
                self._bind(number, node.name, arrays)
            else:
                self._operations[number] = self._operation(node)
        if self._data is None:
            raise TeacherError(
                f"teacher {path}: the embedding {nodes[self._output].name!r} does not depend on an image"
            )

    def _operation(self, node: _Node) -> Operation:
        if node.operator not in _OPERATORS:
            raise TeacherError(
                f"teacher {self._path}: node {node.name!r} is a {node.operator!r}, an operator that is not known here; "
                f"known are {', '.join(sorted(_OPERATORS))}"
            )
        try:
            return _OPERATORS[node.operator](_Attributes(node.name, node.attributes))
        except TeacherError as error:
            raise TeacherError(f"teacher {self._path}: {error}") from error

    def __getstate__(self) -> dict[str, Any]:
        # Operations are closures; their numbers are enough to make them again.
        return {**self.__dict__, "_operations": list(self._operations)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._operations = {number: self._operation(self._nodes[number]) for number in state["_operations"]}

    def _needed(self) -> list[int]:
        """Nodes that the embedding depends on, in the order of the file, which is topological."""
        needed = {self._output}
        for number in range(self._output, -1, -1):
            if number in needed:
                needed.update(self._nodes[number].inputs)
        return sorted(needed)

    def _bind(self, number: int, name: str, arrays: Mapping[str, NDArray[Any]]) -> None:
        array = arrays.get(f"arg:{name}", arrays.get(f"aux:{name}"))
        if array is None:
            if self._data is not None or name != "data":
                raise TeacherError(f"teacher {self._path}: no array named {name!r} among the parameters")
            self._data = number
            return
        tensor = torch.from_numpy(array.astype(np.float32))
        if not torch.isfinite(tensor).all():
            raise TeacherError(f"teacher {self._path}: array {name!r} holds NaN or inf")
        self._weights[number] = f"weight_{number}"
        self.register_parameter(f"weight_{number}", nn.Parameter(tensor, requires_grad=False))
        self.arrays[name] = tensor

    def check(self, size: int) -> None:
        """Follow the shapes of one image through the graph, without computing or allocating anything."""
        weights = {number: torch.empty_like(self._weight(number), device="meta") for number in self._weights}

        def watched(node: _Node, operation: Operation, inputs: list[Tensor]) -> Tensor:
            try:
                output = operation(*inputs)
            except TeacherError as error:
                raise TeacherError(f"teacher {self._path}: {error}") from error
            # torch reports shapes that do not fit, and strides of 0, in any of these; TypeError: wrongly many inputs.
            except (RuntimeError, ValueError, TypeError, IndexError, ArithmeticError) as error:
                shapes = ", ".join(str(tuple(tensor.shape)) for tensor in inputs)
                raise TeacherError(
                    f"teacher {self._path}: node {node.name!r} ({node.operator}) cannot take {shapes}: "
                    f"{first_line(error)}"
                ) from error
            if output.numel() > _MOST_ELEMENTS:
                raise TeacherError(
                    f"teacher {self._path}: node {node.name!r} would be {tuple(output.shape)}, larger than any "
                    "face network needs"
                )
            return output

        self._execute(torch.empty((1, 3, size, size), device="meta"), weights, watched)

    def _weight(self, number: int) -> Tensor:
        return self.get_parameter(self._weights[number])

    def _execute(
        self,
        images: Tensor,
        weights: Mapping[int, Tensor],
        step: Callable[[_Node, Operation, list[Tensor]], Tensor],
    ) -> Tensor:
        assert self._data is not None
        values = {self._data: images, **weights}
        for number, operation in self._operations.items():
            node = self._nodes[number]
            values[number] = step(node, operation, [values[origin] for origin in node.inputs])
            for origin in set(node.inputs):
                if self._last_use[origin] == number:
                    del values[origin]
        return values[self._output]

    def forward(self, images: Tensor) -> Tensor:
        """Embed prepared images (B, 3, S, S): (B, D), or whatever shape the embedding's node has."""
        weights = {number: self._weight(number) for number in self._weights}
        return self._execute(images, weights, lambda node, operation, inputs: operation(*inputs))
