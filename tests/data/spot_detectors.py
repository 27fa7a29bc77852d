"""Small networks in the forms of YuNet and SCRFD, which take a white square of 8x8 pixels for a face."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from arcface_kd.data.formats.face_alignment import TEMPLATE

# A face half as large as an aligned one, around its square's upper left corner; in steps of 8 pixels.
POINTS = (TEMPLATE - 56) / 2 / 8
BOX = np.array([-28.0, -28.0, 28.0, 28.0]) / 8


def _cells(stride: int) -> tuple[list[onnx.NodeProto], str]:
    """The mean of each cell, (1, 1, rows, columns)."""
    pooled, mean = f"pooled_{stride}", f"mean_{stride}"
    return [
        helper.make_node("AveragePool", ["input"], [pooled], kernel_shape=[stride] * 2, strides=[stride] * 2),
        helper.make_node("Conv", [pooled, "third"], [mean], kernel_shape=[1, 1]),
    ], mean


def _affine(
    mean: str, name: str, factor: NDArray[np.float64], shift: NDArray[np.float64], shape: list[int]
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """An output of ``factor * mean + shift``, one channel for each number, in the detector's order."""
    weights: dict[str, NDArray[Any]] = {
        f"{name}_factor": factor.reshape(-1, 1, 1, 1).astype(np.float32),
        f"{name}_shift": shift.astype(np.float32),
        f"{name}_shape": np.array(shape, dtype=np.int64),
    }
    nodes = [
        helper.make_node("Conv", [mean, f"{name}_factor", f"{name}_shift"], [f"{name}_maps"], kernel_shape=[1, 1]),
        helper.make_node("Transpose", [f"{name}_maps"], [f"{name}_last"], perm=[0, 2, 3, 1]),
        helper.make_node("Reshape", [f"{name}_last", f"{name}_shape"], [name]),
    ]
    return nodes, [numpy_helper.from_array(value, key) for key, value in weights.items()]


def _save(
    path: Path, outputs: list[tuple[int, str, NDArray[np.float64], NDArray[np.float64], list[int]]], size: int
) -> Path:
    nodes, tensors = [], [numpy_helper.from_array(np.full((1, 3, 1, 1), 1 / 3, dtype=np.float32), "third")]
    for stride in (8, 16, 32):
        pooling, mean = _cells(stride)
        nodes += pooling
        for own, name, factor, shift, shape in outputs:
            if own == stride:
                more, weights = _affine(mean, name, factor, shift, shape)
                nodes += more
                tensors += weights
    graph = helper.make_graph(
        nodes,
        "spots",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 3, size, size])],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["cells" if side == -1 else side for side in shape])
            for _, name, _, _, shape in outputs
        ],
        tensors,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    return path


def yunet(path: Path) -> Path:
    """OpenCV's form: 12 outputs with names, for pixels of 0 .. 255; boxes by middle and logarithm of the size."""
    size = np.log(BOX[2:] - BOX[:2])
    outputs = []
    for kind in ("cls", "obj", "bbox", "kps"):
        for stride in (8, 16, 32):
            if kind in ("cls", "obj"):
                factor, shift = np.array([1 / 255 if stride == 8 else 0.0]), np.zeros(1)
            else:
                shift = np.array([0.0, 0.0, *size]) if kind == "bbox" else POINTS.ravel()
                factor = np.zeros(len(shift))
            outputs.append((stride, f"{kind}_{stride}", factor, shift, [1, -1, len(shift)]))
    return _save(path, outputs, 640)


def scrfd(path: Path, *, points: bool = True) -> Path:
    """InsightFace's form: 9 outputs in order, 6 without points, for -1 .. 1; of a cell's two anchors one finds."""
    outputs = []
    for kind in ("score", "bbox", "kps")[: 3 if points else 2]:
        for stride in (8, 16, 32):
            if kind == "score":
                factor, shift = np.array([0.5 if stride == 8 else 0.0, 0.0]), np.array([0.5 if stride == 8 else 0, 0.0])
                # Black is -1, and no face.
                outputs.append((stride, f"{kind}_{stride}", factor, shift, [-1, 1]))
            else:
                own = np.abs(BOX) if kind == "bbox" else POINTS.ravel()
                outputs.append((stride, f"{kind}_{stride}", np.zeros(2 * len(own)), np.tile(own, 2), [-1, len(own)]))
    return _save(path, outputs, 64)
