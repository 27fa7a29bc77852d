"""The one form that ONNX files are read in: whatever layout, outputs and age they have, session and torch agree."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from arcface_kd.errors import ConfigError, TeacherError
from arcface_kd.teachers import load_teacher
from arcface_kd.teachers.onnx.graph import read_graph
from arcface_kd.teachers.onnx.torch_module import TorchGraph
from arcface_kd.teachers.student_init import TrainedGraph
from tests.teachers.onnx_models import EMBEDDING_SIZE, embed_one_by_one, face_network, saved, weights


def images(count: int = 3) -> torch.Tensor:
    return torch.rand(count, 3, 112, 112, generator=torch.Generator().manual_seed(0)) * 2 - 1


def plain(**keywords: Any) -> Any:
    return face_network(batch=None, tail="flatten", **keywords)


def assert_embeds_as(wanted: np.ndarray, path: Path, **options: object) -> None:
    """The teacher and the torch module of the graph give the wanted embeddings, for several images and for one."""
    teacher = load_teacher(path, options)
    module = TorchGraph(read_graph(path, options.get("output"))).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        for count in (3, 1):
            expected = torch.from_numpy(wanted[:count])
            torch.testing.assert_close(teacher(images(count)), expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(module(images(count)).reshape(count, -1), expected, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def wanted() -> np.ndarray:
    return embed_one_by_one(plain(), images().numpy())


def channels_last(*, declared: bool = True, side: int | None = 112, before: tuple[str, ...] = ()) -> Any:
    """As tf2onnx writes Keras networks: N x S x S x 3, and a transposition behind what is done to the image."""
    model = plain()
    nodes, last = [], "image"
    for operator in before:
        others = ["nothing"] if operator in ("Add", "Sub") else []
        attributes: dict[str, Any] = {"to": TensorProto.FLOAT} if operator == "Cast" else {}
        nodes.append(helper.make_node(operator, [last, *others], [f"{operator}_out"], **attributes))
        last = f"{operator}_out"
    nodes.append(helper.make_node("Transpose", [last], ["nchw"], perm=[0, 3, 1, 2]))
    model.graph.node[0].input[0] = "nchw"
    for node in reversed(nodes):
        model.graph.node.insert(0, node)
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(3, np.float32), "nothing"))
    shape = ["batch", side or "h", side or "w", 3 if declared else "c"]
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("image", TensorProto.FLOAT, shape))
    return model


@pytest.mark.parametrize(
    "model",
    [
        channels_last(),
        channels_last(side=None),
        channels_last(declared=False, before=("Cast", "Add", "Identity")),
    ],
    ids=["declared", "any_size", "told_by_the_transposition"],
)
def test_channels_last(model: Any, wanted: np.ndarray, tmp_path: Path) -> None:
    path = saved(tmp_path, model)
    assert (read_graph(path).size or 0) == model.graph.input[0].type.tensor_type.shape.dim[1].dim_value
    assert_embeds_as(wanted, path)


def test_channels_last_of_a_declared_batch_size(wanted: np.ndarray, tmp_path: Path) -> None:
    model = channels_last()
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    assert read_graph(saved(tmp_path, model)).fixed_batch == 1
    assert_embeds_as(wanted, tmp_path / "model.onnx")


def ended(operator: str, shape: list[Any], axes: list[int]) -> Any:
    """The network with one more node behind the embedding."""
    model = plain()
    model.graph.node[-1].output[0] = "before"
    taken = ["before"]
    if axes:
        model.graph.initializer.append(numpy_helper.from_array(np.array(axes), "axes"))
        taken.append("axes")
    model.graph.node.append(helper.make_node(operator, taken, ["embedding"]))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("embedding", TensorProto.FLOAT, shape))
    return model


@pytest.mark.parametrize(
    ("axes", "shape"),
    [
        ([1], ["batch", 1, 16]),
        ([2], ["batch", 16, 1]),
        ([2, 3], ["batch", 16, 1, 1]),
        ([1, 2], ["batch", 1, 1, 16]),
    ],
)
def test_axes_of_length_one_beside_the_embedding(
    axes: list[int], shape: list[Any], wanted: np.ndarray, tmp_path: Path
) -> None:
    path = saved(tmp_path, ended("Unsqueeze", shape, axes))
    assert read_graph(path).width == EMBEDDING_SIZE
    assert_embeds_as(wanted, path)


def test_an_embedding_without_a_batch_axis(wanted: np.ndarray, tmp_path: Path) -> None:
    """A graph of one image whose last node takes away all axes of length 1."""
    model = ended("Squeeze", [16], [])
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    assert_embeds_as(wanted, saved(tmp_path, model))


def with_norm() -> Any:
    """Embedding and norm, as AdaFace gives them."""
    model = plain()
    model.graph.node.append(helper.make_node("ReduceL2", ["embedding"], ["norm"], axes=[1], keepdims=1))
    model.graph.node.append(helper.make_node("Div", ["embedding", "norm"], ["feature"]))
    del model.graph.output[:]
    for name, size in (("norm", 1), ("feature", EMBEDDING_SIZE)):
        model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", size]))
    return model


def test_of_two_outputs_the_embedding_is_taken(wanted: np.ndarray, tmp_path: Path) -> None:
    path = saved(tmp_path, with_norm())
    assert_embeds_as(wanted / np.linalg.norm(wanted, axis=1, keepdims=True), path)
    assert load_teacher(path).description == f"ONNX {path} (output feature of norm, feature)"
    graph = read_graph(path)
    assert (graph.output_name, graph.width) == ("feature", EMBEDDING_SIZE)


def test_an_output_of_a_few_attributes_is_no_embedding(wanted: np.ndarray, tmp_path: Path) -> None:
    model = plain()
    model.graph.initializer.append(numpy_helper.from_array(np.ones((EMBEDDING_SIZE, 3), np.float32), "poses"))
    model.graph.node.append(helper.make_node("MatMul", ["embedding", "poses"], ["pose"]))
    model.graph.output.insert(0, helper.make_tensor_value_info("pose", TensorProto.FLOAT, ["batch", 3]))
    assert_embeds_as(wanted, saved(tmp_path, model))


def with_logits() -> Any:
    """A classifier's logits beside the embedding, and labels among the inputs."""
    model = plain()
    model.graph.initializer.append(numpy_helper.from_array(np.ones((EMBEDDING_SIZE, 48), np.float32), "classes"))
    model.graph.node.append(helper.make_node("MatMul", ["embedding", "classes"], ["cosines"]))
    model.graph.node.append(helper.make_node("Sub", ["cosines", "label"], ["logits"]))
    model.graph.input.append(helper.make_tensor_value_info("label", TensorProto.FLOAT, ["batch", 48]))
    model.graph.output.append(helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 48]))
    return model


def test_an_option_names_the_output(wanted: np.ndarray, tmp_path: Path) -> None:
    path = saved(tmp_path, with_logits())
    with pytest.raises(TeacherError, match=r"embedding \(1x16\), logits \(1x48\).*teacher\.output=NAME"):
        load_teacher(path)
    assert_embeds_as(wanted, path, output="embedding")
    teacher = load_teacher(path, {"output": "embedding"})
    # Neither the classifier nor the labels are needed any more.
    assert teacher.parameter_count == sum(array.size for array in weights().values())
    inner = load_teacher(path, {"output": "row"})
    assert inner.embedding_size == 64
    assert inner.fingerprint != teacher.fingerprint


def test_an_output_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match=r"no output 'feature'; there are embedding \(1x16\)"):
        load_teacher(saved(tmp_path, plain()), {"output": "feature"})
    with pytest.raises(ConfigError, match=r"teacher\.output"):
        load_teacher(torch.nn.Flatten(), {"output": "feature"})


def batch_norm(shape: tuple[int, ...], opset: int, **attributes: Any) -> Any:
    """The network with a batch norm behind its first convolution, and weights among the inputs, as MXNet writes it."""
    model = plain()
    generator = np.random.default_rng(5)
    for name in ("scale", "bias", "mean", "variance"):
        array = generator.uniform(0.5, 1.5, shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    taken = ["map1", "scale", "bias", "mean", "variance"]
    if opset < 7:
        attributes |= {"is_test": 1}
    made = helper.make_node("BatchNormalization", taken, ["normal"], epsilon=2e-5, momentum=0.9, **attributes)
    model.graph.node.insert(1, made)
    model.graph.node[2].input[0] = "normal"
    model.opset_import[0].version, model.ir_version = opset, 3
    for tensor in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    return model


@pytest.mark.parametrize("opset", [6, 7, 8, 9])
def test_a_batch_norm_that_is_not_spatial_has_one_scale_a_channel(opset: int, tmp_path: Path) -> None:
    """As MXNet's exporter writes them; onnxruntime refuses the file as it is, and operator sets below 7 at all."""
    wanted = embed_one_by_one(batch_norm((8,), 9), images().numpy())
    assert_embeds_as(wanted, saved(tmp_path, batch_norm((8,), opset, spatial=0)))


def test_a_batch_norm_with_a_scale_for_each_place(tmp_path: Path) -> None:
    model = batch_norm((8, 14, 14), 8, spatial=0)
    assert_embeds_as(embed_one_by_one(model, images().numpy()), saved(tmp_path, model))


def test_a_vector_of_slopes_has_one_a_channel(wanted: np.ndarray, tmp_path: Path) -> None:
    arrays = weights()
    arrays["slope"] = arrays["slope"].reshape(8)
    assert_embeds_as(wanted, saved(tmp_path, plain(arrays=arrays)))


def test_functions_are_put_in_place(wanted: np.ndarray, tmp_path: Path) -> None:
    model = plain()
    opsets = [helper.make_opsetid("", 13), helper.make_opsetid("ours", 1)]
    body = [helper.make_node("PRelu", ["a", "b"], ["c"])]
    model.functions.append(helper.make_function("ours", "Active", ["a", "b"], ["c"], body, opsets))
    model.opset_import.append(opsets[1])
    model.graph.node[1].op_type, model.graph.node[1].domain = "Active", "ours"
    assert_embeds_as(wanted, saved(tmp_path, model))


@pytest.mark.parametrize("kind", ["dynamic", "QDQ", "QOperator"])
def test_quantised_weights_count_as_those_that_they_were_made_of(kind: str, tmp_path: Path) -> None:
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_dynamic,
        quantize_static,
    )

    class Faces(CalibrationDataReader):
        given: int = 0

        def get_next(self) -> dict[str, np.ndarray] | None:
            self.given += 1
            return {"image": images().numpy()} if self.given == 1 else None

    source = saved(tmp_path, batch_norm((8,), 13), "float.onnx")
    plain_model = onnx.load(str(source))
    plain_model.ir_version = 8
    plain_model.graph.node[0].input.append("conv_bias")
    plain_model.graph.initializer.append(numpy_helper.from_array(np.ones(8, np.float32), "conv_bias"))
    onnx.save(plain_model, str(source))
    path = tmp_path / "int8.onnx"
    if kind == "dynamic":
        quantize_dynamic(source, path, weight_type=QuantType.QUInt8)
    else:
        # The weights of a batch norm stay in float32.
        quantize_static(
            source,
            path,
            Faces(),
            quant_format=QuantFormat[kind],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
    count = read_graph(path).parameter_count
    assert count == read_graph(source).parameter_count
    assert load_teacher(path).parameter_count == count


def test_a_trained_graph_goes_back_to_a_file_in_the_same_form(wanted: np.ndarray, tmp_path: Path) -> None:
    """Channels last and two outputs in; one image with channels first and the embedding out."""
    model = channels_last()
    model.graph.node.append(helper.make_node("ReduceL2", ["embedding"], ["norm"], axes=[1]))
    model.graph.output.append(helper.make_tensor_value_info("norm", TensorProto.FLOAT, ["batch", 1]))
    graph = TrainedGraph(read_graph(saved(tmp_path, model)))
    (tmp_path / "trained.onnx").write_bytes(graph.serialised())
    assert_embeds_as(wanted, tmp_path / "trained.onnx")
