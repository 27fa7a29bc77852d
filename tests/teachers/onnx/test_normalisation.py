"""Normalisation inside a graph: found whatever its nodes are called, and fed the input that its constants are for."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from arcface_kd.data.formats.verification_bin import VerificationSet
from arcface_kd.evaluation.verification import evaluate
from arcface_kd.teachers import load_teacher
from arcface_kd.teachers.onnx.graph import read_graph
from arcface_kd.teachers.onnx.normalisation import find_normalisation
from arcface_kd.teachers.onnx.torch_module import TorchGraph
from tests.teachers.onnx_models import embed_one_by_one, face_network, saved, weights

IMAGENET = np.array([123.675, 116.28, 103.53], np.float32), np.array([58.395, 57.12, 57.375], np.float32)


def number(name: str, value: Any) -> tuple[str, np.ndarray]:
    return name, np.asarray(value, np.float32)


def normalising(
    nodes: Sequence[tuple[Any, ...]],
    arrays: Sequence[tuple[str, np.ndarray]] = (),
    *,
    base: Any = None,
    channels_last: bool = False,
    element: int = TensorProto.FLOAT,
) -> Any:
    """A network behind nodes ``(operator, inputs, outputs, attributes)`` that lead from "x" to "y"."""
    model = face_network(batch=None, tail="flatten") if base is None else base
    image = model.graph.input[0]
    old, image.name = image.name, "x"
    image.type.tensor_type.elem_type = element
    for node in model.graph.node:
        node.input[:] = ["y" if name == old else name for name in node.input]
    if channels_last:
        batch, _, height, width = (
            onnx.TensorShapeProto.Dimension.FromString(size.SerializeToString())
            for size in image.type.tensor_type.shape.dim
        )
        del image.type.tensor_type.shape.dim[:]
        image.type.tensor_type.shape.dim.extend([batch, height, width, onnx.TensorShapeProto.Dimension(dim_value=3)])
    for place, (operator, taken, given, *attributes) in enumerate(nodes):
        made = helper.make_node(operator, taken, given, name=f"layer/{place}", **(attributes[0] if attributes else {}))
        model.graph.node.insert(place, made)
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in arrays)
    return model


def pixels(count: int = 3) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (count, 3, 112, 112)).astype(np.float32)


MEAN, STD = number("mean", 127), number("std", 1 / 128)
FACES = (np.full(3, 127.0), np.full(3, 128.0))
BRIGHTNESS = (*IMAGENET, "0..255", "rgb")
UNITS = [number("mean", IMAGENET[0].reshape(3, 1, 1) / 255), number("std", IMAGENET[1].reshape(3, 1, 1) / 255)]
SWAP = ("channels", np.array([2, 1, 0]))
CASES: dict[str, tuple[Any, Any, tuple[np.ndarray, np.ndarray, str, str]]] = {
    "sub_mul": (
        [("Sub", ["x", "mean"], ["a"]), ("Mul", ["a", "std"], ["y"])],
        [MEAN, STD],
        (*FACES, "0..255", "rgb"),
    ),
    "factor_first": (
        [("Mul", ["std", "x"], ["a"]), ("Add", ["a", "mean"], ["y"])],
        [number("mean", -127 / 128), STD],
        (*FACES, "0..255", "rgb"),
    ),
    "computed_constants": (
        [
            ("Constant", [], ["m0"], {"value": numpy_helper.from_array(np.full(3, 127, np.float32))}),
            ("Unsqueeze", ["m0", "axes"], ["m1"]),
            ("Reciprocal", ["std"], ["s1"]),
            ("Identity", ["x"], ["x1"]),
            ("Sub", ["x1", "m1"], ["a"]),
            ("Div", ["a", "s1"], ["y"]),
        ],
        [("axes", np.array([1, 2])), STD],
        (*FACES, "0..255", "rgb"),
    ),
    "batch_norm": (
        [("BatchNormalization", ["x", "one", "zero", "mean", "variance"], ["y"], {"epsilon": 0.0})],
        [
            number("one", np.ones(3)),
            number("zero", np.zeros(3)),
            number("mean", IMAGENET[0]),
            number("variance", IMAGENET[1] ** 2),
        ],
        BRIGHTNESS,
    ),
    "depthwise_convolution": (
        [("Conv", ["x", "weight", "bias"], ["y"], {"group": 3})],
        [number("weight", (1 / IMAGENET[1]).reshape(3, 1, 1, 1)), number("bias", -IMAGENET[0] / IMAGENET[1])],
        BRIGHTNESS,
    ),
    "zero_to_one": (
        [("Sub", ["x", "half"], ["a"]), ("Div", ["a", "half"], ["y"])],
        [number("half", 0.5)],
        (np.full(3, 127.5), np.full(3, 127.5), "0..1", "rgb"),
    ),
    "zero_to_one_imagenet": (
        [("Sub", ["x", "mean"], ["a"]), ("Div", ["a", "std"], ["y"])],
        UNITS,
        (*IMAGENET, "0..1", "rgb"),
    ),
    "zero_to_one_clipped": (
        [("Clip", ["x", "none", "all"], ["c"]), ("Sub", ["c", "mean"], ["a"]), ("Div", ["a", "std"], ["y"])],
        [*UNITS, number("none", 0), number("all", 1)],
        (*IMAGENET, "0..1", "rgb"),
    ),
    "minus_one_to_one": (
        [
            ("Add", ["x", "one"], ["a"]),
            ("Mul", ["a", "half"], ["b"]),
            ("Sub", ["b", "mean"], ["c"]),
            ("Div", ["c", "std"], ["y"]),
        ],
        [*UNITS, number("one", 1), number("half", 0.5)],
        (*IMAGENET, "-1..1", "rgb"),
    ),
    "a_255th": (
        [("Mul", ["x", "std"], ["y"])],
        [number("std", 1 / 255)],
        (np.zeros(3), np.full(3, 255), "0..255", "rgb"),
    ),
    "half_alone": (
        [("Sub", ["x", "mean"], ["y"])],
        [number("mean", 0.5)],
        (np.full(3, 127.5), np.full(3, 255), "0..1", "rgb"),
    ),
    "bounds": (
        [
            ("Max", ["x", "none"], ["a"]),
            ("Min", ["a", "all"], ["b"]),
            ("Sub", ["b", "mean"], ["c"]),
            ("Mul", ["c", "std"], ["y"]),
        ],
        [MEAN, STD, number("none", 0), number("all", 255)],
        (*FACES, "0..255", "rgb"),
    ),
    "mean_alone": ([("Sub", ["x", "mean"], ["y"])], [MEAN], (np.full(3, 127), np.ones(3), "0..255", "rgb")),
    "factor_alone": (
        [("Mul", ["x", "std"], ["y"])],
        [STD],
        (np.full(3, 127.5), np.full(3, 128), "-127.5..127.5", "rgb"),
    ),
    "trained_on_bgr": (
        [("Sub", ["x", "mean"], ["a"]), ("Div", ["a", "std"], ["y"])],
        [number("mean", IMAGENET[0][::-1].reshape(3, 1, 1)), number("std", 58)],
        (IMAGENET[0][::-1], np.full(3, 58), "0..255", "bgr"),
    ),
    "swapped_by_gather": (
        [
            ("Gather", ["x", "channels"], ["s"], {"axis": 1}),
            ("Sub", ["s", "mean"], ["a"]),
            ("Mul", ["a", "std"], ["y"]),
        ],
        [SWAP, MEAN, STD],
        (*FACES, "0..255", "bgr"),
    ),
    "swapped_by_slice_and_imagenet_bgr": (
        [
            ("Slice", ["x", "from", "to", "axis", "step"], ["s"]),
            ("Sub", ["s", "mean"], ["a"]),
            ("Div", ["a", "std"], ["y"]),
        ],
        [
            *(("from", np.array([-1])), ("to", np.array([-9])), ("axis", np.array([1])), ("step", np.array([-1]))),
            *(number("mean", IMAGENET[0][::-1].reshape(3, 1, 1)), number("std", 58)),
        ],
        (IMAGENET[0][::-1], np.full(3, 58), "0..255", "rgb"),
    ),
    "swapped_by_split_and_concat": (
        [
            ("Split", ["x"], ["r", "g", "b"], {"axis": 1}),
            ("Sub", ["r", "mean"], ["r1"]),
            ("Sub", ["g", "mean"], ["g1"]),
            ("Sub", ["b", "mean"], ["b1"]),
            ("Concat", ["b1", "g1", "r1"], ["c"], {"axis": 1}),
            ("Mul", ["c", "std"], ["y"]),
        ],
        [MEAN, STD],
        (*FACES, "0..255", "bgr"),
    ),
}


def test_its_constants_are_not_trained(tmp_path: Path) -> None:
    """Not even those that the graph computes from others."""
    arrays = [number("mean", [1, 2, 3]), number("std", [4, 5, 6]), ("axes", np.array([1, 2]))]
    nodes = [
        ("Unsqueeze", ["mean", "axes"], ["m"]),
        ("Unsqueeze", ["std", "axes"], ["s"]),
        ("Sub", ["x", "m"], ["a"]),
        ("Div", ["a", "s"], ["y"]),
    ]
    graph = TorchGraph(read_graph(saved(tmp_path, normalising(nodes, arrays))))
    sizes = sorted(tuple(parameter.shape) for parameter in graph.parameters())
    assert sizes == sorted(array.shape for array in weights().values())
    assert sorted(tuple(each.shape) for each in graph.buffers()) == [(3,), (3,)]


@pytest.mark.parametrize("case", CASES)
def test_the_whole_is_what_the_network_was_trained_with(case: str, tmp_path: Path) -> None:
    nodes, arrays, (mean, std, described, channels) = CASES[case]
    teacher = load_teacher(saved(tmp_path, normalising(nodes, arrays)))
    images = pixels()
    swapped = "swap" in case
    order = images[:, ::-1] if (channels == "bgr") != swapped else images
    prepared = (order - mean.reshape(3, 1, 1)) / std.reshape(3, 1, 1)
    wanted = embed_one_by_one(face_network(), prepared.astype(np.float32))
    met = teacher(torch.from_numpy(images / 127.5 - 1)).numpy()
    np.testing.assert_allclose(met, wanted, rtol=1e-3, atol=1e-3 * np.abs(wanted).max())
    assert f"of {described}" in teacher.description
    assert teacher.preprocessing.channels == channels
    assert ("channels swapped" in teacher.description) is swapped


def test_channels_last(tmp_path: Path) -> None:
    nodes = [
        ("Cast", ["x"], ["f"], {"to": TensorProto.FLOAT}),
        ("Sub", ["f", "mean"], ["a"]),
        ("Mul", ["a", "std"], ["b"]),
        ("Transpose", ["b"], ["y"], {"perm": [0, 3, 1, 2]}),
    ]
    arrays = [number("mean", IMAGENET[0]), number("std", 1 / IMAGENET[1])]
    for element in (TensorProto.FLOAT, TensorProto.UINT8):
        teacher = load_teacher(saved(tmp_path, normalising(nodes, arrays, channels_last=True, element=element)))
        images = pixels()
        wanted = embed_one_by_one(
            face_network(), (images - IMAGENET[0].reshape(3, 1, 1)) / IMAGENET[1].reshape(3, 1, 1)
        )
        np.testing.assert_allclose(teacher(torch.from_numpy(images / 127.5 - 1)), wanted, rtol=1e-3, atol=1e-3)
        assert "(123.67, 116.28, 103.53)) / (58.395, 57.12, 57.375) of 0..255" in teacher.description


def test_a_graph_of_whole_numbers_takes_pixel_values(tmp_path: Path) -> None:
    nodes = [("Cast", ["x"], ["y"], {"to": TensorProto.FLOAT})]
    teacher = load_teacher(saved(tmp_path, normalising(nodes, element=TensorProto.UINT8)))
    assert "takes whole numbers 0..255" in teacher.description
    assert str(teacher.preprocessing) == "rgb, (x - 0) / 1, 112x112"


def test_a_quantised_normalisation(tmp_path: Path) -> None:
    """Every step rounds to 8 bits, and the constants are 8-bit numbers too."""
    nodes = [
        ("QuantizeLinear", ["x", "one", "zero"], ["q"]),
        ("DequantizeLinear", ["q", "one", "zero"], ["d"]),
        ("DequantizeLinear", ["mean8", "one", "zero"], ["mean"]),
        ("Sub", ["d", "mean"], ["a"]),
        ("QuantizeLinear", ["a", "one", "middle"], ["qa"]),
        ("DequantizeLinear", ["qa", "one", "middle"], ["da"]),
        ("Mul", ["da", "std"], ["y"]),
    ]
    eight = {"zero": np.uint8(0), "middle": np.uint8(127), "mean8": np.uint8(127)}
    arrays = [STD, number("one", 1), *((name, np.array(value)) for name, value in eight.items())]
    found = find_normalisation(read_graph(saved(tmp_path, normalising(nodes, arrays))), 112)
    assert found is not None
    assert (str(found), found.input_range) == ("normalises inside: (x - 127) / 128 of 0..255", "0..255")


@pytest.mark.parametrize("kind", ["QDQ", "QOperator"])
def test_a_network_that_onnxruntime_has_quantised(kind: str, tmp_path: Path) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    class Faces(CalibrationDataReader):
        given = 0

        def get_next(self) -> dict[str, np.ndarray] | None:
            self.given += 1
            return {"x": pixels()} if self.given == 1 else None

    nodes, arrays, _ = CASES["factor_first"]
    source = saved(tmp_path, normalising(nodes, arrays))
    quantize_static(source, tmp_path / "int8.onnx", Faces(), quant_format=QuantFormat[kind])
    teacher = load_teacher(tmp_path / "int8.onnx")
    assert "of 0..255" in teacher.description
    assert teacher.preprocessing == load_teacher(source).preprocessing


def test_an_image_that_the_graph_scales(tmp_path: Path) -> None:
    """To the size of its layers, before it is normalised."""
    nodes = [
        ("Resize", ["x", "", "scales"], ["r"], {"mode": "linear"}),
        ("Sub", ["r", "mean"], ["a"]),
        ("Mul", ["a", "std"], ["y"]),
    ]
    model = normalising(nodes, [MEAN, STD, number("scales", [1, 1, 0.5, 0.5])])
    for axis in (2, 3):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_value = 224
    teacher = load_teacher(saved(tmp_path, model))
    assert "(x - 127) / 128 of 0..255" in teacher.description
    assert str(teacher.preprocessing) == "rgb, (x - 0) / 1, 224x224"


@pytest.mark.parametrize(
    "nodes",
    [
        [],
        [("Identity", ["x"], ["y"])],
        [("Mul", ["x", "one"], ["a"]), ("Sub", ["a", "zero"], ["y"])],
        # Neither is one number for all pixels of a channel.
        [("Sub", ["x", "plane"], ["y"])],
        [("Relu", ["x"], ["y"])],
        # A way around the subtraction.
        [("Sub", ["x", "mean"], ["a"]), ("GlobalAveragePool", ["x"], ["p"]), ("Add", ["a", "p"], ["y"])],
    ],
)
def test_what_is_no_normalisation_is_left_alone(nodes: list[Any], tmp_path: Path) -> None:
    plane = np.arange(112, dtype=np.float32).repeat(112).reshape(112, 112)
    arrays = [number("one", 1), number("zero", 0), number("plane", plane), MEAN]
    model = normalising(nodes or [("Identity", ["x"], ["y"])], arrays)
    assert find_normalisation(read_graph(saved(tmp_path, model)), 112) is None
    teacher = load_teacher(tmp_path / "model.onnx")
    assert str(teacher.preprocessing) == "rgb, (x - 127.5) / 127.5, 112x112"


def test_numbers_that_tell_no_range_are_said_to(tmp_path: Path) -> None:
    nodes = [("Mul", ["x", "factor"], ["y"])]
    teacher = load_teacher(saved(tmp_path, normalising(nodes, [number("factor", -3)])))
    assert "of a range that its numbers do not tell" in teacher.description
    assert teacher.preprocessing.mean == (127.5,) * 3


def test_what_the_user_says_of_the_input_holds(tmp_path: Path) -> None:
    nodes, arrays, _ = CASES["sub_mul"]
    teacher = load_teacher(saved(tmp_path, normalising(nodes, arrays)), {"mean": 1, "std": 2, "channels": "bgr"})
    assert str(teacher.preprocessing) == "bgr, (x - 1) / 2, 112x112"


@pytest.mark.real
@pytest.mark.slow
def test_a_real_teacher_that_normalises_itself(real_data: Path, some_pairs: VerificationSet, tmp_path: Path) -> None:
    nodes, arrays, _ = CASES["computed_constants"]
    base = onnx.load(str(real_data / "teachers" / "mobilefacenet_512.onnx"))
    nodes = [
        (operator, taken[:1], given, {"axes": [1, 2]}) if operator == "Unsqueeze" else (operator, taken, given, *more)
        for operator, taken, given, *more in nodes
    ]
    path = saved(tmp_path, normalising(nodes, arrays, base=base))
    result = evaluate(load_teacher(path, {"channels": "bgr"}), some_pairs, flip=False)
    assert result.accuracy >= 0.98
