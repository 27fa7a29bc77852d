"""MXNet's symbol graph (``*-symbol.json``) as a torch module, for the operators that face networks are made of."""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from arcface_kd.errors import TeacherError, first_line
from arcface_kd.teachers.base import read_bytes

_MOST_NODES = 20_000
# Of JSON, which takes up to forty times its size in memory; r100's has half a megabyte.
_LARGEST_SYMBOL = 1 << 24
# Elements in one activation of one image: 2^25 float32 are 128 MB, forty times the largest of r100 at 112x112.
_MOST_ELEMENTS = 1 << 25
_LOSSES = frozenset(("SoftmaxOutput", "Softmax", "softmax", "LinearRegressionOutput", "MakeLoss"))
_EMBEDDING = "fc1"
_TEXTS_KEPT = 1024


# Every step asks for the same texts again.
@lru_cache(_TEXTS_KEPT)
def _whole_in(text: str) -> int | None:
    return int(text.rstrip("L")) if re.fullmatch(r"-?\d{1,6}L?", text) else None


@lru_cache(_TEXTS_KEPT)
def _pair_in(text: str) -> tuple[int, int] | None:
    numbers = re.fullmatch(r"[(\[]\s*(\d{1,5})L?\s*,\s*(\d{1,5})L?\s*,?\s*[)\]]", text)
    return None if numbers is None else (int(numbers[1]), int(numbers[2]))


@dataclass(frozen=True)
class _Node:
    """A node of the graph; its attributes are text in MXNet."""

    operator: str
    name: str
    texts: Mapping[str, str]
    inputs: tuple[int, ...]

    def _wrong(self, key: str, wanted: str) -> TeacherError:
        return TeacherError(f"node {self.name!r} has {key}={self.texts.get(key)!r}; wanted {wanted}")

    def word(self, key: str, default: str, *known: str) -> str:
        text = self.texts.get(key, default)
        if text not in known:
            raise self._wrong(key, f"one of {', '.join(known)}")
        return text

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
        number = _whole_in(self.texts.get(key, str(default)))
        if number is None:
            raise self._wrong(key, "a whole number")
        return number

    def pair(self, key: str, default: tuple[int, int] | None = None) -> tuple[int, int]:
        text = self.texts.get(key)
        if text in (None, "()", "[]") and default is not None:
            return default
        numbers = _pair_in(str(text))
        if numbers is None:
            raise self._wrong(key, "two whole numbers, as in (3, 3)")
        return numbers

    def run(self, *inputs: Tensor) -> Tensor:
        return _OPERATORS[self.operator](self, *inputs)


def _convolution(node: _Node, data: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    kernel, filters = node.pair("kernel"), node.whole("num_filter", 0)
    node.word("layout", "NCHW", "NCHW", "None")
    if weight.shape[0] != filters or tuple(weight.shape[2:]) != kernel:
        raise TeacherError(f"node {node.name!r} has weights {tuple(weight.shape)}; wanted {filters} of {kernel}")
    stride, padding, dilation = node.pair("stride", (1, 1)), node.pair("pad", (0, 0)), node.pair("dilate", (1, 1))
    return F.conv2d(data, weight, bias, stride, padding, dilation, node.whole("num_group", 1))


def _batch_norm(node: _Node, data: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    if node.whole("axis", 1) != 1:
        raise TeacherError(f"node {node.name!r} normalises axis {node.whole('axis', 1)}; wanted 1")
    # With fix_gamma MXNet computes with 1, whatever the file says gamma is.
    scale = None if node.flag("fix_gamma", True) else gamma
    return F.batch_norm(data, mean, variance, scale, beta, eps=node.number("eps", 1e-3))


def _leaky_relu(node: _Node, *inputs: Tensor) -> Tensor:
    slope = node.number("slope", 0.25)
    known: dict[str, Callable[..., Tensor]] = {
        "prelu": lambda data, gamma: F.prelu(data, gamma.flatten()),
        "leaky": lambda data: F.leaky_relu(data, slope),
        "elu": lambda data: F.elu(data, slope),
    }
    return known[node.word("act_type", "leaky", *known)](*inputs)


_ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "softrelu": F.softplus,
    "softsign": F.softsign,
}


def _fully_connected(node: _Node, data: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(data.flatten(1) if node.flag("flatten", True) else data, weight, bias)


def _pooling(node: _Node, data: Tensor) -> Tensor:
    largest = node.word("pool_type", "max", "max", "avg") == "max"
    if node.flag("global_pool", False):
        return data.amax((2, 3), keepdim=True) if largest else data.mean((2, 3), keepdim=True)
    kernel, stride, padding = node.pair("kernel"), node.pair("stride", (1, 1)), node.pair("pad", (0, 0))
    full = node.word("pooling_convention", "valid", "valid", "full") == "full"
    if largest:
        pooled = F.max_pool2d(data, kernel, stride, padding, ceil_mode=full)
    else:
        pooled = F.avg_pool2d(data, kernel, stride, padding, full, node.flag("count_include_pad", True))
    # torch drops a last window that begins in the padding, MXNet's "full" keeps it.
    wanted = [
        (size + 2 * pad - width + (step - 1 if full else 0)) // step + 1
        for size, pad, width, step in zip(data.shape[2:], padding, kernel, stride, strict=True)
    ]
    if list(pooled.shape[2:]) != wanted:
        raise TeacherError(f"node {node.name!r} pools {tuple(data.shape[2:])} in a way that torch has not")
    return pooled


def _normalise(node: _Node, data: Tensor) -> Tensor:
    channels = node.word("mode", "instance", "instance", "channel") == "channel"
    axes = [1] if channels else list(range(1, data.dim()))
    return data / (data.square().sum(axes, keepdim=True) + node.number("eps", 1e-10)).sqrt()


def _cast(node: _Node, data: Tensor) -> Tensor:
    node.word("dtype", "", "float16", "float32", "float64")
    # Graphs for float16 training narrow their input and widen their embedding; in between all is float32 here.
    return data


def _alike(names: str, function: Callable[..., Tensor]) -> dict[str, Callable[..., Tensor]]:
    return dict.fromkeys(names.split(), function)


_OPERATORS: dict[str, Callable[..., Tensor]] = {
    "Convolution": _convolution,
    "BatchNorm": _batch_norm,
    "LeakyReLU": _leaky_relu,
    "Activation": lambda node, data: _ACTIVATIONS[node.word("act_type", "", *_ACTIVATIONS)](data),
    "FullyConnected": _fully_connected,
    "Pooling": _pooling,
    "L2Normalization": _normalise,
    "clip": lambda node, data: data.clamp(node.number("a_min"), node.number("a_max")),
    "relu": lambda node, data: F.relu(data),
    "sigmoid": lambda node, data: torch.sigmoid(data),
    **_alike("Flatten flatten", lambda node, data: data.flatten(1)),
    **_alike("Concat concat", lambda node, *data: torch.cat(data, node.whole("dim", 1))),
    **_alike("Cast cast amp_cast", _cast),
    **_alike("Dropout _copy identity BlockGrad", lambda node, data: data),
    **_alike("elemwise_add _Plus _plus _add broadcast_add broadcast_plus", lambda node, one, other: one + other),
    **_alike("elemwise_sub _Minus _minus _sub broadcast_sub broadcast_minus", lambda node, one, other: one - other),
    **_alike("elemwise_mul _Mul _mul broadcast_mul", lambda node, one, other: one * other),
    **_alike("add_n ElementWiseSum", lambda node, *data: reduce(torch.add, data)),
    **_alike("_plus_scalar _PlusScalar", lambda node, data: data + node.number("scalar")),
    **_alike("_minus_scalar _MinusScalar", lambda node, data: data - node.number("scalar")),
    **_alike("_mul_scalar _MulScalar", lambda node, data: data * node.number("scalar")),
    **_alike("_div_scalar _DivScalar", lambda node, data: data / node.number("scalar")),
}


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
                raise TeacherError(f"{broken}: node {number} takes {inputs}; wanted first outputs of earlier nodes")
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
        self._data: int | None = None
        self._weights: dict[int, str] = {}
        self.arrays: dict[str, Tensor] = {}
        needed = {self._output}
        # Nodes stand in topological order.
        for number in range(self._output, -1, -1):
            if number in needed:
                needed.update(nodes[number].inputs)
        self._nodes = {number: nodes[number] for number in sorted(needed) if nodes[number].operator != "null"}
        self._last_use = {origin: number for number, node in self._nodes.items() for origin in node.inputs}
        for number in sorted(needed - self._nodes.keys()):
            self._bind(number, nodes[number].name, arrays)
        for node in self._nodes.values():
            if node.operator not in _OPERATORS:
                met = f"node {node.name!r} is a {node.operator!r}"
                raise TeacherError(f"teacher {path}: {met}; operators known here are {', '.join(sorted(_OPERATORS))}")
        if self._data is None:
            name = nodes[self._output].name
            raise TeacherError(f"teacher {path}: the embedding {name!r} does not depend on an image")

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

        def watched(node: _Node, *inputs: Tensor) -> Tensor:
            what = f"teacher {self._path}: node {node.name!r}"
            try:
                output = node.run(*inputs)
            except TeacherError as error:
                raise TeacherError(f"teacher {self._path}: {error}") from error
            # torch reports shapes that do not fit, and strides of 0, in any of these; TypeError: wrongly many inputs.
            except (RuntimeError, ValueError, TypeError, IndexError, ArithmeticError) as error:
                shapes = ", ".join(str(tuple(tensor.shape)) for tensor in inputs)
                raise TeacherError(f"{what} ({node.operator}) cannot take {shapes}: {first_line(error)}") from error
            if output.numel() > _MOST_ELEMENTS:
                raise TeacherError(f"{what} would be {tuple(output.shape)}, larger than any face network needs")
            return output

        self._execute(torch.empty((1, 3, size, size), device="meta"), watched)

    def _execute(self, images: Tensor, step: Callable[..., Tensor]) -> Tensor:
        assert self._data is not None
        values = {self._data: images}
        for number, name in self._weights.items():
            weight = self.get_parameter(name)
            values[number] = weight.to("meta") if images.is_meta else weight
        for number, node in self._nodes.items():
            values[number] = step(node, *(values[origin] for origin in node.inputs))
            for origin in set(node.inputs):
                if self._last_use[origin] == number:
                    del values[origin]
        return values[self._output]

    def forward(self, images: Tensor) -> Tensor:
        """Embed prepared images (B, 3, S, S): (B, D), or whatever shape the embedding's node has."""
        return self._execute(images, _Node.run)
