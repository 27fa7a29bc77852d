"""Small ONNX graphs of the shapes that face networks have, in ONNX's own syntax, for the tests to break."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch
from onnx import TensorProto, numpy_helper

EMBEDDING_SIZE = 16
# How the feature map becomes a row of numbers: Reshape by an initializer or a Constant node of either form, Flatten,
# a Reshape that merges the batch with the channels, or one with a term behind it that mixes the batch's images.
TAILS = {
    "reshape": "row = Reshape (map2, shape) raw = MatMul (row, matrix)",
    "constant_node": (
        "same = Constant <value = int64[2] {%d, -1}> () row = Reshape (map2, same) raw = MatMul (row, matrix)"
    ),
    "constant_numbers": (
        "same = Constant <value_ints = [%d, -1]> () row = Reshape (map2, same) raw = MatMul (row, matrix)"
    ),
    "flatten": "row = Flatten (map2) raw = MatMul (row, matrix)",
    "merged": "merged = Reshape (map2, merging) row = Reshape (merged, shape) raw = MatMul (row, matrix)",
    "mixing": (
        "row = Reshape (map2, shape) projected = MatMul (row, matrix) "
        "shares = Softmax <axis = 0> (projected) raw = Mul (projected, shares)"
    ),
}
Tail = Literal["reshape", "constant_node", "constant_numbers", "flatten", "merged", "mixing"]


def saved(folder: Path, model: Any, name: str = "model.onnx") -> Path:
    """Write a model into a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_bytes(model.SerializeToString())
    return path


def pixels(count: int = 5) -> np.ndarray:
    """Random images (count, 3, 112, 112), uint8."""
    return np.random.default_rng(3).integers(0, 256, (count, 3, 112, 112), dtype=np.uint8)


def student_view(images: np.ndarray) -> torch.Tensor:
    """Images as the student sees them, in [-1, 1]."""
    return torch.from_numpy(images.astype(np.float32) / 127.5 - 1)


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    """Two convolutions, 112x112 -> 14x14 -> 2x2, and a matrix."""
    generator = np.random.default_rng(seed)
    shapes = {"conv1": (8, 3, 8, 8), "conv2": (16, 8, 7, 7), "slope": (8, 1, 1), "matrix": (64, EMBEDDING_SIZE)}
    return {
        name: (generator.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
        for name, shape in shapes.items()
    }


def model_of(nodes: str, inputs: str, outputs: str, arrays: Mapping[str, np.ndarray], opset: int = 13) -> Any:
    """A model from ONNX's own syntax: nodes ``y = Flatten <axis = 1> (x)``, inputs ``float[N, 3, 8, 8] x``."""
    own = ', "ours": 1' if "ours." in nodes else ""
    head = f'<ir_version: 8, opset_import: ["": {opset}{own}]>'
    model = onnx.parser.parse_model(f"{head} made ({inputs}) => ({outputs}) {{ {nodes} }}")
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(each), name) for name, each in arrays.items())
    return model


def face_network(
    *,
    batch: int | None = 1,
    tail: Tail = "reshape",
    before: str = "",
    behind: str = "",
    arrays: Mapping[str, np.ndarray] | None = None,
    more: Mapping[str, np.ndarray] | None = None,
    kind: str = "float",
    size: int | None = 112,
    inputs: str = "",
    outputs: str = "",
) -> Any:
    """A recognition network.

    Args:
        batch: the batch size that input, output and Reshape declare; None leaves it open.
        tail: see ``TAILS``.
        before: nodes that lead from "image" to "prepared"; none by default.
        behind: nodes that lead from "raw" to "embedding"; none by default.
        arrays: the weights.
        more: further constants.
        kind: type of the input.
        size: height and width that the input declares.
        inputs: in place of the image input.
        outputs: in place of the embedding output.
    """
    fixed, declared, side = batch or 1, batch or "N", size or "S"
    body = f"""
        [Conv_0] map1 = Conv <kernel_shape = [8, 8], strides = [8, 8]> ({"prepared" if before else "image"}, conv1)
        [PRelu_1] active = PRelu (map1, slope)
        [Conv_2] map2 = Conv <kernel_shape = [7, 7], strides = [7, 7]> (active, conv2)
        {TAILS[tail].replace("%d", str(fixed)).replace("raw", "raw" if behind else "embedding")}
    """
    shapes = {"shape": np.array([fixed, -1]), "merging": np.array([fixed * 16, 4])}
    needed = {name: array for name, array in shapes.items() if f", {name})" in body}
    return model_of(
        f"{before} {body} {behind}",
        inputs or f"{kind}[{declared}, 3, {side}, {side}] image",
        outputs or f"float[{declared}, {EMBEDDING_SIZE}] embedding",
        {**(weights() if arrays is None else arrays), **needed, **(more or {})},
    )


def other_network(side: int, outputs: int) -> Any:
    """A detector or landmark network of a pack: one input of ``side``, so many outputs."""
    names = [f"output{number}" for number in range(outputs)]
    copies = " ".join(f"{name} = Identity (pooled)" for name in names)
    return model_of(
        f"pooled = GlobalAveragePool (image) {copies}",
        f"float[1, 3, {side}, {side}] image",
        ", ".join(f"float[1, 3, 1, 1] {name}" for name in names),
        {},
    )


def embed_one_by_one(model: Any, prepared: np.ndarray) -> np.ndarray:
    """What onnxruntime says of each image alone, the model being as it is."""
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    batch = model.graph.input[0].type.tensor_type.shape.dim[0].dim_value or 1
    return np.stack([session.run(None, {"image": np.repeat(image[None], batch, axis=0)})[0][0] for image in prepared])


def shape_constants(model: Any) -> dict[str, list[int]]:
    """Integer constants by name."""
    return {
        tensor.name: numpy_helper.to_array(tensor).tolist()
        for tensor in model.graph.initializer
        if tensor.data_type == TensorProto.INT64
    }


def parsed(content: bytes) -> Any:
    """A model from its bytes."""
    return onnx.load_model_from_string(content)
