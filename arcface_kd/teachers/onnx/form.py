"""An ONNX model brought into one form: an image with channels first in, one embedding out, no outdated operators.

Models are rewritten in memory when they are read: what runs, cuts, trains or writes a graph meets this form alone.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from arcface_kd.errors import TeacherError

Shapes = Mapping[str, "list[int | None]"]
"""Dimensions of a graph's values by name, for one image; None where they are open. Values may be missing."""

USUAL_SIZE = 112
EMBEDDING_STEP = 16
"""Embeddings come in multiples of so many numbers; classes, landmarks and attributes as a rule do not."""
OWN_DOMAIN = ("", "ai.onnx")

# Which inputs of an operator are scales and zero points of its 8-bit numbers: no weights of the network.
_QUANTISATION = {
    "QuantizeLinear": (1, 2),
    "DequantizeLinear": (1, 2),
    "ConvInteger": (2, 3),
    "MatMulInteger": (2, 3),
    "QLinearConv": (1, 2, 4, 5, 6, 7),
    "QLinearMatMul": (1, 2, 4, 5, 6, 7),
    "QLinearAdd": (1, 2, 4, 5, 6, 7),
    "QLinearMul": (1, 2, 4, 5, 6, 7),
    "QGemm": (1, 2, 4, 5, 7, 8),
    "DynamicQuantizeMatMul": (2, 3),
    "MatMulIntegerToFloat": (2, 3, 4, 5),
}
# onnxruntime's dynamic quantisation multiplies by a weight's scale in a node of its own.
_QUANTISATION_ENDINGS = ("_scale", "_zero_point")


def messages(message: Any, kind: type) -> Iterator[Any]:
    """Every message of one type inside a protobuf message, at any depth: subgraphs and functions included."""
    pending = [message]
    while pending:
        current = pending.pop()
        if isinstance(current, kind):
            yield current
        for field, value in current.ListFields():
            if field.type == field.TYPE_MESSAGE:
                pending.extend([value] if hasattr(value, "ListFields") else value)


def dimensions(value: Any) -> list[int | None]:
    """The shape that a value's description declares, None where a dimension is open; empty where all are."""
    return [
        dimension.dim_value if dimension.HasField("dim_value") and dimension.dim_value > 0 else None
        for dimension in value.type.tensor_type.shape.dim
    ]


def constants(model: Any) -> dict[str, Any]:
    """The tensors that a graph holds by name: its initializers, and what its ``Constant`` nodes give."""
    found = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and (tensor := constant_tensor(node)) is not None:
            found.update(dict.fromkeys(node.output, tensor))
    return found


def constant_tensor(node: Any) -> Any | None:
    """What a ``Constant`` node gives, written as a tensor or as numbers; None where it is neither."""
    from onnx import helper, numpy_helper

    name = node.attribute[0].name if len(node.attribute) == 1 else ""
    if name not in ("value", "value_float", "value_floats", "value_int", "value_ints"):
        return None
    value = helper.get_attribute_value(node.attribute[0])
    kind = np.float32 if "float" in name else np.int64
    return value if name == "value" else numpy_helper.from_array(np.array(value, kind))


def inputs(model: Any) -> list[Any]:
    """The inputs of a graph that are no weights, which are listed as inputs too before IR version 4."""
    weights = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in weights]


def drop_weights_from_inputs(model: Any) -> None:
    """Take weights out of the inputs: onnxruntime does not fold what could be overridden."""
    images = inputs(model)
    if len(images) != len(model.graph.input):
        del model.graph.input[:]
        model.graph.input.extend(images)
        model.ir_version = max(model.ir_version, 4)


def row_width(shape: "list[int | None] | None") -> int | None:
    """The length D of a value that is one row of numbers an image: (N, D), (N, 1, D), ...

    0 where it is none, None where its shape does not tell.
    """
    if not shape or None in shape[1:]:
        return None
    sizes = [size for size in shape[1:] if size is not None and size > 1]
    if len(shape) == 1 or len(sizes) > 1:
        return 0
    return sizes[0] if sizes else 1


def _told(shape: "list[int | None] | None") -> str:
    return "x".join("?" if size is None else str(size) for size in shape) if shape else "of any shape"


def choose_output(model: Any, shapes: Shapes, wanted: str | None, path: Path) -> str | None:
    """Leave a graph the output that is the embedding, and what it is made of.

    ``wanted`` None takes the only output, the only one that is a row of more than one number, or the only such row
    whose length is a multiple of 16. Where there was a choice, it is returned in words.
    """
    names = [value.name for value in model.graph.output]
    listed = ", ".join(f"{name} ({_told(shapes.get(name))})" for name in names)
    how = "name the embedding with --kd-option teacher.output=NAME"
    if wanted is None and len(names) > 1:
        rows = [name for name in names if row_width(shapes.get(name)) not in (0, 1)]
        if len(rows) > 1:
            # Attributes and poses come in other numbers.
            rows = [name for name in rows if (row_width(shapes.get(name)) or 0) % EMBEDDING_STEP == 0]
        if len(rows) != 1:
            raise TeacherError(f"teacher {path} has {len(names)} outputs, {listed}: {how}")
        wanted = rows[0]
    if wanted is None or names == [wanted]:
        return None
    if not any(wanted in node.output for node in model.graph.node):
        raise TeacherError(f"teacher {path} has no output {wanted!r}; there are {listed}: {how}")
    keep_only(model, [wanted])
    return f"output {wanted} of {', '.join(names)}"


def keep_only(model: Any, outputs: Sequence[str]) -> None:
    """Give a graph other outputs, and drop what they are not made of."""
    import onnx

    described = {value.name: value for value in (*model.graph.value_info, *model.graph.output)}
    values = [described.get(name, onnx.ValueInfoProto(name=name)) for name in outputs]
    needed, kept = set(outputs), []
    for node in reversed(model.graph.node):
        if needed.intersection(node.output):
            kept.append(node)
            # Branches of an If take values from around it.
            needed.update(name for inner in messages(node, onnx.NodeProto) for name in inner.input)
    for field, chosen in (
        (model.graph.node, kept[::-1]),
        (model.graph.initializer, [tensor for tensor in model.graph.initializer if tensor.name in needed]),
        (model.graph.input, [given for given in model.graph.input if given.name in needed]),
        (model.graph.output, values),
    ):
        copies = [type(each).FromString(each.SerializeToString()) for each in chosen]
        del field[:]
        field.extend(copies)


def image_input(model: Any, path: Path) -> Any:
    """The one input of a graph, with channels first: a transposition is put behind one that has them last."""
    found = inputs(model)
    if len(found) != 1:
        names = ", ".join(value.name for value in found)
        raise TeacherError(f"teacher {path} has {len(found)} inputs ({names}); wanted one, the image")
    (value,) = found
    shape = dimensions(value)
    if _channels_last(model, value.name, shape):
        _put_channels_first(model, value)
        shape = dimensions(value)
    if shape and (len(shape) != 4 or shape[1] not in (3, None) or shape[2] != shape[3]):
        raise TeacherError(f"teacher {path} takes input of {_told(shape)}; wanted Nx3xSxS or NxSxSx3, square images")
    return value


def _channels_last(model: Any, name: str, shape: "list[int | None]") -> bool:
    if len(shape) not in (0, 4) or 3 in shape[1:2]:
        return False
    if shape and shape[3] is not None:
        return shape[3] == 3
    # Where the shape is open, a transposition to channels first tells, if nothing else is done to the image before it.
    reached = {name}
    for node in model.graph.node:
        if not reached.intersection(node.input):
            continue
        if node.op_type == "Transpose":
            return any(list(attribute.ints) == [0, 3, 1, 2] for attribute in node.attribute)
        if node.op_type not in ("Cast", "Identity", "Sub", "Add", "Mul", "Div"):
            return False
        reached.update(node.output)
    return False


def _put_channels_first(model: Any, value: Any) -> None:
    import onnx

    name, last = value.name, f"{value.name}/channels_last"
    for node in messages(model.graph, onnx.NodeProto):
        for place, taken in enumerate(node.input):
            if taken == name:
                node.input[place] = last
    transposition = onnx.helper.make_node("Transpose", [name], [last], name=last, perm=[0, 2, 3, 1])
    model.graph.node.insert(0, transposition)
    shape = value.type.tensor_type.shape.dim
    if shape:
        order = [onnx.TensorShapeProto.Dimension.FromString(shape[axis].SerializeToString()) for axis in (0, 3, 1, 2)]
        del shape[:]
        shape.extend(order)


def modernise(model: Any, shapes: Shapes) -> None:
    """Write operators of old exporters as onnxruntime takes them, and those in training mode as in evaluation.

    MXNet's exporter writes ``spatial=0`` for batch norms that have one scale a channel, and a vector of slopes, one a
    channel, that cannot be broadcast.
    """
    held = constants(model)
    for node in model.graph.node:
        if node.domain not in OWN_DOMAIN:
            continue
        _end_training(node)
        if node.op_type == "BatchNormalization" and _rank(held, node.input[1:2]) == 1:
            for attribute in [each for each in node.attribute if each.name == "spatial"]:
                node.attribute.remove(attribute)
        if node.op_type == "PRelu" and _rank(held, node.input[1:2]) == 1:
            slope, shape = held[node.input[1]], shapes.get(node.input[0]) or []
            if len(shape) == 4 and shape[1] == slope.dims[0] and shape[3] not in (None, shape[1]) and shape[1] != 1:
                slope.dims.extend([1, 1])


def _end_training(node: Any) -> None:
    """Have a node of a network that was exported in training mode compute as in evaluation."""
    if node.op_type == "BatchNormalization":
        for attribute in [each for each in node.attribute if each.name == "training_mode"]:
            node.attribute.remove(attribute)
        # The moved statistics; before operator set 14 they alone tell that it trains.
        del node.output[1:]
    if node.op_type == "Dropout":
        del node.input[2:]


def raise_opset(model: Any) -> None:
    """Write a graph of operator set 5 or 6, which onnxruntime does not run, in operator set 7.

    Arithmetic that names its axis is left for onnxruntime to refuse.
    """
    sets = [entry for entry in model.opset_import if entry.domain in OWN_DOMAIN]
    if not sets or max(entry.version for entry in sets) not in (5, 6):
        return
    for node in model.graph.node:
        for attribute in [each for each in node.attribute if each.name in ("is_test", "consumed_inputs")]:
            node.attribute.remove(attribute)
    for entry in sets:
        entry.version = 7


def _rank(held: Mapping[str, Any], names: Iterable[str]) -> int | None:
    return next((len(held[name].dims) for name in names if name in held), None)


def parameter_count(model: Any) -> int:
    """Number of a graph's weights: floating-point and quantised ones, without the latter's scales."""
    import onnx

    kinds = onnx.TensorProto
    floats = {kinds.FLOAT, kinds.DOUBLE, kinds.FLOAT16, kinds.BFLOAT16}
    narrow = {kinds.INT8, kinds.UINT8, *(getattr(kinds, name, -1) for name in ("INT4", "UINT4", "FLOAT8E4M3FN"))}
    nodes = list(messages(model, onnx.NodeProto))
    scales = {
        node.input[place] for node in nodes for place in _QUANTISATION.get(node.op_type, ()) if place < len(node.input)
    }
    # Biases of quantised networks are the only weights in 32 bits; everything else in them is a shape or a place.
    wide = {node.input[0] for node in nodes if node.op_type == "DequantizeLinear"}
    wide.update(node.input[8] for node in nodes if node.op_type == "QLinearConv" and len(node.input) > 8)
    wide.update(node.input[6] for node in nodes if node.op_type == "QGemm" and len(node.input) > 6)
    quantised = any(tensor.data_type in narrow for tensor in model.graph.initializer)
    total = 0
    for tensor in model.graph.initializer:
        if tensor.name in scales or (quantised and tensor.name.endswith(_QUANTISATION_ENDINGS)):
            continue
        if tensor.data_type in floats | narrow or (tensor.data_type == kinds.INT32 and tensor.name in wide):
            total += math.prod(tensor.dims)
    return total
