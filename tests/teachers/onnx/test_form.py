"""The one form that ONNX files are read in: whatever layout, outputs and age they have, session and torch agree."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static

from arcface_kd.errors import ConfigError, TeacherError
from arcface_kd.teachers import load_teacher
from arcface_kd.teachers.onnx.graph import read_graph
from arcface_kd.teachers.onnx.torch_module import TorchGraph
from arcface_kd.teachers.student_init import TrainedGraph
from tests.teachers.onnx_models import (
    EMBEDDING_SIZE,
    embed_one_by_one,
    face_network,
    saved,
    weights,
)

EMBEDDING = "float[N, 16] embedding"
CLASSES = np.ones((EMBEDDING_SIZE, 48), np.float32)


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


TRANSPOSED = "prepared = Transpose <perm = [0, 3, 1, 2]> "
CAST_FIRST = f"cast = Cast <to = 1> (image) same = Add (cast, nothing) last = Identity (same) {TRANSPOSED} (last)"


@pytest.mark.parametrize(
    ("inputs", "before", "size", "batch"),
    [
        ("float[N, 112, 112, 3] image", f"{TRANSPOSED} (image)", 112, None),
        ("float[1, 112, 112, 3] image", f"{TRANSPOSED} (image)", 112, 1),
        ("float[N, H, W, 3] image", f"{TRANSPOSED} (image)", None, None),
        ("float[N, 112, 112, C] image", CAST_FIRST, 112, None),
    ],
    ids=["declared", "batch_too", "any_size", "told_by_the_transposition"],
)
def test_channels_last(
    inputs: str, before: str, size: int | None, batch: int | None, wanted: np.ndarray, tmp_path: Path
) -> None:
    """As tf2onnx writes Keras networks, with a transposition behind what is done to the image."""
    path = saved(tmp_path, plain(inputs=inputs, before=before, more={"nothing": np.zeros(3, np.float32)}))
    assert (read_graph(path).size, read_graph(path).fixed_batch) == (size, batch)
    assert_embeds_as(wanted, path)


@pytest.mark.parametrize(
    ("axes", "shape"), [([1], "N, 1, 16"), ([2], "N, 16, 1"), ([2, 3], "N, 16, 1, 1"), ([1, 2], "N, 1, 1, 16")]
)
def test_axes_of_length_one_beside_the_embedding(
    axes: list[int], shape: str, wanted: np.ndarray, tmp_path: Path
) -> None:
    model = plain(
        behind="embedding = Unsqueeze (raw, axes)", more={"axes": np.array(axes)}, outputs=f"float[{shape}] embedding"
    )
    path = saved(tmp_path, model)
    assert read_graph(path).width == EMBEDDING_SIZE
    assert_embeds_as(wanted, path)


def test_an_embedding_without_a_batch_axis(wanted: np.ndarray, tmp_path: Path) -> None:
    """A graph of one image whose last node takes away all axes of length 1."""
    model = face_network(tail="flatten", behind="embedding = Squeeze (raw)", outputs="float[16] embedding")
    assert_embeds_as(wanted, saved(tmp_path, model))


def test_of_two_outputs_the_embedding_is_taken(wanted: np.ndarray, tmp_path: Path) -> None:
    """Embedding and norm, as AdaFace gives them."""
    behind = "norm = ReduceL2 <axes = [1], keepdims = 1> (raw) feature = Div (raw, norm)"
    path = saved(tmp_path, plain(behind=behind, outputs="float[N, 1] norm, float[N, 16] feature"))
    assert_embeds_as(wanted / np.linalg.norm(wanted, axis=1, keepdims=True), path)
    assert load_teacher(path).description == f"ONNX {path} (output feature of norm, feature)"
    graph = read_graph(path)
    assert (graph.output_name, graph.width) == ("feature", EMBEDDING_SIZE)


def test_an_output_of_a_few_attributes_is_no_embedding(wanted: np.ndarray, tmp_path: Path) -> None:
    model = plain(
        behind="embedding = Identity (raw) pose = MatMul (raw, poses)",
        outputs=f"float[N, 3] pose, {EMBEDDING}",
        more={"poses": CLASSES[:, :3]},
    )
    assert_embeds_as(wanted, saved(tmp_path, model))


def test_an_option_names_the_output(wanted: np.ndarray, tmp_path: Path) -> None:
    """A classifier's logits beside the embedding, and labels among the inputs: neither is needed any more."""
    model = plain(
        behind="embedding = Identity (raw) cosines = MatMul (raw, classes) logits = Sub (cosines, label)",
        inputs="float[N, 3, 112, 112] image, float[N, 48] label",
        outputs=f"{EMBEDDING}, float[N, 48] logits",
        more={"classes": CLASSES},
    )
    path = saved(tmp_path, model)
    with pytest.raises(TeacherError, match=r"embedding \(1x16\), logits \(1x48\).*teacher\.output=NAME"):
        load_teacher(path)
    assert_embeds_as(wanted, path, output="embedding")
    teacher, inner = load_teacher(path, {"output": "embedding"}), load_teacher(path, {"output": "row"})
    assert teacher.parameter_count == sum(array.size for array in weights().values())
    assert inner.embedding_size == 64
    assert inner.fingerprint != teacher.fingerprint
    with pytest.raises(TeacherError, match=r"no output 'feature'; there are embedding \(1x16\)"):
        load_teacher(path, {"output": "feature"})
    with pytest.raises(ConfigError, match=r"teacher\.output"):
        load_teacher(torch.nn.Flatten(), {"output": "feature"})


def batch_norm(shape: tuple[int, ...], opset: int, **attributes: Any) -> Any:
    """The network with a batch norm behind its first convolution, and weights among the inputs, as MXNet writes it."""
    generator = np.random.default_rng(5)
    names = ("scale", "bias", "mean", "variance")
    model = plain(more={name: generator.uniform(0.5, 1.5, shape).astype(np.float32) for name in names})
    if opset < 7:
        attributes |= {"is_test": 1}
    norm = helper.make_node(
        "BatchNormalization", ["map1", *names], ["normal"], epsilon=2e-5, momentum=0.9, **attributes
    )
    model.graph.node.insert(1, norm)
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


def test_a_network_exported_in_training_mode_is_evaluated(tmp_path: Path) -> None:
    """Without eval() before the export: statistics of the batch, and some values dropped."""
    wanted = embed_one_by_one(batch_norm((8,), 14), images().numpy())
    model = batch_norm((8,), 14, training_mode=1)
    model.graph.node[1].output.extend(["moved_mean", "moved_variance"])
    for name, value in (("share", np.array(0.5, np.float32)), ("training", np.array(True))):
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    model.graph.node.insert(2, helper.make_node("Dropout", ["normal", "share", "training"], ["dropped"]))
    model.graph.node[3].input[0] = "dropped"
    assert_embeds_as(wanted, saved(tmp_path, model))


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


class CalibrationFaces(CalibrationDataReader):
    """Images for onnxruntime's static quantisation, once."""

    def __init__(self, name: str, images: np.ndarray) -> None:
        self.batches = iter([{name: images}])

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The batch, then None."""
        return next(self.batches, None)


@pytest.mark.parametrize("kind", ["dynamic", "QDQ", "QOperator"])
def test_quantised_weights_count_as_those_that_they_were_made_of(kind: str, tmp_path: Path) -> None:
    model = batch_norm((8,), 13)
    model.ir_version = 8
    model.graph.node[0].input.append("conv_bias")
    model.graph.initializer.append(numpy_helper.from_array(np.ones(8, np.float32), "conv_bias"))
    source, path = saved(tmp_path, model, "float.onnx"), tmp_path / "int8.onnx"
    if kind == "dynamic":
        quantize_dynamic(source, path, weight_type=QuantType.QUInt8)
    else:
        # The weights of a batch norm stay in float32.
        quantize_static(
            source,
            path,
            CalibrationFaces("image", images().numpy()),
            quant_format=QuantFormat[kind],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
    assert load_teacher(path).parameter_count == read_graph(source).parameter_count


def test_a_trained_graph_goes_back_to_a_file_in_the_same_form(wanted: np.ndarray, tmp_path: Path) -> None:
    """Channels last and two outputs in; one image with channels first and the embedding out."""
    model = plain(
        inputs="float[N, 112, 112, 3] image",
        before=f"{TRANSPOSED} (image)",
        behind="embedding = Identity (raw) norm = ReduceL2 <axes = [1]> (raw)",
        outputs=f"{EMBEDDING}, float[N, 1] norm",
    )
    graph = TrainedGraph(read_graph(saved(tmp_path, model)))
    (tmp_path / "trained.onnx").write_bytes(graph.serialised())
    assert_embeds_as(wanted, tmp_path / "trained.onnx")
