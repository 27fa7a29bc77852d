"""Each operator against onnxruntime, in the uses that exporters make of it, and what is refused."""

from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from arcface_kd.errors import TeacherError
from arcface_kd.teachers.onnx.graph import OnnxGraph
from arcface_kd.teachers.onnx.torch_module import TorchGraph
from arcface_kd.teachers.onnx.torch_operators import OPERATORS
from tests.teachers.onnx_models import model_of


class Case(NamedTuple):
    """One node on one image-like input; further inputs are arrays, or "" for one that is left out."""

    operator: str
    shape: tuple[int, ...] = (2, 3, 5, 6)
    others: tuple[Any, ...] = ()
    attributes: dict[str, Any] = {}  # noqa: RUF012
    opset: int = 13
    outputs: int = 1
    positive: bool = False


def real(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def whole(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def scalar(value: float) -> np.ndarray:
    return np.array(value, np.float32)


def graph_from(model: Any) -> OnnxGraph:
    return OnnxGraph(model.SerializeToString(), "image", "end", None, None, 0, "")


def graph_of(case: Case) -> OnnxGraph:
    """The last of several outputs is looked at; whatever type it has becomes float."""
    names = ["" if isinstance(other, str) else f"other{number}" for number, other in enumerate(case.others)]
    outputs = [f"out{number}" for number in range(case.outputs)]
    arrays = {name: other for name, other in zip(names, case.others, strict=True) if name}
    model = model_of(
        f"end = Cast <to = 1> ({outputs[-1]})", f"float{list(case.shape)} image", "float end", arrays, case.opset
    )
    node = helper.make_node(case.operator, ["image", *names], outputs, **case.attributes)
    model.graph.node.insert(0, node)
    return graph_from(model)


def answers(graph: OnnxGraph, images: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Torch's and onnxruntime's."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(graph.model, options, providers=["CPUExecutionProvider"])
    (wanted,) = session.run(None, {"image": images})
    return TorchGraph(graph).eval()(torch.from_numpy(images)), torch.from_numpy(wanted)


PLAIN = ("Relu", "Sigmoid", "Tanh", "Erf", "Exp", "Abs", "Neg", "Floor", "Ceil", "Softplus", "Identity", "Dropout")
CASES = {
    **{name.lower(): Case(name) for name in PLAIN},
    **{name.lower(): Case(name, positive=True) for name in ("Log", "Sqrt", "Reciprocal")},
    **{name.lower(): Case(name, others=(real(3, 1, 6),)) for name in ("Add", "Sub", "Mul", "Div", "Max", "Min")},
    "pow": Case("Pow", others=(scalar(2.5),), positive=True),
    "equal": Case("Equal", others=(scalar(0.0),)),
    "less": Case("Less", others=(scalar(0.0),)),
    "greater": Case("Greater", others=(scalar(0.0),)),
    "leaky": Case("LeakyRelu", attributes={"alpha": 0.3}),
    "leaky_default": Case("LeakyRelu"),
    "elu": Case("Elu", attributes={"alpha": 0.7}),
    "prelu": Case("PRelu", others=(real(3, 1, 1),)),
    "prelu_one": Case("PRelu", others=(real(1),)),
    "prelu_last_axis": Case("PRelu", others=(real(6),)),
    "prelu_square": Case("PRelu", shape=(2, 4, 4, 4), others=(real(4),)),
    "prelu_rows": Case("PRelu", shape=(2, 7), others=(real(7),)),
    "prelu_each": Case("PRelu", others=(real(3, 5, 6),)),
    "clip": Case("Clip", others=(scalar(-0.5), scalar(0.5))),
    "clip_one_side": Case("Clip", others=("", scalar(0.5))),
    "clip_old": Case("Clip", attributes={"min": 0.0, "max": 6.0}, opset=10),
    "hard_sigmoid": Case("HardSigmoid", attributes={"alpha": 1 / 6, "beta": 0.5}),
    "hard_sigmoid_default": Case("HardSigmoid"),
    "hard_swish": Case("HardSwish", opset=14),
    "cast": Case("Cast", attributes={"to": TensorProto.INT32}),
    "cast_bool": Case("Cast", attributes={"to": TensorProto.BOOL}),
    "conv": Case("Conv", others=(real(4, 3, 3, 3), real(4)), attributes={"pads": [1, 1, 1, 1], "strides": [2, 2]}),
    "conv_uneven": Case("Conv", others=(real(4, 3, 2, 3),), attributes={"pads": [0, 1, 1, 2]}),
    "conv_groups": Case("Conv", others=(real(6, 1, 3, 3), real(6)), attributes={"group": 3, "dilations": [2, 2]}),
    "conv_same_upper": Case(
        "Conv", others=(real(4, 3, 2, 4),), attributes={"auto_pad": "SAME_UPPER", "strides": [2, 2]}
    ),
    "conv_same_lower": Case("Conv", others=(real(4, 3, 2, 2),), attributes={"auto_pad": "SAME_LOWER"}),
    "conv_valid": Case("Conv", others=(real(4, 3, 2, 2),), attributes={"auto_pad": "VALID"}),
    "conv_rows": Case("Conv", shape=(2, 3, 9), others=(real(4, 3, 3),), attributes={"pads": [1, 1]}),
    "gemm": Case("Gemm", shape=(3, 7), others=(real(5, 7), real(5)), attributes={"transB": 1}),
    "gemm_all": Case(
        "Gemm",
        shape=(7, 3),
        others=(real(7, 5), real(3, 5)),
        attributes={"transA": 1, "alpha": 0.5, "beta": 2.0},
    ),
    "gemm_without_bias": Case("Gemm", shape=(3, 7), others=(real(7, 5),)),
    "matmul": Case("MatMul", others=(real(6, 4),)),
    "einsum": Case("Einsum", others=(real(6, 4),), attributes={"equation": "nchw,wk->nckh"}),
    "max_pool": Case("MaxPool", attributes={"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
    "max_pool_uneven": Case("MaxPool", attributes={"kernel_shape": [3, 3], "strides": [2, 2], "pads": [0, 0, 1, 1]}),
    "max_pool_ceil": Case("MaxPool", attributes={"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}),
    "average_pool": Case("AveragePool", attributes={"kernel_shape": [2, 3], "strides": [2, 1], "pads": [1, 1, 1, 1]}),
    "average_pool_counted": Case(
        "AveragePool", attributes={"kernel_shape": [3, 3], "pads": [0, 1, 1, 2], "count_include_pad": 1}
    ),
    "global_average": Case("GlobalAveragePool"),
    "global_max": Case("GlobalMaxPool"),
    "batch_norm": Case(
        "BatchNormalization",
        others=(real(3), real(3, seed=2), real(3, seed=3), np.abs(real(3, seed=4)) + 0.1),
        attributes={"epsilon": 1e-3},
    ),
    "instance_norm": Case("InstanceNormalization", others=(real(3), real(3, seed=2)), attributes={"epsilon": 1e-3}),
    "layer_norm": Case("LayerNormalization", others=(real(6), real(6, seed=2)), attributes={"epsilon": 1e-3}, opset=17),
    "layer_norm_axes": Case("LayerNormalization", others=(real(5, 6),), attributes={"axis": -2}, opset=17),
    "lp_normalization": Case("LpNormalization", shape=(3, 7), attributes={"axis": 1, "p": 2}),
    "softmax": Case("Softmax", attributes={"axis": 1}),
    "softmax_default": Case("Softmax"),
    "softmax_old": Case("Softmax", attributes={"axis": 2}, opset=11),
    "softmax_old_default": Case("Softmax", opset=11),
    "log_softmax": Case("LogSoftmax", attributes={"axis": 1}),
    **{
        f"{name.lower()}_{keep}": Case(name, attributes={"axes": [2, -1], "keepdims": keep})
        for name in ("ReduceMean", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceProd")
        for keep in (0, 1)
    },
    "reduce_mean_all": Case("ReduceMean", attributes={"keepdims": 0}),
    "reduce_sum": Case("ReduceSum", others=(whole(1),), attributes={"keepdims": 0}),
    "reduce_sum_nothing": Case("ReduceSum", others=(whole(),), attributes={"noop_with_empty_axes": 1}),
    "reduce_mean_input": Case("ReduceMean", others=(whole(0, 2),), opset=18),
    "shape": Case("Shape"),
    "shape_part": Case("Shape", attributes={"start": 1, "end": -1}, opset=15),
    "flatten": Case("Flatten"),
    "flatten_axis": Case("Flatten", attributes={"axis": -1}),
    "reshape": Case("Reshape", others=(whole(0, -1, 2),)),
    "transpose": Case("Transpose", attributes={"perm": [0, 2, 3, 1]}),
    "transpose_default": Case("Transpose"),
    "squeeze": Case("Squeeze", shape=(2, 1, 5, 1), others=(whole(1),)),
    "squeeze_all": Case("Squeeze", shape=(2, 1, 5, 1)),
    "squeeze_old": Case("Squeeze", shape=(2, 1, 5, 1), attributes={"axes": [1, 3]}, opset=11),
    "unsqueeze": Case("Unsqueeze", others=(whole(0, -1),)),
    "unsqueeze_old": Case("Unsqueeze", attributes={"axes": [1, 3]}, opset=11),
    "concat": Case("Concat", others=(real(2, 1, 5, 6), real(2, 2, 5, 6)), attributes={"axis": 1}),
    "split": Case("Split", others=(whole(2, 4),), attributes={"axis": -1}, outputs=2),
    "split_evenly": Case("Split", attributes={"axis": 3}, outputs=3),
    "split_old": Case("Split", attributes={"axis": 1, "split": [1, 2]}, outputs=2, opset=11),
    "slice": Case("Slice", others=(whole(1, -3), whole(2**31, -1), whole(1, 3))),
    "slice_steps": Case("Slice", others=(whole(-1, 0), whole(-(2**62), 99), whole(2, 3), whole(-2, 2))),
    "slice_without_axes": Case("Slice", others=(whole(0, 1), whole(1, 3))),
    "slice_old": Case("Slice", attributes={"starts": [1], "ends": [3], "axes": [2]}, opset=9),
    "gather": Case("Gather", others=(np.array([[2, 0], [1, -1]], np.int64),), attributes={"axis": 1}),
    "gather_one": Case("Gather", others=(np.array(-1, np.int64),), attributes={"axis": -1}),
    "expand": Case("Expand", shape=(3, 1, 6), others=(whole(2, 1, 4, 1),)),
    "tile": Case("Tile", others=(whole(1, 2, 1, 3),)),
    "pad": Case("Pad", others=(whole(0, 1, 0, 2, 0, 0, 1, 0), scalar(0.5))),
    "pad_cut": Case("Pad", others=(whole(0, 0, -1, 1, 0, 0, 1, -2),)),
    "pad_axes": Case("Pad", others=(whole(1, 2), "", whole(-1)), opset=18),
    "pad_reflect": Case("Pad", others=(whole(0, 0, 1, 2, 0, 0, 3, 1),), attributes={"mode": "reflect"}),
    "pad_edge": Case("Pad", others=(whole(0, 0, 1, 2, 0, 0, 3, 1),), attributes={"mode": "edge"}),
    "pad_old": Case("Pad", attributes={"pads": [0, 0, 1, 1, 0, 0, 1, 1], "value": 2.0}, opset=10),
    "gelu": Case("Gelu", opset=20),
    "gelu_tanh": Case("Gelu", attributes={"approximate": "tanh"}, opset=20),
}


@pytest.mark.parametrize("name", CASES)
def test_an_operator_computes_what_onnxruntime_does(name: str) -> None:
    case = CASES[name]
    images = real(*case.shape, seed=7) * 2
    met, wanted = answers(graph_of(case), np.abs(images) + 0.1 if case.positive else images)
    assert met.shape == wanted.shape
    torch.testing.assert_close(met, wanted, rtol=1e-5, atol=1e-5)


def test_every_operator_has_a_case_or_is_part_of_a_graph_below() -> None:
    covered = {case.operator for case in CASES.values()}
    assert set(OPERATORS) - covered == {"Where", "And", "Or", "Not", "ConstantOfShape", "Range"}


def test_shapes_made_of_whole_numbers() -> None:
    """What exporters write for x.view(len(x), -1) + positions, truth values included."""
    nodes = """
        shape = Shape (image)
        batch = Gather (shape, zero)
        flat_shape = Concat <axis = 0> (batch, minus)
        flat = Reshape (image, flat_shape)
        flat_size = Shape (flat)
        width = Slice (flat_size, one_vector, two_vector)
        width_scalar = Squeeze (width)
        places = Range (start, width_scalar, one)
        squares = Mul (places, places)
        sevenths = Div (squares, seven)
        real_sevenths = Cast <to = 1> (sevenths)
        above = Greater (flat, real_sevenths)
        below = Less (flat, real_sevenths)
        either = Or (above, below)
        neither = Not (either)
        chosen = And (above, either)
        kept = Or (chosen, neither)
        fill = ConstantOfShape <value = float[1] {3}> (flat_size)
        end = Where (kept, flat, fill)
    """
    numbers = {"zero": [0], "minus": [-1], "one": 1, "start": 0, "one_vector": [1], "two_vector": [2], "seven": 7}
    arrays = {name: np.array(value, np.int64) for name, value in numbers.items()}
    graph = graph_from(model_of(nodes, "float[N, 3, 2, 2] image", "float end", arrays))
    met, wanted = answers(graph, real(4, 3, 2, 2) * 5)
    assert 0 < (wanted == 3).float().mean() < 1
    torch.testing.assert_close(met, wanted)


@pytest.mark.parametrize(
    ("case", "said"),
    [
        (Case("Hardmax"), "operator Hardmax of node 'Hardmax_0' cannot be"),
        (Case("MaxPool", attributes={"kernel_shape": [2, 2]}, outputs=2), "MaxPool .* with the places of the maxima"),
        (Case("AveragePool", attributes={"kernel_shape": [2, 2], "pads": [0, 0, 1, 1]}), "AveragePool .* uneven pads"),
        (Case("MaxPool", shape=(2, 3, 5), attributes={"kernel_shape": [2]}), "a pool over 1 spatial dimensions"),
        (Case("Pad", others=(whole(0, 1, 0, 0, 0, 0, 0, 0),), attributes={"mode": "edge"}), "mode 'edge' for 4 dim"),
        (Case("Pad", others=(whole(*[0] * 8),), attributes={"mode": "wrap"}, opset=19), "mode 'wrap'"),
        (Case("MatMul", others=(real(5, 4),)), r"MatMul of node 'MatMul_0' cannot be run on \(2, 3, 5, 6\), "),
        (Case("Concat", others=(real(2, 1, 5, 6),)), "Concat of node 'Concat_0' cannot be run on"),
    ],
    ids=lambda value: value.operator if isinstance(value, Case) else None,
)
def test_what_is_not_known_is_refused_by_operator_and_node(case: Case, said: str) -> None:
    with pytest.raises(TeacherError, match=said) as error:
        TorchGraph(graph_of(case)).eval()(torch.from_numpy(real(*case.shape)))
    assert "\n" not in str(error.value)


def test_an_operator_of_another_domain_is_not_taken_for_one_of_its_name() -> None:
    graph = graph_of(Case("Relu"))
    model = onnx.load_model_from_string(graph.model)
    model.graph.node[0].domain = "com.microsoft"
    with pytest.raises(TeacherError, match=r"operator com\.microsoft\.Relu of node"):
        TorchGraph(OnnxGraph(**{**vars(graph), "model": model.SerializeToString()}))
