import copy
import json
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from arcface_kd.errors import TeacherError
from arcface_kd.teachers.mxnet.symbol import SymbolGraph
from tests.mxnet_oracle import silently
from tests.teachers.mxnet_files import face_arrays, face_nodes, symbol

Nodes = list[tuple[str, str, dict[str, object], list[str]]]


def graph_of(folder: Path, content: object, arrays: dict[str, np.ndarray] | None = None) -> SymbolGraph:
    path = folder / "model-symbol.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return SymbolGraph(path, face_arrays() if arrays is None else arrays)


@silently
def oracle(
    mxnet: ModuleType, content: object, arrays: dict[str, np.ndarray], data: np.ndarray, output: str
) -> np.ndarray:
    """What mxnet itself computes."""
    symbols = mxnet.sym.load_json(json.dumps(content)).get_internals()[output]
    given = {name.partition(":")[2]: mxnet.nd.array(array) for name, array in arrays.items()}
    arguments = {name: given[name] for name in symbols.list_arguments() if name != "data"}
    states = {name: given[name] for name in symbols.list_auxiliary_states()}
    executor = symbols.bind(
        mxnet.cpu(), {**arguments, "data": mxnet.nd.array(data)}, aux_states=states, grad_req="null"
    )
    (answer,) = executor.forward(is_train=False)
    return np.asarray(answer.asnumpy())


def data(*shape: int) -> np.ndarray:
    return (np.random.default_rng(5).standard_normal(shape) * 2).astype(np.float32)


def naive_face(pixels: np.ndarray, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """`face_nodes` up to fc1, written down once more in torch."""
    weights = {name.partition(":")[2]: torch.from_numpy(array) for name, array in arrays.items()}
    relu0 = (torch.from_numpy(pixels) - 127.5) * 0.0078125
    relu0 = nn.functional.conv2d(relu0, weights["conv0_weight"], stride=4, padding=1)
    column = [weights[f"bn0_{name}"].view(1, -1, 1, 1) for name in ("mean", "var", "gamma", "beta")]
    relu0 = (relu0 - column[0]) / (column[1] + 2e-5).sqrt() * column[2] + column[3]
    relu0 = torch.where(relu0 > 0, relu0, relu0 * weights["relu0_gamma"].view(1, -1, 1, 1))
    added = relu0 + nn.functional.conv2d(relu0, weights["conv1_weight"], padding=1, groups=8)
    rows = added.reshape(len(added), 8, 4, 7, 4, 7).mean((3, 5)).reshape(len(added), -1)
    rows = rows @ weights["pre_fc1_weight"].T + weights["pre_fc1_bias"]
    # fc1 has its gamma fixed to 1, whatever the file holds.
    return ((rows - weights["fc1_mean"]) / (weights["fc1_var"] + 2e-5).sqrt() + weights["fc1_beta"]).numpy()


def test_a_face_network_up_to_fc1_equals_its_naive_twin(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, 112, 112)).astype(np.float32)
    network = graph_of(tmp_path, symbol(face_nodes()))
    network.check(112)
    np.testing.assert_allclose(
        network(torch.from_numpy(pixels)).numpy(), naive_face(pixels, face_arrays()), rtol=1e-3, atol=1e-4
    )
    assert set(network.arrays) == {name.partition(":")[2] for name in face_arrays()}


def test_a_face_network_equals_mxnet(tmp_path: Path, mxnet: ModuleType) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, 112, 112)).astype(np.float32)
    content = symbol(face_nodes())
    answer = graph_of(tmp_path, content)(torch.from_numpy(pixels)).numpy()
    np.testing.assert_allclose(
        answer, oracle(mxnet, content, face_arrays(), pixels, "fc1_output"), rtol=1e-3, atol=1e-4
    )


_CHANNELS = [f"{name}" for name in ("gamma", "beta", "mean", "var")]
_BN = {"arg:gamma": 3, "arg:beta": 3, "aux:mean": 3, "aux:var": 3}
_CONV = {"arg:weight": (6, 3, 3, 2), "arg:bias": (6,)}

OPERATORS: dict[str, tuple[str, dict[str, object], dict[str, Any], list[str]]] = {
    "convolution": (
        "Convolution",
        {"kernel": "(3, 2)", "num_filter": 6, "stride": "(2, 1)", "pad": "(1, 2)", "dilate": "(1, 2)"},
        _CONV,
        ["data", "weight", "bias"],
    ),
    "old_integers": ("Convolution", {"kernel": "(3L, 2L)", "num_filter": "6"}, _CONV, ["data", "weight", "bias"]),
    "grouped": (
        "Convolution",
        {"kernel": "(2, 2)", "num_filter": 6, "num_group": 3, "no_bias": True},
        {"arg:weight": (6, 1, 2, 2)},
        ["data", "weight"],
    ),
    "batch_norm": ("BatchNorm", {"fix_gamma": False, "eps": 1e-5}, _BN, ["data", *_CHANNELS]),
    "batch_norm_defaults": ("BatchNorm", {}, _BN, ["data", *_CHANNELS]),
    "batch_norm_global": ("BatchNorm", {"use_global_stats": True, "fix_gamma": "0"}, _BN, ["data", *_CHANNELS]),
    "prelu": ("LeakyReLU", {"act_type": "prelu"}, {"arg:gamma": 3}, ["data", "gamma"]),
    "leaky": ("LeakyReLU", {"act_type": "leaky", "slope": 0.1}, {}, ["data"]),
    "leaky_default": ("LeakyReLU", {}, {}, ["data"]),
    "elu": ("LeakyReLU", {"act_type": "elu", "slope": 0.7}, {}, ["data"]),
    **{
        f"activation_{kind}": ("Activation", {"act_type": kind}, {}, ["data"])
        for kind in ("relu", "sigmoid", "tanh", "softrelu", "softsign")
    },
    "dense": (
        "FullyConnected",
        {"num_hidden": 4},
        {"arg:weight": (4, 3 * 9 * 8), "arg:bias": (4,)},
        ["data", "weight", "bias"],
    ),
    "dense_without_bias": (
        "FullyConnected",
        {"num_hidden": 4, "no_bias": True},
        {"arg:weight": (4, 216)},
        ["data", "weight"],
    ),
    "dense_unflattened": (
        "FullyConnected",
        {"num_hidden": 4, "no_bias": True, "flatten": False},
        {"arg:weight": (4, 8)},
        ["data", "weight"],
    ),
    "flatten": ("Flatten", {}, {}, ["data"]),
    "dropout": ("Dropout", {"p": 0.5}, {}, ["data"]),
    "identity": ("identity", {}, {}, ["data"]),
    "max_pool": (
        "Pooling",
        {"kernel": "(3, 3)", "stride": "(2, 2)", "pad": "(1, 1)", "pool_type": "max"},
        {},
        ["data"],
    ),
    "max_pool_full": (
        "Pooling",
        {"kernel": "(2, 2)", "stride": "(2, 2)", "pool_type": "max", "pooling_convention": "full"},
        {},
        ["data"],
    ),
    "avg_pool": (
        "Pooling",
        {"kernel": "(3, 3)", "stride": "(2, 2)", "pad": "(1, 1)", "pool_type": "avg"},
        {},
        ["data"],
    ),
    "avg_pool_uncounted": (
        "Pooling",
        {"kernel": "(3, 3)", "pad": "(1, 1)", "pool_type": "avg", "count_include_pad": False},
        {},
        ["data"],
    ),
    "avg_pool_full": (
        "Pooling",
        {"kernel": "(2, 2)", "stride": "(2, 2)", "pool_type": "avg", "pooling_convention": "full"},
        {},
        ["data"],
    ),
    "global_max": ("Pooling", {"kernel": "(1, 1)", "global_pool": True, "pool_type": "max"}, {}, ["data"]),
    "global_avg": ("Pooling", {"kernel": "(7, 7)", "global_pool": True, "pool_type": "avg"}, {}, ["data"]),
    "normalise": ("L2Normalization", {}, {}, ["data"]),
    "normalise_channels": ("L2Normalization", {"mode": "channel", "eps": 1e-4}, {}, ["data"]),
    "plus_scalar": ("_plus_scalar", {"scalar": "1.5"}, {}, ["data"]),
    "minus_scalar": ("_minus_scalar", {"scalar": "127.5"}, {}, ["data"]),
    "times_scalar": ("_mul_scalar", {"scalar": "1e-2"}, {}, ["data"]),
    "over_scalar": ("_div_scalar", {"scalar": "3"}, {}, ["data"]),
    "concat": ("Concat", {"dim": 1, "num_args": 2}, {"arg:other": (2, 5, 9, 8)}, ["data", "other"]),
    "concat_last": ("Concat", {"dim": 3, "num_args": 2}, {"arg:other": (2, 3, 9, 1)}, ["data", "other"]),
    "add": ("elemwise_add", {}, {"arg:other": (2, 3, 9, 8)}, ["other", "data"]),
    "old_add": ("_Plus", {}, {"arg:other": (2, 3, 9, 8)}, ["other", "data"]),
    "subtract": ("elemwise_sub", {}, {"arg:other": (2, 3, 9, 8)}, ["other", "data"]),
    "multiply": ("elemwise_mul", {}, {"arg:other": (2, 3, 9, 8)}, ["other", "data"]),
    "broadcast_add": ("broadcast_add", {}, {"arg:other": (2, 3, 1, 1)}, ["data", "other"]),
    "broadcast_mul": ("broadcast_mul", {}, {"arg:other": (2, 3, 1, 1)}, ["data", "other"]),
    "sum": ("add_n", {"num_args": 3}, {"arg:other": (2, 3, 9, 8)}, ["data", "other", "data"]),
    "clip": ("clip", {"a_min": "-0.5", "a_max": "1"}, {}, ["data"]),
    "cast": ("Cast", {"dtype": "float32"}, {}, ["data"]),
}


@pytest.mark.parametrize("case", list(OPERATORS))
def test_every_operator_equals_mxnets(tmp_path: Path, mxnet: ModuleType, case: str) -> None:
    operator, attributes, shapes, inputs = OPERATORS[case]
    generator = np.random.default_rng(1)
    arrays = {
        name: np.asarray(
            generator.uniform(0.1, 1.5, shape) if name == "aux:var" else generator.standard_normal(shape), np.float32
        )
        for name, shape in shapes.items()
    }
    content = symbol([(operator, "embedding", attributes, inputs)])
    answer = graph_of(tmp_path, content, arrays)(torch.from_numpy(data(2, 3, 9, 8))).numpy()
    expected = oracle(mxnet, content, arrays, data(2, 3, 9, 8), "embedding_output")
    assert answer.shape == expected.shape
    np.testing.assert_allclose(answer, expected, rtol=1e-4, atol=1e-5)


def test_a_graph_of_float16_is_computed_in_float32(tmp_path: Path, mxnet: ModuleType) -> None:
    """As those of InsightFace's partial_fc: float16 from behind the input to the embedding."""
    nodes: Nodes = [
        ("_mul_scalar", "scaled", {"scalar": "0.5"}, ["data"]),
        ("Cast", "narrow", {"dtype": "float16"}, ["scaled"]),
        ("Activation", "active", {"act_type": "tanh"}, ["narrow"]),
        ("Cast", "embedding", {"dtype": "float32"}, ["active"]),
    ]
    content = symbol(nodes)
    answer = graph_of(tmp_path, content, {})(torch.from_numpy(data(2, 3, 9, 8))).numpy()
    np.testing.assert_allclose(answer, np.tanh(data(2, 3, 9, 8) * 0.5), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(answer, oracle(mxnet, content, {}, data(2, 3, 9, 8), "embedding_output"), atol=2e-3)
    with pytest.raises(TeacherError, match="'embedding' casts to 'int32'"):
        graph_of(tmp_path, symbol([("Cast", "embedding", {"dtype": "int32"}, ["data"])]), {})


def test_a_full_pooling_that_torch_has_not_is_refused(tmp_path: Path) -> None:
    attributes = {
        "kernel": "(1, 1)",
        "stride": "(3, 3)",
        "pad": "(0, 0)",
        "pool_type": "max",
        "pooling_convention": "full",
    }
    with pytest.raises(TeacherError, match="in a way that torch has not"):
        graph_of(tmp_path, symbol([("Pooling", "embedding", attributes, ["data"])]), {}).check(9)


def test_the_embedding_is_fc1_or_what_goes_into_the_loss_or_the_head(tmp_path: Path) -> None:
    nodes = face_nodes()
    with_loss = graph_of(tmp_path, symbol(nodes))
    without_loss = graph_of(tmp_path, symbol(nodes[:-2]))
    renamed: Any = [
        (a, b.replace("fc1", "out"), c, [origin.replace("fc1", "out") for origin in d]) for a, b, c, d in nodes
    ]
    arrays = {name.replace("fc1", "out"): array for name, array in face_arrays().items()}
    arrays["arg:fc7_weight"] = np.eye(3, 16, dtype=np.float32)
    before_loss = graph_of(tmp_path, symbol(renamed), arrays)
    images = torch.rand(2, 3, 112, 112) * 255
    assert torch.equal(with_loss(images), without_loss(images))
    torch.testing.assert_close(before_loss(images), with_loss(images)[:, :3])


@pytest.mark.parametrize("key", ["attrs", "attr", "param"])
def test_attributes_are_read_from_every_age_of_the_format(tmp_path: Path, key: str) -> None:
    content = symbol(face_nodes())
    for entry in content["nodes"]:
        if "attrs" in entry:
            entry[key] = entry.pop("attrs")
        entry["inputs"] = [origin[:2] for origin in entry["inputs"]]
    images = torch.rand(2, 3, 112, 112) * 255
    assert torch.equal(graph_of(tmp_path, content)(images), graph_of(tmp_path, symbol(face_nodes()))(images))


def test_memory_is_given_back_as_the_graph_goes(tmp_path: Path) -> None:
    nodes: Any = [("_plus_scalar", "node0", {"scalar": 1}, ["data"])]
    nodes += [("_plus_scalar", f"node{number}", {"scalar": 1}, [f"node{number - 1}"]) for number in range(1, 40)]
    network = graph_of(tmp_path, symbol(nodes), {})
    made: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def step(node: Any, operation: Callable[..., torch.Tensor], inputs: list[torch.Tensor]) -> torch.Tensor:
        output = operation(*inputs)
        made.append(weakref.ref(output))
        alive.append(sum(reference() is not None for reference in made))
        return output

    assert network._execute(torch.zeros(1, 3, 4, 4), {}, step)[0, 0, 0, 0] == 40
    assert max(alive) <= 3


def test_the_module_moves_copies_and_pickles_with_its_weights(tmp_path: Path) -> None:
    network = graph_of(tmp_path, symbol(face_nodes()))
    assert sum(parameter.numel() for parameter in network.parameters()) == sum(
        array.size for array in face_arrays().values()
    )
    images = torch.rand(2, 3, 112, 112) * 255
    for twin in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(twin(images), network(images))
    assert network.double()(images.double()).dtype == torch.float64


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        (
            [("Deconvolution", "up", {}, ["data", "w"])],
            r"node 'up' is a 'Deconvolution', an operator that is not known",
        ),
        (
            [("Convolution", "c", {"num_filter": 2}, ["data", "w"])],
            r"node 'c' has kernel=None; wanted two whole numbers",
        ),
        ([("Convolution", "c", {"kernel": "(3, 3, 3)", "num_filter": 2}, ["data", "w"])], "wanted two whole numbers"),
        ([("Convolution", "c", {"kernel": "(1, 1)", "layout": "NHWC"}, ["data", "w"])], "wanted NCHW"),
        ([("Activation", "a", {"act_type": "swish"}, ["data"])], "node 'a' is an Activation of act_type 'swish'"),
        ([("LeakyReLU", "a", {"act_type": "gelu"}, ["data"])], "act_type 'gelu'"),
        ([("Pooling", "p", {"pool_type": "lp", "kernel": "(1, 1)"}, ["data"])], "pools by 'lp'"),
        ([("Pooling", "p", {"kernel": "(1, 1)", "stride": "(0, 1)"}, ["data"])], "stride"),
        ([("BatchNorm", "b", {"eps": "nan"}, ["data"])], "node 'b' has eps='nan'; wanted a number"),
        ([("BatchNorm", "b", {"fix_gamma": "maybe"}, ["data"])], "wanted True or False"),
        ([("_plus_scalar", "s", {}, ["data"])], "node 's' has scalar=None; wanted a number"),
        ([("Concat", "c", {"dim": "1.5"}, ["data"])], "wanted a whole number"),
        ([("_plus_scalar", "s", {"scalar": 1}, ["w"])], "does not depend on an image"),
        ([("elemwise_add", "s", {}, ["data", "missing"])], "no array named 'missing'"),
    ],
)
def test_what_cannot_be_built_is_named(tmp_path: Path, nodes: Any, message: str) -> None:
    with pytest.raises(TeacherError, match=message) as caught:
        graph_of(tmp_path, symbol(nodes), {"arg:w": np.zeros((2, 3, 1, 1), np.float32)})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        (
            [("Convolution", "c", {"kernel": "(3, 3)", "num_filter": 2}, ["data", "w"])],
            r"weights \(2, 3, 1, 1\); wanted 2",
        ),
        (
            [("Convolution", "c", {"kernel": "(1, 1)", "num_filter": 2, "num_group": 2}, ["data", "w"])],
            "'c' .* cannot take",
        ),
        (
            [("Convolution", "c", {"kernel": "(1, 1)", "num_filter": 2, "stride": "(0, 0)"}, ["data", "w"])],
            "'c' .* cannot take",
        ),
        ([("FullyConnected", "f", {"num_hidden": 2}, ["data", "w"])], "'f' .* cannot take"),
        ([("BatchNorm", "b", {}, ["data", "w"])], "'b' .* cannot take"),
        ([("Pooling", "p", {"kernel": "(900, 900)"}, ["data"])], "'p' .* cannot take"),
        (
            [("Convolution", "c", {"kernel": "(1, 1)", "num_filter": 2, "pad": "(9999, 9999)"}, ["data", "w"])],
            "larger than any",
        ),
        ([("Concat", f"c{n}", {"dim": 1}, [f"c{n - 1}" if n else "data"] * 2) for n in range(60)], "larger than any"),
    ],
)
def test_shapes_that_cannot_be_are_found_before_anything_is_computed(tmp_path: Path, nodes: Any, message: str) -> None:
    network = graph_of(tmp_path, symbol(nodes), {"arg:w": np.zeros((2, 3, 1, 1), np.float32)})
    with pytest.raises(TeacherError, match=message) as caught:
        network.check(112)
    assert "\n" not in str(caught.value)


def _entry(**changes: object) -> dict[str, object]:
    return {"op": "identity", "name": "embedding", "inputs": [[0, 0, 0]], **changes}


_DATA = {"op": "null", "name": "data", "inputs": []}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "5",
        "[" * 100_000,
        '{"nodes": [], "heads": [[0, 0, 0]]}',
        '{"nodes": 5, "heads": []}',
        "\ud800".encode("utf-8", "surrogatepass").decode("latin-1"),
        {"nodes": [_DATA, _entry()], "heads": []},
        {"nodes": [_DATA, _entry()], "heads": [[7, 0, 0]]},
        {"nodes": [_DATA, _entry()], "heads": [[-1, 0, 0]]},
        {"nodes": [_DATA, _entry()], "heads": [[float("inf"), 0, 0]]},
        {"nodes": [_DATA, _entry(inputs=[[1, 0, 0]])], "heads": [[1, 0, 0]]},
        {"nodes": [_DATA, _entry(inputs=[[-1, 0, 0]])], "heads": [[1, 0, 0]]},
        {"nodes": [_DATA, _entry(inputs=[[0, 1, 0]])], "heads": [[1, 0, 0]]},
        {"nodes": [_DATA, _entry(inputs=[0])], "heads": [[1, 0, 0]]},
        {"nodes": [_DATA, _entry(attrs=[1])], "heads": [[1, 0, 0]]},
        {"nodes": [_DATA, {"op": "identity"}], "heads": [[1, 0, 0]]},
        {"nodes": [_DATA] * 20_001, "heads": [[0, 0, 0]]},
    ],
)
def test_what_is_no_symbol_ends_in_one_line(tmp_path: Path, content: object) -> None:
    with pytest.raises(TeacherError, match=r"damaged or no MXNet symbol|an empty file") as caught:
        graph_of(tmp_path, content)
    assert "\n" not in str(caught.value)


def test_a_symbol_of_many_lists_is_refused_before_it_is_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred megabytes of empty lists would be 2.5 GB of objects."""
    monkeypatch.setattr(json, "loads", lambda *_: pytest.fail("parsed"))
    with pytest.raises(TeacherError, match="bytes; no face network has more than 16777216"):
        graph_of(tmp_path, '{"nodes": [' + "[]," * (1 << 23) + "[]]}")


def test_nan_among_the_arrays_is_named(tmp_path: Path) -> None:
    arrays = face_arrays()
    arrays["arg:bn0_beta"][2] = np.inf
    with pytest.raises(TeacherError, match="array 'bn0_beta' holds NaN or inf"):
        graph_of(tmp_path, symbol(face_nodes()), arrays)
