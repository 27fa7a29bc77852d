from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from arcface_kd.errors import TeacherError
from arcface_kd.teachers.onnx import graph as onnx_graph
from arcface_kd.teachers.onnx.graph import free_batch, read_graph
from tests.teachers.onnx_models import (
    embed_one_by_one,
    face_network,
    other_network,
    parsed,
    saved,
    shape_constants,
    weights,
)


def images(count: int = 3) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((count, 3, 112, 112)).astype(np.float32)


def test_a_graph_is_read_as_it_stands(tmp_path: Path) -> None:
    model = face_network()
    graph = read_graph(saved(tmp_path, model))
    assert (graph.input_name, graph.output_name, graph.size, graph.fixed_batch) == ("image", "embedding", 112, 1)
    assert graph.parameter_count == sum(array.size for array in weights().values())
    np.testing.assert_array_equal(embed_one_by_one(parsed(graph.model), images()), embed_one_by_one(model, images()))
    open_one = read_graph(saved(tmp_path, face_network(batch=None, tail="flatten", size=None)))
    assert (open_one.size, open_one.fixed_batch) == (None, None)
    assert free_batch(open_one) is open_one


def test_a_reshape_of_weights_that_shares_the_shape_is_left_alone(tmp_path: Path) -> None:
    behind = "gain_row = Reshape (gain, shape) gained = Mul (row, gain_row) embedding = MatMul (gained, matrix)"
    model = face_network(behind=behind, more={"gain": np.full((2, 32), 2, np.float32)})
    freed = parsed(free_batch(read_graph(saved(tmp_path, model))).model)
    assert shape_constants(freed)["shape"] == [1, -1]
    reshapes = {node.input[0]: node.input[1] for node in freed.graph.node if node.op_type == "Reshape"}
    assert reshapes["gain"] == "shape"
    assert shape_constants(freed)[reshapes["map2"]] == [0, -1]
    np.testing.assert_allclose(embed_one_by_one(freed, images()), embed_one_by_one(model, images()), rtol=1e-5)


def test_denormal_weights_are_flushed_and_nothing_else_is(tmp_path: Path) -> None:
    arrays = weights()
    arrays["conv1"][0] = 1e-39
    arrays["matrix"][0, :3] = (-1e-42, 9e-21, 1.1e-20)
    model = face_network(arrays=arrays)
    graph = read_graph(saved(tmp_path, model))
    found = {tensor.name: numpy_helper.to_array(tensor) for tensor in parsed(graph.model).graph.initializer}
    assert np.all(found["conv1"][0] == 0)
    assert found["matrix"][0, :3].tolist() == [0, 0, np.float32(1.1e-20)]
    np.testing.assert_array_equal(found["conv2"], arrays["conv2"])
    np.testing.assert_array_equal(found["conv1"][1:], arrays["conv1"][1:])
    np.testing.assert_allclose(
        embed_one_by_one(parsed(graph.model), images()), embed_one_by_one(model, images()), atol=1e-7
    )


def test_denormals_in_constant_nodes_and_float_lists_are_flushed_too(tmp_path: Path) -> None:
    model = face_network(behind="bias = Constant () embedding = Add (raw, bias)")
    constant = helper.make_tensor("bias", TensorProto.FLOAT, [16], [1e-40] * 16)
    model.graph.node[-2].attribute.append(helper.make_attribute("value", constant))
    read = parsed(read_graph(saved(tmp_path, model)).model)
    (node,) = (node for node in read.graph.node if node.op_type == "Constant")
    assert np.all(numpy_helper.to_array(node.attribute[0].t) == 0)


def _external(folder: Path, location: str, **entries: str) -> Path:
    model = face_network()
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == "matrix")
    content = tensor.raw_data
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=value)
    inside = folder / "weights.bin"
    inside.write_bytes(b"head" + content)
    return saved(folder, model)


def test_external_data_inside_the_folder_is_taken_in(tmp_path: Path) -> None:
    path = _external(tmp_path, "weights.bin", offset="4")
    graph = read_graph(path)
    rows = embed_one_by_one(parsed(graph.model), images())
    np.testing.assert_array_equal(rows, embed_one_by_one(face_network(), images()))
    (tmp_path / "weights.bin").write_bytes((tmp_path / "weights.bin").read_bytes()[:-4] + b"\0\0\0\0")
    assert read_graph(path).digest != graph.digest


@pytest.mark.parametrize(
    ("location", "entries", "message"),
    [
        ("../secret.bin", {}, "outside"),
        ("/etc/hostname", {}, "outside"),
        ("sub/../../secret.bin", {}, "outside"),
        ("link.bin", {}, "outside"),
        ("*/_ORT_MEM_ADDR_/*", {"offset": "4096", "length": "4096"}, "not there"),
        ("..\\secret.bin", {}, "names no file"),
        ("", {}, "names no file"),
        ("missing.bin", {}, "not there"),
        # Python 3.13 follows a loop of links to nowhere.
        ("loop.bin", {}, "which (cannot be read: |is not there)"),
        ("name" * 1000, {}, "which cannot be read: "),
        (".", {}, "not there"),
        ("weights.bin", {"offset": "4", "length": "99999"}, "99999 bytes from 4, but it has"),
        ("weights.bin", {"offset": "-4"}, "bytes from -4"),
        ("weights.bin", {"offset": "four"}, "at offset 'four'"),
    ],
)
def test_external_data_elsewhere_is_never_opened(
    tmp_path: Path, location: str, entries: dict[str, str], message: str
) -> None:
    (tmp_path / "secret.bin").write_bytes(weights()["matrix"].tobytes())
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    (folder / "loop.bin").symlink_to(folder / "loop.bin")
    path = _external(folder, location, **entries)
    with pytest.raises(TeacherError, match=message) as caught:
        read_graph(path)
    assert "\n" not in str(caught.value)


def test_one_file_cannot_be_taken_in_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gigabyte of nothing takes no room on a disk, and ten thousand tensors could name it."""
    model = face_network()
    for number in range(8):
        tensor = model.graph.initializer.add(name=f"w{number}", data_type=TensorProto.FLOAT, dims=[1 << 8])
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="hole.bin")
    (tmp_path / "hole.bin").write_bytes(bytes(1 << 10))
    path = saved(tmp_path, model)
    monkeypatch.setattr(onnx_graph, "LARGEST_FILE", 1 << 13)
    assert read_graph(path).parameter_count > 8 << 8
    monkeypatch.setattr(onnx_graph, "LARGEST_FILE", (1 << 13) - 1)
    with pytest.raises(TeacherError, match=r"'w0' .* 'hole\.bin': 8192 bytes"):
        read_graph(path)


def _calling(functions: dict[str, list[str]]) -> Any:
    """A network that ends in a call of the first function; each is a chain of calls of others."""
    model = face_network(behind=f"embedding = ours.{next(iter(functions))} (raw)")
    opsets = [helper.make_opsetid("", 13), helper.make_opsetid("ours", 1)]
    for name, called in functions.items():
        nodes = [
            helper.make_node(each, [f"v{place}"], [f"v{place + 1}"], domain="" if each == "Identity" else "ours")
            for place, each in enumerate(called)
        ]
        model.functions.append(helper.make_function("ours", name, ["v0"], [f"v{len(called)}"], nodes, opsets))
    return model


def test_functions_are_counted_as_often_as_they_are_called(tmp_path: Path) -> None:
    """Forty functions that each call the next one twice are 10^12 nodes, which onnxruntime would put in place."""
    halves = {f"f{depth}": [f"f{depth + 1}"] * 2 for depth in range(40)}
    for functions in ({**halves, "f40": ["Identity"]}, {"f": ["g"], "g": ["f"]}, {"f": ["f"]}):
        with pytest.raises(TeacherError, match="comes to more than 100000 nodes"):
            read_graph(saved(tmp_path, _calling(functions)))
    model = _calling({"f": ["g", "Identity", "g"], "g": ["Identity"] * 3})
    rows = embed_one_by_one(parsed(read_graph(saved(tmp_path, model)).model), images())
    np.testing.assert_array_equal(rows, embed_one_by_one(face_network(), images()))


def test_external_data_in_a_nodes_attribute_is_not_opened_either(tmp_path: Path) -> None:
    model = face_network()
    tensor = TensorProto(data_type=TensorProto.FLOAT, dims=[1], name="hidden", data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="/etc/hostname")
    model.graph.node.insert(0, helper.make_node("Constant", [], ["hidden"], value=tensor))
    with pytest.raises(TeacherError, match="outside the model's folder"):
        read_graph(saved(tmp_path, model))


@pytest.mark.parametrize("operator", ["Loop", "Scan", "SequenceMap", "EPContext"])
@pytest.mark.parametrize("place", ["graph", "branch", "function"])
def test_what_may_not_end_or_names_files_of_its_own_is_not_run(tmp_path: Path, operator: str, place: str) -> None:
    model = face_network()
    body = helper.make_graph([], "body", [], [])
    node = helper.make_node(operator, ["", ""], ["embedding2"], body=body)
    if place == "branch":
        branch = helper.make_graph([node], "branch", [], [])
        node = helper.make_node("If", ["image"], [], then_branch=branch, else_branch=branch)
    if place == "function":
        model.functions.append(helper.make_function("ours", "hidden", [], [], [node], []))
    else:
        model.graph.node.append(node)
    with pytest.raises(TeacherError, match=f"uses the operator {operator}"):
        read_graph(saved(tmp_path, model))


def test_a_giant_activation_is_refused_before_anything_runs(tmp_path: Path) -> None:
    model = face_network()
    model.graph.node[0].attribute.append(helper.make_attribute("pads", [10**6] * 4))
    with pytest.raises(TeacherError, match="larger than any"):
        read_graph(saved(tmp_path, model))
    model = face_network(
        behind="bomb = ConstantOfShape (many) embedding = Identity (raw)", more={"many": np.array([1 << 40])}
    )
    with pytest.raises(TeacherError, match="'bomb' would be 1099511627776"):
        read_graph(saved(tmp_path, model))
    # What counts is one image: as many as the graph declares are freed.
    assert read_graph(saved(tmp_path, face_network(batch=200_000))).fixed_batch == 200_000


def test_other_networks_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match=r"has 9 outputs, output0 \(1x3x1x1\)"):
        read_graph(saved(tmp_path, other_network(640, 9)))
    for shape in ("1x3x112x96", "1x1x112x112"):
        model = face_network(inputs=f"float[{shape.replace('x', ', ')}] image")
        with pytest.raises(TeacherError, match=f"takes input of {shape}; wanted Nx3xSxS"):
            read_graph(saved(tmp_path, model))


@pytest.mark.parametrize("content", [b"", b"hello", b"\x08\x07\x12\x03abc", b"\x08", bytes(100)])
def test_what_is_no_onnx_file_ends_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(TeacherError, match=r"model\.onnx is damaged or no ONNX file|an empty file") as caught:
        read_graph(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [b"Conv_0", b"slope", b"image"])
def test_a_name_that_is_not_text_is_refused(tmp_path: Path, name: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(face_network().SerializeToString().replace(name, b"\xff" * len(name)))
    with pytest.raises(TeacherError, match="a name in it is not text"):
        read_graph(path)


def test_a_tensor_whose_bytes_do_not_fill_its_shape_is_named(tmp_path: Path) -> None:
    model = face_network()
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == "matrix")
    tensor.raw_data = tensor.raw_data[:-4]
    with pytest.raises(TeacherError, match="'matrix' is damaged"):
        read_graph(saved(tmp_path, model))
