"""Embedding with an ONNX teacher whose file carries denormal weights, against the same file without them.

Weights below 1e-38 are kept by a CPU in a form that it multiplies many times more slowly. Published teachers carry
thousands of them: ``mobilefacenet_512.onnx`` of the real data, which is taken where ARCFACE_KD_REAL_DATA names it;
elsewhere a convolution of our own with the like.

Providers:
    as it is: the file in onnxruntime.
    arcface_kd: the file as a teacher.
    cleaned twin: a teacher from a file whose denormal weights are zeros.
"""

import os
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from arcface_kd.teachers.base import Teacher, load_teacher
from benchmarks.record import Recorder, Row, print_table, print_verdict
from benchmarks.timing import interleaved_seconds

MOST_OF_TWIN = 1.1
OPTIONS = {"channels": "bgr", "mean": 127, "std": 128}


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        batch: B.
        rounds: rounds of the comparison.
    """

    batch: int = 64
    rounds: int = 9


TINY = Sizes(2, 1)


def _drawn_model() -> Any:
    """A convolution of 3 x 3 to 64 channels, half of its weights denormal, and the mean of each channel."""
    from onnx import TensorProto, helper, numpy_helper

    weights = np.random.default_rng(0).normal(size=(64, 3, 3, 3)).astype(np.float32)
    weights[::2] *= np.float32(1e-39)
    nodes = [
        helper.make_node("Conv", ["image", "weights"], ["maps"], pads=[1, 1, 1, 1]),
        helper.make_node("GlobalAveragePool", ["maps"], ["means"]),
        helper.make_node("Flatten", ["means"], ["embedding"]),
    ]
    graph = helper.make_graph(
        nodes,
        "drawn",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 112, 112])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", 64])],
        [numpy_helper.from_array(weights, "weights")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def clear_denormals(model: Any) -> int:
    """Put zeros for an ONNX model's denormal float32 weights; how many these were."""
    from onnx import numpy_helper

    count = 0
    for tensor in model.graph.initializer:
        weights = numpy_helper.to_array(tensor)
        if weights.dtype == np.float32:
            denormal = (weights != 0) & (np.abs(weights) < np.finfo(np.float32).tiny)
            count += int(denormal.sum())
            tensor.CopyFrom(numpy_helper.from_array(np.where(denormal, np.float32(0), weights), tensor.name))
    return count


def run(sizes: Sizes, device: torch.device) -> list[Row]:
    """Compare seconds of a batch, print the table and return the rows."""
    import onnx
    import onnxruntime

    recorder = Recorder("denormals", device)
    real = os.environ.get("ARCFACE_KD_REAL_DATA")
    with tempfile.TemporaryDirectory() as folder:
        path, twin = Path(folder) / "model.onnx", Path(folder) / "twin.onnx"
        model = onnx.load(str(Path(real) / "teachers" / "mobilefacenet_512.onnx")) if real else _drawn_model()
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.shape.dim[0].dim_param = "batch"
        path.write_bytes(model.SerializeToString())
        count = clear_denormals(model)
        twin.write_bytes(model.SerializeToString())
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        teachers: dict[str, Teacher] = {
            "arcface_kd": load_teacher(path, OPTIONS, device=device),
            "cleaned twin": load_teacher(twin, OPTIONS, device=device),
        }
        images = torch.rand(sizes.batch, 3, 112, 112, generator=torch.Generator().manual_seed(0)) * 2 - 1
        name, array, on_device = session.get_inputs()[0].name, images.numpy(), images.to(device)
        seconds = interleaved_seconds(
            {
                "as it is": lambda: session.run(None, {name: array}),
                **{whose: partial(teacher, on_device) for whose, teacher in teachers.items()},
            },
            sizes.rounds,
            device,
        )
    what = f"{'mobilefacenet_512' if real else 'drawn'} B={sizes.batch}"
    for provider, value in seconds.items():
        recorder.add(provider, what, "seconds", value)
    print_table(
        f"A batch through {what}, {count} denormal weights, median of {sizes.rounds} rounds",
        ("provider", "seconds", "of twin"),
        [(who, f"{value:.4f}", f"{value / seconds['cleaned twin']:.2f}") for who, value in seconds.items()],
    )
    share = seconds["arcface_kd"] / seconds["cleaned twin"]
    print_verdict("as fast as its cleaned twin", f"{share:.2f} of its time", share <= MOST_OF_TWIN)
    return recorder.rows
