"""Small ONNX graphs of the shapes that face networks have, for the tests to break."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

EMBEDDING_SIZE = 16

Tail = Literal["reshape", "constant_node", "flatten", "merged", "mixing"]


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


def face_network(
    *,
    batch: int | None = 1,
    tail: Tail = "reshape",
    leading: Sequence[str] = (),
    arrays: dict[str, np.ndarray] | None = None,
    element: int = TensorProto.FLOAT,
    size: int | None = 112,
) -> Any:
    """A recognition network.

    Args:
        batch: the batch size that input, output and Reshape declare; None leaves it open.
        tail: how the feature map becomes a row: Reshape by an initializer or by a Constant node, Flatten, a Reshape
            that merges the batch with the channels, or a term that mixes the batch's images.
        leading: names of scalar nodes before the first convolution; those with "Sub" or "minus" in them subtract.
        arrays: weights.
        element: type of the input.
        size: height and width the input declares.
    """
    arrays = dict(arrays if arrays is not None else weights())
    nodes, last = [], "image"
    if element != TensorProto.FLOAT:
        nodes.append(helper.make_node("Cast", [last], ["as_float"], to=TensorProto.FLOAT))
        last = "as_float"
    for number, name in enumerate(leading):
        subtracts = "sub" in name.lower() or "minus" in name.lower()
        arrays[f"scalar{number}"] = np.array(127.5 if subtracts else 1 / 127.5, np.float32)
        operator = "Sub" if subtracts else "Mul"
        nodes.append(helper.make_node(operator, [last, f"scalar{number}"], [f"scaled{number}"], name=name))
        last = f"scaled{number}"
    nodes += [
        helper.make_node("Conv", [last, "conv1"], ["map1"], name="Conv_0", kernel_shape=[8, 8], strides=[8, 8]),
        helper.make_node("PRelu", ["map1", "slope"], ["active"], name="PRelu_1"),
        helper.make_node("Conv", ["active", "conv2"], ["map2"], name="Conv_2", kernel_shape=[7, 7], strides=[7, 7]),
    ]
    fixed = batch or 1
    if tail == "flatten":
        nodes.append(helper.make_node("Flatten", ["map2"], ["row"]))
    elif tail == "constant_node":
        shape = numpy_helper.from_array(np.array([fixed, -1], np.int64))
        nodes.append(helper.make_node("Constant", [], ["shape"], value=shape))
        nodes.append(helper.make_node("Reshape", ["map2", "shape"], ["row"]))
    elif tail == "merged":
        arrays["merged_shape"] = np.array([fixed * 16, 4], np.int64)
        arrays["shape"] = np.array([fixed, 64], np.int64)
        nodes.append(helper.make_node("Reshape", ["map2", "merged_shape"], ["merged"]))
        nodes.append(helper.make_node("Reshape", ["merged", "shape"], ["row"]))
    else:
        arrays["shape"] = np.array([fixed, -1], np.int64)
        nodes.append(helper.make_node("Reshape", ["map2", "shape"], ["row"]))
    nodes.append(helper.make_node("MatMul", ["row", "matrix"], ["embedding" if tail != "mixing" else "projected"]))
    if tail == "mixing":
        nodes.append(helper.make_node("Softmax", ["projected"], ["shares"], axis=0))
        nodes.append(helper.make_node("Mul", ["projected", "shares"], ["embedding"]))
    declared = "batch" if batch is None else batch
    side = "side" if size is None else size
    graph = helper.make_graph(
        nodes,
        "face",
        [helper.make_tensor_value_info("image", element, [declared, 3, side, side])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, [declared, EMBEDDING_SIZE])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


def other_network(side: int, outputs: int) -> Any:
    """A detector or landmark network of a pack: one input of ``side``, so many outputs."""
    nodes = [helper.make_node("GlobalAveragePool", ["image"], ["pooled"])]
    nodes += [helper.make_node("Identity", ["pooled"], [f"output{number}"]) for number in range(outputs)]
    graph = helper.make_graph(
        nodes,
        "other",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, side, side])],
        [
            helper.make_tensor_value_info(f"output{number}", TensorProto.FLOAT, [1, 3, 1, 1])
            for number in range(outputs)
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


def embed_one_by_one(model: Any, prepared: np.ndarray) -> np.ndarray:
    """What onnxruntime says of each image alone, the model being as it is."""
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    batch = model.graph.input[0].type.tensor_type.shape.dim[0].dim_value or 1
    rows = []
    for image in prepared:
        answer = session.run(None, {"image": np.repeat(image[None], batch, axis=0)})[0]
        rows.append(answer[0])
    return np.stack(rows)


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
