"""An ONNX graph as a torch module: its weights can be trained, and a gradient passes through any part of it.

onnxruntime has no gradient. The public converters (onnx2torch, onnx2pytorch) import torchvision, which nothing else
here needs; a face network is made of the few dozen operators in :mod:`arcface_kd.teachers.onnx.torch_operators`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from arcface_kd.errors import TeacherError, first_line
from arcface_kd.teachers.onnx.form import OWN_DOMAIN, constant_tensor
from arcface_kd.teachers.onnx.graph import OnnxGraph, free_batch
from arcface_kd.teachers.onnx.operator_call import Call, UnsupportedError
from arcface_kd.teachers.onnx.torch_layout import ONE_BY_ONE
from arcface_kd.teachers.onnx.torch_operators import OPERATORS

# Products with weights: sums and factors before the first of these are a normalisation of the input.
_MIXING = frozenset(("Conv", "Gemm", "MatMul"))
_ARITHMETIC = frozenset(("Add", "Sub", "Mul", "Div"))
# Inputs that are no weights although they may be floating-point tensors: settings and running statistics.
_SETTINGS = {"BatchNormalization": (3, 4), "Clip": (1, 2), "Pad": (2,), "Pow": (1,), "Where": (0,)}
# Inputs that the functions read as numbers: on a GPU, each step would wait for them.
_READ = {"Clip": {1: "min", 2: "max"}, "Pad": {2: "value"}}
_FOLDED = _ARITHMETIC | {"Cast", "Identity", "Neg", "Reciprocal", "Reshape", "Sqrt", "Squeeze", "Unsqueeze"}
# Operators whose whole numbers go to the values' device; all others are shapes and places, which are read on the CPU.
_ON_DEVICE = frozenset(("Where", "Gather", "GatherElements"))


@dataclass(frozen=True)
class _Node:
    operator: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]


class TorchGraph(nn.Module):
    """An ONNX graph that torch runs node by node, in float32.

    Weights are parameters; running statistics of batch norms and single numbers are buffers. In training mode batch
    norms behave as torch's own; dropout does nothing. The batch size is freed by
    :func:`arcface_kd.teachers.onnx.graph.free_batch`, which proves nothing: the caller compares module and graph.

    Attributes:
        graph: what is computed, its batch size freed and its constants among its initializers.

    Args:
        graph: from :func:`arcface_kd.teachers.onnx.graph.read_graph`.

    Raises:
        TeacherError: an operator that is not known here, or a damaged graph.
    """

    def __init__(self, graph: OnnxGraph) -> None:
        super().__init__()
        import onnx
        from onnx import numpy_helper

        freed = free_batch(graph)
        model = onnx.load_model_from_string(freed.model)
        _constants_to_initializers(model)
        self.graph = replace(freed, model=bytes(model.SerializeToString()))
        self._opset = max((entry.version for entry in model.opset_import if entry.domain in OWN_DOMAIN), default=1)
        constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        self._nodes = [_node(node, number) for number, node in enumerate(model.graph.node)]
        self._check(constants)
        settings = _settings(self._nodes, constants, graph.input_name)
        taken = {name for node in self._nodes for name in node.inputs}
        self._nodes = [_with_numbers(node, self._nodes, constants, self._opset) for node in self._nodes]
        self.weights = nn.Module()
        self._places: dict[str, str] = {}
        self._whole: dict[str, Tensor] = {}
        self._copies: dict[tuple[str, torch.device], Tensor] = {}
        self._plans: dict[tuple[frozenset[str], tuple[str, ...]], tuple[list[_Node], dict[str, int]]] = {}
        # What no node takes would be a parameter without a gradient.
        for name in (name for name in constants if name in taken):
            array = constants[name]
            if np.issubdtype(array.dtype, np.integer) or array.dtype == np.bool_:
                self._whole[name] = torch.from_numpy(array.copy())
                continue
            place = self._places[name] = f"{len(self._places)}_{name.replace('.', '_')}"
            value = torch.from_numpy(array.astype(np.float32))
            if name in settings or value.numel() == 1:
                self.weights.register_buffer(place, value)
            else:
                self.weights.register_parameter(place, nn.Parameter(value))

    def _check(self, constants: Mapping[str, NDArray[Any]]) -> None:
        """Refuse, before anything runs, what cannot be run."""
        known = {self.graph.input_name, "", *constants}
        for node in self._nodes:
            if node.operator not in OPERATORS:
                what = f"the ONNX operator {node.operator} of node {node.name!r}"
                raise TeacherError(f"{what} cannot be turned into torch; known are {', '.join(sorted(OPERATORS))}")
            for name in node.inputs:
                if name not in known:
                    raise TeacherError(f"the ONNX node {node.name!r} takes {name!r}, which no node before it returns")
            known.update(node.outputs)
        if self.graph.output_name not in known:
            raise TeacherError(f"no node of the ONNX graph returns its output {self.graph.output_name!r}")

    def forward(self, images: Tensor) -> Tensor:
        """Run the graph on prepared images (B, 3, S, S): (B, D) or (B, D, 1, 1)."""
        return self.run({self.graph.input_name: images}, [self.graph.output_name])[0]

    def run(self, given: Mapping[str, Tensor], wanted: Sequence[str]) -> list[Tensor]:
        """Compute some of the graph's values from others: the input's, or those of activations."""
        nodes, last = self._plan(frozenset(given), tuple(wanted))
        weights = {name: self.weight(name) for name in self._places}
        first = next(iter(given.values()))
        size = self.graph.size or 1
        # A graph may ask for the shape of an input that is not given, to reshape by its batch size.
        stand_in = first.new_zeros(()).expand(first.shape[0], 3, size, size)
        values: dict[str, Tensor] = {self.graph.input_name: stand_in, **self._whole, **weights, **given}
        floats = next(iter(weights.values()), torch.empty(0)).new_empty(0)
        for number, node in enumerate(nodes):
            call = Call(node.attributes, self._opset, len(node.outputs), self.training, floats)
            inputs = [values[name] if name else None for name in node.inputs]
            if node.operator in _ON_DEVICE:
                inputs = self._on_device(node, inputs)
            results = _run_node(node, call, inputs)
            for name, result in zip(node.outputs, results, strict=False):
                values[name] = self.activation(name, result)
            # An activation is freed after its last use.
            for name in node.inputs:
                if last[name] == number and name not in wanted:
                    values.pop(name, None)
        return [values[name] for name in wanted]

    def weight(self, name: str) -> Tensor:
        """The value of a floating-point constant; a subclass may change it."""
        weight: Tensor = getattr(self.weights, self._places[name])
        return weight

    def activation(self, name: str, value: Tensor) -> Tensor:
        """A value that a node has returned; a subclass may change it."""
        return value

    def _plan(self, given: frozenset[str], wanted: tuple[str, ...]) -> tuple[list[_Node], dict[str, int]]:
        """The nodes to run, and the last one that takes each value."""
        plan = self._plans.get((given, wanted))
        if plan is None:
            nodes = self._between(given, wanted)
            plan = nodes, {name: number for number, node in enumerate(nodes) for name in node.inputs}
            self._plans[given, wanted] = plan
        return plan

    def _on_device(self, node: _Node, inputs: list[Tensor | None]) -> list[Tensor | None]:
        """Inputs with masks and long indices on the values' device, copied once."""
        device = next((each.device for each in inputs if each is not None and each.is_floating_point()), None)
        if device is None or device.type == "cpu":
            return inputs
        moved = list(inputs)
        for place, name in enumerate(node.inputs):
            whole = self._whole.get(name)
            if whole is None or (node.operator == "Gather" and whole.numel() <= ONE_BY_ONE):
                continue
            if (name, device) not in self._copies:
                self._copies[name, device] = whole.to(device)
            moved[place] = self._copies[name, device]
        return moved

    def _between(self, given: frozenset[str], wanted: tuple[str, ...]) -> list[_Node]:
        """The nodes that lead from some values to others, in order."""
        missing, chosen = set(wanted) - given, []
        for node in reversed(self._nodes):
            if missing.intersection(node.outputs):
                chosen.append(node)
                missing.difference_update(node.outputs)
                if not self._measures_input(node):
                    missing.update(name for name in node.inputs if name and name not in given)
        missing.difference_update(self._places, self._whole)
        if missing:
            what = f"the ONNX graph cannot compute {', '.join(wanted)} from {', '.join(sorted(given))}"
            raise TeacherError(f"{what}: it needs {', '.join(sorted(missing))} as well")
        return chosen[::-1]

    def bottlenecks(self) -> list[str]:
        """Names of the activations that all of the embedding passes through, in order.

        Asking for the shape of the input, in order to reshape by the batch size, is no way around them.
        """
        end, last, depends = self.graph.output_name, dict[str, int](), {self.graph.input_name}
        for number, node in enumerate(self._nodes):
            if self._measures_input(node):
                continue
            last.update(dict.fromkeys(node.inputs, number))
            if depends.intersection(node.inputs):
                depends.update(node.outputs)
        found, waiting = [], {self.graph.input_name}
        for number, node in enumerate(self._nodes):
            waiting.update(depends.intersection(node.outputs))
            waiting = {name for name in waiting if name == end or last.get(name, -1) > number}
            if waiting == {node.outputs[0]} and node.outputs[0] != end:
                found.append(node.outputs[0])
        return found

    def embedding_layer_input(self) -> str | None:
        """Name of the last product's input; None where not all of the embedding passes through it."""
        bottlenecks = set(self.bottlenecks())
        mixing = [node.inputs[0] for node in self._nodes if node.operator in _MIXING]
        return mixing[-1] if mixing and mixing[-1] in bottlenecks else None

    def _measures_input(self, node: _Node) -> bool:
        return node.operator == "Shape" and node.inputs[0] == self.graph.input_name

    def behind(self, name: str, activation: Tensor) -> Tensor:
        """Compute the embedding of an activation (B, ...), one of :meth:`bottlenecks`."""
        return self.run({name: activation}, [self.graph.output_name])[0]

    def serialised(self) -> bytes:
        """The bytes of an ONNX file of the graph with its present weights, for any batch size."""
        import onnx
        from onnx import numpy_helper

        model = onnx.load_model_from_string(self.graph.model)
        for tensor in model.graph.initializer:
            if tensor.name in self._places:
                weights = getattr(self.weights, self._places[tensor.name]).detach().cpu().numpy()
                kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
                tensor.CopyFrom(numpy_helper.from_array(weights.astype(kind), tensor.name))
        return bytes(model.SerializeToString())


def _constants_to_initializers(model: Any) -> None:
    """Turn ``Constant`` nodes into initializers, the one place for all that a graph computes with."""
    kept = []
    for node in model.graph.node:
        if node.op_type != "Constant" or node.domain not in OWN_DOMAIN:
            kept.append(node)
            continue
        value = constant_tensor(node)
        if value is None:
            raise TeacherError(f"the ONNX constant {node.output[0]!r} is neither a tensor nor numbers")
        tensor = model.graph.initializer.add()
        tensor.CopyFrom(value)
        tensor.name = node.output[0]
    del model.graph.node[:]
    model.graph.node.extend(kept)


def _node(node: Any, number: int) -> _Node:
    from onnx import TensorProto, helper, numpy_helper

    attributes: dict[str, Any] = {}
    for attribute in node.attribute:
        value = helper.get_attribute_value(attribute)
        if isinstance(value, bytes):
            value = value.decode(errors="replace")
        elif isinstance(value, TensorProto):
            value = torch.from_numpy(numpy_helper.to_array(value).copy())
        attributes[attribute.name] = value
    operator = node.op_type if node.domain in OWN_DOMAIN else f"{node.domain}.{node.op_type}"
    name = node.name or f"{node.op_type}_{number}"
    return _Node(operator, name, tuple(node.input), tuple(node.output), attributes)


def _settings(nodes: Sequence[_Node], constants: Iterable[str], image: str) -> set[str]:
    """Names of constants that are not trained: the normalisation of the input, running statistics, bounds."""
    found: set[str] = set()
    made_of = {name: {name} for name in constants}
    before_weights = {image}
    for node in nodes:
        found.update(node.inputs[place] for place in _SETTINGS.get(node.operator, ()) if place < len(node.inputs))
        sources = [made_of[name] for name in node.inputs if name in made_of]
        if before_weights.intersection(node.inputs):
            if node.operator in _ARITHMETIC:
                found.update(*sources)
            if node.operator not in _MIXING:
                before_weights.update(node.outputs)
        elif len(sources) == len(node.inputs):
            made_of.update(dict.fromkeys(node.outputs, set().union(*sources)))
    return found


def _with_numbers(node: _Node, nodes: Sequence[_Node], constants: Mapping[str, NDArray[Any]], opset: int) -> _Node:
    """A node whose constant bounds are attributes."""
    attributes, inputs = dict(node.attributes), list(node.inputs)
    for place, attribute in _READ.get(node.operator, {}).items():
        if place < len(inputs) and inputs[place]:
            number = _value(inputs[place], nodes, constants, opset)
            if number is not None and number.numel() == 1:
                attributes[attribute], inputs[place] = float(number), ""
    return replace(node, attributes=attributes, inputs=tuple(inputs))


def _value(
    name: str, nodes: Sequence[_Node], constants: Mapping[str, NDArray[Any]], opset: int, depth: int = 8
) -> Tensor | None:
    """A value that follows from constants alone by few steps, None for any other."""
    if name in constants:
        return torch.from_numpy(np.array(constants[name]))
    maker = next((node for node in nodes if name in node.outputs), None)
    if maker is None or maker.operator not in _FOLDED or depth == 0:
        return None
    inputs = [_value(taken, nodes, constants, opset, depth - 1) for taken in maker.inputs]
    if any(value is None for value in inputs):
        return None
    return _run_node(maker, Call(maker.attributes, opset), inputs)[0]


def _run_node(node: _Node, call: Call, inputs: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    what = f"the ONNX operator {node.operator} of node {node.name!r}"
    try:
        results = OPERATORS[node.operator](call, *inputs)
    except UnsupportedError as error:
        raise TeacherError(f"{what} is used with {error}, which cannot be turned into torch") from error
    except torch.cuda.OutOfMemoryError:
        raise
    # Whatever torch says of shapes, types and counts that do not go together.
    except (RuntimeError, ValueError, TypeError, KeyError, IndexError) as error:
        shapes = ", ".join("none" if each is None else str(tuple(each.shape)) for each in inputs)
        raise TeacherError(f"{what} cannot be run on {shapes}: {first_line(error)}") from error
    return results if isinstance(results, tuple) else (results,)
