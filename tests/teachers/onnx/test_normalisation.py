"""Normalisation inside a graph: found whatever its nodes are called, and fed the input that its constants are for."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnxruntime.quantization import QuantFormat, quantize_static

from arcface_kd.data.formats.verification_bin import VerificationSet
from arcface_kd.evaluation.verification import evaluate
from arcface_kd.teachers import load_teacher
from arcface_kd.teachers.onnx.graph import read_graph
from arcface_kd.teachers.onnx.normalisation import find_normalisation
from arcface_kd.teachers.onnx.torch_module import TorchGraph
from tests.teachers.onnx.test_form import CalibrationFaces
from tests.teachers.onnx_models import embed_one_by_one, face_network, pixels, saved, student_view, weights

Arrays = dict[str, Any]
IMAGENET = np.array([123.675, 116.28, 103.53], np.float32), np.array([58.395, 57.12, 57.375], np.float32)


def normalising(nodes: str, arrays: Arrays | None = None, **keywords: Any) -> Any:
    """A network behind nodes that lead from "image" to "prepared"; whole numbers stay whole, others are float32."""
    more = {
        name: np.asarray(each, None if np.asarray(each).dtype.kind in "iu" else np.float32)
        for name, each in (arrays or {}).items()
    }
    return face_network(batch=None, tail="flatten", before=nodes, more=more, **keywords)


def planes(values: Any) -> np.ndarray:
    return np.asarray(values, np.float32).reshape(3, 1, 1)


FACES = (np.full(3, 127.0), np.full(3, 128.0))
FACE_CONSTANTS: Arrays = {"mean": 127.0, "std": 1 / 128}
UNITS: Arrays = {"mean": planes(IMAGENET[0] / 255), "std": planes(IMAGENET[1] / 255)}
BACKWARDS: Arrays = {"mean": planes(IMAGENET[0][::-1]), "std": 58.0}
# Nodes, constants, and what comes of it: mean and std in pixel values, the range and the channels of the input.
CASES: dict[str, tuple[str, Arrays, tuple[np.ndarray, np.ndarray, str, str]]] = {
    "sub_mul": ("a = Sub (image, mean) prepared = Mul (a, std)", FACE_CONSTANTS, (*FACES, "0..255", "rgb")),
    "factor_first": (
        "a = Mul (std, image) prepared = Add (a, mean)",
        {"mean": -127 / 128, "std": 1 / 128},
        (*FACES, "0..255", "rgb"),
    ),
    "computed_constants": (
        "m0 = Constant <value = float[3] {127, 127, 127}> () m1 = Unsqueeze (m0, axes) s1 = Reciprocal (std) "
        "x1 = Identity (image) a = Sub (x1, m1) prepared = Div (a, s1)",
        {"axes": [1, 2], "std": 1 / 128},
        (*FACES, "0..255", "rgb"),
    ),
    "batch_norm": (
        "prepared = BatchNormalization <epsilon = 0.0> (image, one, zero, mean, variance)",
        {"one": np.ones(3), "zero": np.zeros(3), "mean": IMAGENET[0], "variance": IMAGENET[1] ** 2},
        (*IMAGENET, "0..255", "rgb"),
    ),
    "depthwise_convolution": (
        "prepared = Conv <group = 3> (image, weight, bias)",
        {"weight": (1 / IMAGENET[1]).reshape(3, 1, 1, 1), "bias": -IMAGENET[0] / IMAGENET[1]},
        (*IMAGENET, "0..255", "rgb"),
    ),
    "zero_to_one": (
        "a = Sub (image, half) prepared = Div (a, half)",
        {"half": 0.5},
        (np.full(3, 127.5), np.full(3, 127.5), "0..1", "rgb"),
    ),
    "zero_to_one_imagenet": (
        "a = Sub (image, mean) prepared = Div (a, std)",
        UNITS,
        (*IMAGENET, "0..1", "rgb"),
    ),
    "zero_to_one_clipped": (
        "c = Clip (image, none, all) a = Sub (c, mean) prepared = Div (a, std)",
        {**UNITS, "none": 0.0, "all": 1.0},
        (*IMAGENET, "0..1", "rgb"),
    ),
    "minus_one_to_one": (
        "a = Add (image, one) b = Mul (a, half) c = Sub (b, mean) prepared = Div (c, std)",
        {**UNITS, "one": 1.0, "half": 0.5},
        (*IMAGENET, "-1..1", "rgb"),
    ),
    "a_255th": ("prepared = Mul (image, std)", {"std": 1 / 255}, (np.zeros(3), np.full(3, 255), "0..255", "rgb")),
    "half_alone": (
        "prepared = Sub (image, mean)",
        {"mean": 0.5},
        (np.full(3, 127.5), np.full(3, 255), "0..1", "rgb"),
    ),
    "bounds": (
        "a = Max (image, none) b = Min (a, all) c = Sub (b, mean) prepared = Mul (c, std)",
        {**FACE_CONSTANTS, "none": 0.0, "all": 255.0},
        (*FACES, "0..255", "rgb"),
    ),
    "mean_alone": ("prepared = Sub (image, mean)", {"mean": 127.0}, (np.full(3, 127), np.ones(3), "0..255", "rgb")),
    "factor_alone": (
        "prepared = Mul (image, std)",
        {"std": 1 / 128},
        (np.full(3, 127.5), np.full(3, 128), "-127.5..127.5", "rgb"),
    ),
    "trained_on_bgr": (
        "a = Sub (image, mean) prepared = Div (a, std)",
        BACKWARDS,
        (IMAGENET[0][::-1], np.full(3, 58), "0..255", "bgr"),
    ),
    "swapped_by_gather": (
        "s = Gather <axis = 1> (image, channels) a = Sub (s, mean) prepared = Mul (a, std)",
        {**FACE_CONSTANTS, "channels": [2, 1, 0]},
        (*FACES, "0..255", "bgr"),
    ),
    "swapped_by_slice_and_imagenet_bgr": (
        "s = Slice (image, minus, end, axis, minus) a = Sub (s, mean) prepared = Div (a, std)",
        {**BACKWARDS, "minus": [-1], "end": [-9], "axis": [1]},
        (IMAGENET[0][::-1], np.full(3, 58), "0..255", "rgb"),
    ),
    "swapped_by_split_and_concat": (
        "r, g, b = Split <axis = 1> (image) r1 = Sub (r, mean) g1 = Sub (g, mean) b1 = Sub (b, mean) "
        "c = Concat <axis = 1> (b1, g1, r1) prepared = Mul (c, std)",
        FACE_CONSTANTS,
        (*FACES, "0..255", "bgr"),
    ),
}


def test_its_constants_are_not_trained(tmp_path: Path) -> None:
    """Not even those that the graph computes from others."""
    nodes = "m = Unsqueeze (mean, axes) s = Unsqueeze (std, axes) a = Sub (image, m) prepared = Div (a, s)"
    arrays = {"mean": [1.0, 2.0, 3.0], "std": [4.0, 5.0, 6.0], "axes": [1, 2]}
    graph = TorchGraph(read_graph(saved(tmp_path, normalising(nodes, arrays))))
    sizes = sorted(tuple(parameter.shape) for parameter in graph.parameters())
    assert sizes == sorted(array.shape for array in weights().values())
    assert sorted(tuple(each.shape) for each in graph.buffers()) == [(3,), (3,)]


@pytest.mark.parametrize("case", CASES)
def test_the_whole_is_what_the_network_was_trained_with(case: str, tmp_path: Path) -> None:
    nodes, arrays, (mean, std, described, channels) = CASES[case]
    teacher = load_teacher(saved(tmp_path, normalising(nodes, arrays)))
    images = pixels(3)
    swapped = "swap" in case
    order = images[:, ::-1] if (channels == "bgr") != swapped else images
    wanted = embed_one_by_one(face_network(), ((order - planes(mean)) / planes(std)).astype(np.float32))
    met = teacher(student_view(images)).numpy()
    np.testing.assert_allclose(met, wanted, rtol=1e-3, atol=1e-3 * np.abs(wanted).max())
    assert f"of {described}" in teacher.description
    assert teacher.preprocessing.channels == channels
    assert ("channels swapped" in teacher.description) is swapped


@pytest.mark.parametrize("kind", ["float", "uint8"])
def test_channels_last(kind: str, tmp_path: Path) -> None:
    nodes = (
        "f = Cast <to = 1> (image) a = Sub (f, mean) b = Mul (a, std) prepared = Transpose <perm = [0, 3, 1, 2]> (b)"
    )
    arrays = {"mean": IMAGENET[0], "std": 1 / IMAGENET[1]}
    teacher = load_teacher(saved(tmp_path, normalising(nodes, arrays, inputs=f"{kind}[N, 112, 112, 3] image")))
    images = pixels(3)
    wanted = embed_one_by_one(face_network(), (images - planes(IMAGENET[0])) / planes(IMAGENET[1]))
    np.testing.assert_allclose(teacher(student_view(images)), wanted, rtol=1e-3, atol=1e-3)
    assert "(123.67, 116.28, 103.53)) / (58.395, 57.12, 57.375) of 0..255" in teacher.description


def test_a_graph_of_whole_numbers_takes_pixel_values(tmp_path: Path) -> None:
    teacher = load_teacher(saved(tmp_path, normalising("prepared = Cast <to = 1> (image)", kind="uint8")))
    assert "takes whole numbers 0..255" in teacher.description
    assert str(teacher.preprocessing) == "rgb, (x - 0) / 1, 112x112"


def test_a_quantised_normalisation(tmp_path: Path) -> None:
    """Every step rounds to 8 bits, and the constants are 8-bit numbers too."""
    nodes = """
        q = QuantizeLinear (image, one, zero) d = DequantizeLinear (q, one, zero)
        mean = DequantizeLinear (mean8, one, zero) a = Sub (d, mean)
        qa = QuantizeLinear (a, one, mean8) da = DequantizeLinear (qa, one, mean8) prepared = Mul (da, std)
    """
    arrays = {"zero": np.uint8(0), "mean8": np.uint8(127), "std": 1 / 128, "one": 1.0}
    found = find_normalisation(read_graph(saved(tmp_path, normalising(nodes, arrays))), 112)
    assert found is not None
    assert (str(found), found.input_range) == ("normalises inside: (x - 127) / 128 of 0..255", "0..255")


@pytest.mark.parametrize("kind", ["QDQ", "QOperator"])
def test_a_network_that_onnxruntime_has_quantised(kind: str, tmp_path: Path) -> None:
    source = saved(tmp_path, normalising(*CASES["factor_first"][:2]))
    faces = CalibrationFaces("image", pixels(3).astype(np.float32))
    quantize_static(source, tmp_path / "int8.onnx", faces, quant_format=QuantFormat[kind])
    teacher = load_teacher(tmp_path / "int8.onnx")
    assert "of 0..255" in teacher.description
    assert teacher.preprocessing == load_teacher(source).preprocessing


def test_an_image_that_the_graph_scales(tmp_path: Path) -> None:
    """To the size of its layers, before it is normalised."""
    nodes = 'r = Resize <mode = "linear"> (image, , scales) a = Sub (r, mean) prepared = Mul (a, std)'
    model = normalising(nodes, {**FACE_CONSTANTS, "scales": [1.0, 1.0, 0.5, 0.5]}, size=224)
    teacher = load_teacher(saved(tmp_path, model))
    assert "(x - 127) / 128 of 0..255" in teacher.description
    assert str(teacher.preprocessing) == "rgb, (x - 0) / 1, 224x224"


@pytest.mark.parametrize(
    "nodes",
    [
        "",
        "prepared = Identity (image)",
        "a = Mul (image, one) prepared = Sub (a, zero)",
        # Neither is one number for all pixels of a channel.
        "prepared = Sub (image, plane)",
        "prepared = Relu (image)",
        # A way around the subtraction.
        "a = Sub (image, mean) p = GlobalAveragePool (image) prepared = Add (a, p)",
    ],
)
def test_what_is_no_normalisation_is_left_alone(nodes: str, tmp_path: Path) -> None:
    plane = np.arange(112, dtype=np.float32).repeat(112).reshape(112, 112)
    model = normalising(nodes, {"one": 1.0, "zero": 0.0, "plane": plane, "mean": 127.0})
    teacher = load_teacher(saved(tmp_path, model))
    assert "normalises inside" not in teacher.description
    assert str(teacher.preprocessing) == "rgb, (x - 127.5) / 127.5, 112x112"


def test_numbers_that_tell_no_range_are_said_to(tmp_path: Path) -> None:
    teacher = load_teacher(saved(tmp_path, normalising("prepared = Mul (image, factor)", {"factor": -3.0})))
    assert "of a range that its numbers do not tell" in teacher.description
    assert teacher.preprocessing.mean == (127.5,) * 3


def test_what_the_user_says_of_the_input_holds(tmp_path: Path) -> None:
    path = saved(tmp_path, normalising(*CASES["sub_mul"][:2]))
    teacher = load_teacher(path, {"mean": 1, "std": 2, "channels": "bgr"})
    assert str(teacher.preprocessing) == "bgr, (x - 1) / 2, 112x112"


@pytest.mark.real
@pytest.mark.slow
def test_a_real_teacher_that_normalises_itself(real_data: Path, some_pairs: VerificationSet, tmp_path: Path) -> None:
    model = onnx.load(str(real_data / "teachers" / "mobilefacenet_512.onnx"))
    (image,) = (value.name for value in model.graph.input)
    for node in model.graph.node:
        node.input[:] = ["prepared" if name == image else name for name in node.input]
    nodes = f"lifted = Sub ({image}, normal_mean) prepared = Mul (lifted, normal_std)"
    for node in reversed(onnx.parser.parse_graph(f"g () => () {{ {nodes} }}").node):
        model.graph.node.insert(0, node)
    for name, value in (("normal_mean", 127), ("normal_std", 1 / 128)):
        model.graph.initializer.append(numpy_helper.from_array(np.array(value, np.float32), name))
    teacher = load_teacher(saved(tmp_path, model), {"channels": "bgr"})
    assert "(x - 127) / 128 of 0..255" in teacher.description
    assert evaluate(teacher, some_pairs, flip=False).accuracy >= 0.98
