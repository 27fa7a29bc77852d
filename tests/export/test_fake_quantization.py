"""Rounding in training against the file's own arithmetic, its gradients, and what tuning gains."""

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from arcface_kd.export.fake_quantization import FakeQuantizedGraph, tune
from arcface_kd.export.int8 import quantize
from arcface_kd.teachers.onnx.graph import OnnxGraph
from arcface_kd.teachers.onnx.torch_module import TorchGraph
from tests.export.students import cosines

SIZE = 8


@pytest.fixture
def model() -> bytes:
    """A first convolution, which stays in float, a depthwise one, which stays too, a dense one and a matrix."""
    random = np.random.default_rng(0)
    shapes = {"stem": (8, 3, 3, 3), "depthwise": (8, 1, 3, 3), "dense": (8, 8, 1, 1), "matrix": (6, 128), "bias": (6,)}
    arrays = {name: random.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}
    nodes = [
        helper.make_node("Conv", ["data", "stem"], ["a"], name="first"),
        helper.make_node("Conv", ["a", "depthwise"], ["b"], name="second", group=8),
        helper.make_node("Conv", ["b", "dense"], ["c"], name="third"),
        helper.make_node("LeakyRelu", ["c"], ["d"], name="slope", alpha=0.25),
        helper.make_node("Flatten", ["d"], ["e"], name="flat"),
        helper.make_node("Gemm", ["e", "matrix", "bias"], ["embedding"], name="fourth", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("data", TensorProto.FLOAT, ["batch", 3, SIZE, SIZE])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", 6])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    return bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    )


def graph_of(model: bytes) -> OnnxGraph:
    return OnnxGraph(model, "data", "embedding", size=SIZE, fixed_batch=None, parameter_count=0, digest="")


def images_of(seed: int, count: int = 16) -> NDArray[Any]:
    return np.random.default_rng(seed).normal(size=(count, 3, SIZE, SIZE)).astype(np.float32)


def run(model: bytes, images: NDArray[Any]) -> NDArray[Any]:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"data": images})[0])


def test_depthwise_convolutions_and_the_first_stay_in_float(model: bytes) -> None:
    images = images_of(1, 64)
    quantized = quantize(model, images)
    stored = {tensor.name: tensor.data_type for tensor in onnx.load_model_from_string(quantized).graph.initializer}
    assert stored["stem"] == stored["depthwise"] == TensorProto.FLOAT
    assert "dense" not in stored
    assert stored["dense_quantized"] == stored["matrix_quantized"] == TensorProto.INT8
    assert 0.99 < cosines(run(model, images), run(quantized, images)).mean() < 1 - 1e-7
    whole = onnx.load_model_from_string(quantize(model, images, leading=1.0))
    assert {"stem", "depthwise", "dense"} < {tensor.name for tensor in whole.graph.initializer}


def test_it_computes_what_the_file_does(model: bytes) -> None:
    shown, images = images_of(1, 64), images_of(2)
    network = FakeQuantizedGraph(graph_of(model), 0.0, torch.from_numpy(shown))
    file = quantize(model, shown, ranges=network.ranges())
    rounded, exact = run(file, images), run(model, images)
    with torch.no_grad():
        met = network(torch.from_numpy(images)).numpy()
    error = np.abs(rounded - exact).mean()
    assert error > 1e-3
    # Biases are rounded as well, to 32 bits, and a sum may fall on the other side of a half.
    assert np.abs(met - rounded).mean() < 0.1 * error


def test_ranges_begin_as_the_file_s_own(model: bytes) -> None:
    shown = images_of(1, 64)
    ranges = FakeQuantizedGraph(graph_of(model), 0.0, torch.from_numpy(shown)).ranges()
    assert set(ranges) == {"b", "c", "e", "embedding"}
    file = onnx.load_model_from_string(quantize(model, shown))
    scales = {each.name: float(numpy_helper.to_array(each).ravel()[0]) for each in file.graph.initializer}
    for name, (low, high) in ranges.items():
        assert (high - low) / 255 == pytest.approx(scales[f"{name}_scale"], rel=0.02)


def test_weights_and_scales_get_gradients(model: bytes) -> None:
    network = FakeQuantizedGraph(graph_of(model), 0.0, torch.from_numpy(images_of(1, 64)))
    network(torch.from_numpy(images_of(2))).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name
    # Behind rounding, a weight's gradient is that of the network in float, up to what rounding changed on the way.
    exact = TorchGraph(graph_of(model)).eval()
    exact(torch.from_numpy(images_of(2))).square().sum().backward()
    for name, parameter in exact.named_parameters():
        own = network.get_parameter(name).grad
        assert own is not None
        assert parameter.grad is not None
        assert torch.nn.functional.cosine_similarity(own.flatten(), parameter.grad.flatten(), dim=0) > 0.9, name


def test_a_scale_s_gradient_is_that_of_learned_steps(model: bytes) -> None:
    """By hand: within the range, the rounded step less the exact one; outside, the last step."""
    network = FakeQuantizedGraph(graph_of(model), 0.0, torch.from_numpy(images_of(1, 64)))
    low, high = network.ranges()["c"]
    scale = (high - low) / 255
    values = torch.tensor([0.3 * high, 0.71 * low, 1.5 * high])
    network.activation("c", values).sum().backward()
    zero = round(-low / scale)
    steps = values / scale + zero
    by_hand = torch.where(steps > 255, 255.0 - zero, steps.round() - steps).sum() * scale
    (gradient,) = [each.grad for each in network.log_scales if each.grad is not None]
    torch.testing.assert_close(gradient, by_hand, rtol=1e-3, atol=1e-4)


def test_tuning_brings_the_file_nearer(model: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("arcface_kd.export.fake_quantization._WEIGHT_RATE", 1e-3)
    shown, images = images_of(1, 64), images_of(2, 256)
    exact = TorchGraph(graph_of(model)).eval()

    def teacher(batch: Tensor) -> Tensor:
        return torch.as_tensor(exact(batch))

    tuned, ranges = tune(model, shown, lambda step: images_of(3 + step, 64), teacher, leading=0.0, steps=60)
    wanted = run(model, images)

    def distance(met: NDArray[Any]) -> float:
        unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (met, wanted)]
        return float(np.square(unit[0] - unit[1]).sum(1).mean())

    before, after = (quantize(each, shown, ranges=given) for each, given in ((model, None), (tuned, ranges)))
    assert distance(run(after, images)) < 0.9 * distance(run(before, images))
