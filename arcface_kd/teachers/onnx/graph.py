"""ONNX files read safely and made fit for a teacher, in memory: denormal weights flushed, the batch size freed."""

import contextlib
import hashlib
import math
import os
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arcface_kd.errors import TeacherError, first_line
from arcface_kd.teachers.base import LARGEST_FILE, read_bytes
from arcface_kd.teachers.onnx.form import (
    USUAL_SIZE,
    Shapes,
    choose_output,
    constants,
    dimensions,
    drop_weights_from_inputs,
    image_input,
    inputs,
    messages,
    modernise,
    parameter_count,
    raise_opset,
    row_width,
)

# Weights below this change no output of a network in float32, and below 1.2e-38 they make CPUs crawl.
_NEGLIGIBLE = 1e-20
# Control flow could run for ever, and EPContext names files of its own; no face network needs either.
_REFUSED_OPERATORS = frozenset(("Loop", "Scan", "SequenceMap", "EPContext"))
MOST_ELEMENTS = 1 << 27
"""Elements in one activation of one image: 2^27 float32 are 512 MB. ViT-L at 112x112 stays below 2^23."""
# ViT-L has two thousand; functions count as often as they are called, for onnxruntime puts their nodes in place.
_MOST_NODES = 100_000
_DEEPEST_CALL = 64


@dataclass(frozen=True)
class OnnxGraph:
    """One network, ready for onnxruntime."""

    # The serialised ModelProto in the form of :mod:`arcface_kd.teachers.onnx.form`, external data taken in.
    model: bytes
    input_name: str  # its image input, channels first
    output_name: str  # its embedding output
    size: int | None  # height and width of the input, or None where the graph leaves them open
    fixed_batch: int | None  # the batch size the graph declares, or None where it takes any
    parameter_count: int  # number of weights
    digest: str  # SHA-256 over the file and its external data, and the output where one was chosen
    width: int | None = None  # numbers in an embedding, or None where the graph does not tell
    choice: str | None = None  # the output in words, where the file has several


def _holds_bytes_for_text(message: Any) -> bool:
    """Whether a string is not UTF-8: protobuf gives bytes for it."""
    return any(
        field.type == field.TYPE_STRING
        and any(isinstance(text, bytes) for text in ([value] if isinstance(value, str | bytes) else value))
        for part in messages(message, object)
        for field, value in part.ListFields()
    )


def _parse(content: bytes, path: Path) -> Any:
    import onnx

    try:
        model = onnx.load_model_from_string(content)
    # protobuf's DecodeError has moved between modules.
    except Exception as error:
        raise TeacherError(f"teacher {path} is damaged or no ONNX file: {first_line(error)}") from error
    if not model.graph.node or not model.graph.output:
        raise TeacherError(f"teacher {path} is damaged or no ONNX file: it has no graph")
    if _holds_bytes_for_text(model):
        raise TeacherError(f"teacher {path} is damaged: a name in it is not text")
    return model


def _take_in_external_data(model: Any, path: Path) -> bytes:
    """Replace references to files by their bytes, and digest these; only files in the model's folder are read."""
    import onnx

    folder = path.parent.resolve()
    digest = hashlib.sha256()
    taken = 0
    for tensor in messages(model, onnx.TensorProto):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        where = f"teacher {path}: tensor {tensor.name!r} keeps its data in {location!r}"
        if not location or "\0" in location or "\\" in location:
            raise TeacherError(f"{where}, which names no file")
        try:
            place = (folder / location).resolve()
            if os.path.isabs(location) or not place.is_relative_to(folder):
                raise TeacherError(f"{where}, outside the model's folder; such files are not opened")
            if not place.is_file():
                raise TeacherError(f"{where}, which is not there; keep it beside the model")
            size = place.stat().st_size
        # Before Python 3.13 a loop of links is a RuntimeError.
        except (OSError, RuntimeError) as error:
            raise TeacherError(f"{where[:400]}, which cannot be read: {first_line(error)}") from error
        try:
            offset = int(entries.get("offset", "0"))
            length = int(entries.get("length", size - offset))
        except ValueError:
            met = f"offset {entries.get('offset')!r}, length {entries.get('length')!r}"
            raise TeacherError(f"{where} at {met}") from None
        if offset < 0 or length < 0 or offset + length > size:
            raise TeacherError(f"{where}, {length} bytes from {offset}, but it has {size}")
        # Several tensors may name one file.
        taken += length
        if taken > LARGEST_FILE:
            raise TeacherError(f"{where}: {taken} bytes of tensors; no face network has more than {LARGEST_FILE}")
        with place.open("rb") as stream:
            stream.seek(offset)
            content = stream.read(length)
        digest.update(content)
        tensor.raw_data = content
        tensor.data_location = onnx.TensorProto.DEFAULT
        del tensor.external_data[:]
    return digest.digest()


def _flush_denormals(model: Any, path: Path) -> None:
    import onnx
    from onnx import numpy_helper

    for tensor in messages(model, onnx.TensorProto):
        if tensor.data_type not in (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE):
            continue
        try:
            weights = numpy_helper.to_array(tensor)
        # onnx raises ValueError, TypeError or its own errors when dims and bytes disagree.
        except Exception as error:
            raise TeacherError(f"teacher {path}: tensor {tensor.name!r} is damaged: {first_line(error)}") from error
        tiny = (np.abs(weights) < _NEGLIGIBLE) & (weights != 0)
        if tiny.any():
            tensor.CopyFrom(numpy_helper.from_array(np.where(tiny, 0, weights).astype(weights.dtype), tensor.name))


def _nodes_in_place(model: Any) -> int:
    """Nodes of the graph with its functions inlined; more than allowed where a function calls itself."""
    import onnx

    def calls(message: Any) -> Counter[tuple[str, str]]:
        return Counter((node.domain, node.op_type) for node in messages(message, onnx.NodeProto))

    functions = {(function.domain, function.name): calls(function) for function in model.functions}
    sizes = dict.fromkeys(functions, 1)
    for _ in range(_DEEPEST_CALL):
        before = sizes
        # A call counts too, so that a circle never settles; capped, since sizes may double.
        sizes = {
            name: min(_MOST_NODES, 1 + sum(times * before.get(each, 1) for each, times in called.items()))
            for name, called in functions.items()
        }
        if sizes == before:
            return 1 + sum(times * sizes.get(each, 1) for each, times in calls(model.graph).items())
    return _MOST_NODES + 1


def _refuse_hostile(model: Any, path: Path) -> None:
    """Refuse, before anything runs, operators that may not end and graphs of too many nodes."""
    import onnx

    for node in messages(model, onnx.NodeProto):
        if node.op_type in _REFUSED_OPERATORS:
            raise TeacherError(f"teacher {path} uses the operator {node.op_type}, which is not run from a file")
    if _nodes_in_place(model) > _MOST_NODES:
        raise TeacherError(f"teacher {path} comes to more than {_MOST_NODES} nodes, more than any face network has")


def _shapes(model: Any, path: Path) -> Shapes:
    """The shapes of a graph's values for one image; values larger than any face network needs are refused."""
    import onnx

    single = onnx.ModelProto()
    single.CopyFrom(model)
    for value in inputs(single):
        shape = value.type.tensor_type.shape.dim
        if len(shape) == 4:
            spatial = (1, 2) if shape[3].dim_value == 3 else (2, 3)
            for dimension in (shape[axis] for axis in spatial):
                dimension.dim_value = dimension.dim_value if dimension.dim_value > 0 else USUAL_SIZE
    for value in (*single.graph.input, *single.graph.output):
        shape = value.type.tensor_type.shape.dim
        if shape:
            shape[0].dim_value = 1
    try:
        inferred = onnx.shape_inference.infer_shapes(single, data_prop=True)
    # onnxruntime judges a graph that the shape inference cannot follow.
    except Exception:
        inferred = single
    shapes = {value.name: dimensions(value) for value in messages(inferred.graph, onnx.ValueInfoProto)}
    for name, shape in shapes.items():
        if math.prod(size for size in shape if size is not None) > MOST_ELEMENTS:
            words = "x".join(str(size) for size in shape if size is not None)
            raise TeacherError(f"teacher {path}: {name!r} would be {words}, larger than any face network needs")
    return shapes


def read_graph(path: Path, output: str | None = None) -> OnnxGraph:
    """Read an ONNX file, bring it into one form, and flush weights below 1e-20 in magnitude to zero.

    ``output`` names the value that is the embedding. The batch size stays as declared.
    """
    from onnx import inliner

    content = read_bytes(path)
    model = _parse(content, path)
    external = _take_in_external_data(model, path)
    _flush_denormals(model, path)
    _refuse_hostile(model, path)
    if model.functions:
        model = inliner.inline_local_functions(model)
    shapes = _shapes(model, path)
    modernise(model, shapes)
    raise_opset(model)
    drop_weights_from_inputs(model)
    choice = choose_output(model, shapes, output, path)
    source = image_input(model, path)
    shape = dimensions(source) or [None] * 4
    chosen = hashlib.sha256(content).digest() + external
    if choice is not None:
        chosen += model.graph.output[0].name.encode()
    return OnnxGraph(
        model=_serialised(model, path),
        input_name=source.name,
        output_name=model.graph.output[0].name,
        size=shape[2],
        fixed_batch=shape[0],
        parameter_count=parameter_count(model),
        digest=hashlib.sha256(chosen).hexdigest(),
        width=row_width(shapes.get(model.graph.output[0].name)),
        choice=choice,
    )


def _serialised(model: Any, path: Path) -> bytes:
    try:
        return bytes(model.SerializeToString())
    # protobuf's limit of 2 GB, raised as ValueError or EncodeError.
    except Exception as error:
        raise TeacherError(f"teacher {path} is too large for one ONNX message: {first_line(error)}") from error


def _computed_from(model: Any, name: str) -> set[str]:
    """Names of all values that depend on ``name``; nodes stand in topological order."""
    reached = {name}
    for node in model.graph.node:
        if reached.intersection(node.input):
            reached.update(node.output)
    return reached


def _integers(model: Any) -> dict[str, NDArray[np.int64]]:
    """Constant vectors of int64 by name: the shapes that nodes are given."""
    import onnx
    from onnx import numpy_helper

    vectors = {}
    for name, tensor in constants(model).items():
        if tensor.data_type == onnx.TensorProto.INT64 and len(tensor.dims) == 1:
            # onnxruntime refuses a damaged one.
            with contextlib.suppress(ValueError, TypeError):
                vectors[name] = numpy_helper.to_array(tensor)
    return vectors


def free_batch(graph: OnnxGraph) -> OnnxGraph:
    """Free a graph from the batch size it was exported with (insightface#2879).

    Input and output get a symbolic first dimension. A ``Reshape`` of what is computed from the image, to a constant
    shape that begins with the declared batch size, begins with 0 instead, which copies the first dimension. That is
    right where the first dimension is the batch; the caller proves it by comparing a batch with its images one by one.
    A graph that had nothing to free is returned itself.
    """
    import onnx
    from onnx import numpy_helper

    model = onnx.load_model_from_string(graph.model)
    batch = graph.fixed_batch or 1
    constants = _integers(model)
    images = _computed_from(model, graph.input_name)
    changed = graph.fixed_batch is not None
    for position, node in enumerate(model.graph.node):
        if node.op_type != "Reshape" or len(node.input) != 2 or node.input[0] not in images:
            continue
        shape = constants.get(node.input[1])
        zero_means_zero = any(attribute.name == "allowzero" and attribute.i for attribute in node.attribute)
        if shape is None or len(shape) < 2 or shape[0] != batch or zero_means_zero:
            continue
        name = f"{node.input[1]}/any_batch_{position}"
        model.graph.initializer.append(numpy_helper.from_array(np.concatenate([[0], shape[1:]]).astype(np.int64), name))
        node.input[1] = name
        changed = True
    if not changed:
        return graph
    for value in (*model.graph.input, *model.graph.output):
        dimensions = value.type.tensor_type.shape.dim
        if dimensions:
            dimensions[0].dim_param = "batch"
    # They hold the old batch size.
    del model.graph.value_info[:]
    return replace(graph, model=bytes(model.SerializeToString()), fixed_batch=None)
