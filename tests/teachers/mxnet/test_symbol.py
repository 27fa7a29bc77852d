"""MXNet's graphs: each operator against mxnet and a whole network against a naive twin; what cannot be is named."""

import copy
import itertools
import json
import pickle
import weakref
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


def faces(count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, 112, 112, generator=torch.Generator().manual_seed(0)) * 255


def naive_face(pixels: torch.Tensor, arrays: dict[str, np.ndarray]) -> torch.Tensor:
    """`face_nodes` up to fc1, written down once more in torch."""
    weights = {name.partition(":")[2]: torch.from_numpy(array) for name, array in arrays.items()}
    relu0 = nn.functional.conv2d((pixels - 127.5) * 0.0078125, weights["conv0_weight"], stride=4, padding=1)
    column = [weights[f"bn0_{name}"].view(1, -1, 1, 1) for name in ("mean", "var", "gamma", "beta")]
    relu0 = (relu0 - column[0]) / (column[1] + 2e-5).sqrt() * column[2] + column[3]
    relu0 = torch.where(relu0 > 0, relu0, relu0 * weights["relu0_gamma"].view(1, -1, 1, 1))
    added = relu0 + nn.functional.conv2d(relu0, weights["conv1_weight"], padding=1, groups=8)
    rows = added.reshape(len(added), 8, 4, 7, 4, 7).mean((3, 5)).reshape(len(added), -1)
    rows = rows @ weights["pre_fc1_weight"].T + weights["pre_fc1_bias"]
    # fc1 has its gamma fixed to 1, whatever the file holds.
    return (rows - weights["fc1_mean"]) / (weights["fc1_var"] + 2e-5).sqrt() + weights["fc1_beta"]


def test_a_face_network_equals_its_naive_twin_copied_and_pickled(tmp_path: Path) -> None:
    network = graph_of(tmp_path, symbol(face_nodes()))
    network.check(112)
    for twin in (network, copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        torch.testing.assert_close(twin(faces()), naive_face(faces(), face_arrays()), rtol=1e-3, atol=1e-4)
    assert set(network.arrays) == {name.partition(":")[2] for name in face_arrays()}
    assert sum(each.numel() for each in network.parameters()) == sum(array.size for array in face_arrays().values())
    assert network.double()(faces().double()).dtype == torch.float64


def test_a_face_network_equals_mxnet(tmp_path: Path, mxnet: ModuleType) -> None:
    content = symbol(face_nodes())
    wanted = oracle(mxnet, content, face_arrays(), faces().numpy(), "fc1_output")
    np.testing.assert_allclose(graph_of(tmp_path, content)(faces()), wanted, rtol=1e-3, atol=1e-4)


_BN = {"arg:gamma": 3, "arg:beta": 3, "aux:mean": 3, "aux:var": 3}
_CONV = {"arg:weight": (6, 3, 3, 2), "arg:bias": (6,)}
_OTHER = {"arg:other": (2, 3, 9, 8)}
_TWO_BY_TWO = {"kernel": "(2, 2)", "stride": "(2, 2)"}
_PADDED = {"kernel": "(3, 3)", "stride": "(2, 2)", "pad": "(1, 1)"}
# An operator, its attributes and the shapes of its arrays, which follow the (2, 3, 9, 8) data.
OPERATORS: dict[str, tuple[str, dict[str, object], dict[str, Any]]] = {
    "convolution": (
        "Convolution",
        {"kernel": "(3, 2)", "num_filter": 6, "stride": "(2, 1)", "pad": "(1, 2)", "dilate": "(1, 2)"},
        _CONV,
    ),
    "old_integers": ("Convolution", {"kernel": "(3L, 2L)", "num_filter": "6"}, _CONV),
    "grouped": (
        "Convolution",
        {"kernel": "(2, 2)", "num_filter": 6, "num_group": 3, "no_bias": True},
        {"arg:weight": (6, 1, 2, 2)},
    ),
    "batch_norm": ("BatchNorm", {"fix_gamma": False, "eps": 1e-5}, _BN),
    "batch_norm_defaults": ("BatchNorm", {}, _BN),
    "batch_norm_global": ("BatchNorm", {"use_global_stats": True, "fix_gamma": "0"}, _BN),
    "prelu": ("LeakyReLU", {"act_type": "prelu"}, {"arg:gamma": 3}),
    "leaky": ("LeakyReLU", {"act_type": "leaky", "slope": 0.1}, {}),
    "leaky_default": ("LeakyReLU", {}, {}),
    "elu": ("LeakyReLU", {"act_type": "elu", "slope": 0.7}, {}),
    **{
        f"activation_{kind}": ("Activation", {"act_type": kind}, {})
        for kind in ("relu", "sigmoid", "tanh", "softrelu", "softsign")
    },
    "dense": ("FullyConnected", {"num_hidden": 4}, {"arg:weight": (4, 216), "arg:bias": (4,)}),
    "dense_without_bias": ("FullyConnected", {"num_hidden": 4, "no_bias": True}, {"arg:weight": (4, 216)}),
    "dense_unflattened": (
        "FullyConnected",
        {"num_hidden": 4, "no_bias": True, "flatten": False},
        {"arg:weight": (4, 8)},
    ),
    "flatten": ("Flatten", {}, {}),
    "dropout": ("Dropout", {"p": 0.5}, {}),
    "identity": ("identity", {}, {}),
    "max_pool": ("Pooling", {**_PADDED, "pool_type": "max"}, {}),
    "max_pool_full": ("Pooling", {**_TWO_BY_TWO, "pool_type": "max", "pooling_convention": "full"}, {}),
    "avg_pool": ("Pooling", {**_PADDED, "pool_type": "avg"}, {}),
    "avg_pool_uncounted": ("Pooling", {**_PADDED, "pool_type": "avg", "count_include_pad": False}, {}),
    "avg_pool_full": ("Pooling", {**_TWO_BY_TWO, "pool_type": "avg", "pooling_convention": "full"}, {}),
    "global_max": ("Pooling", {"kernel": "(1, 1)", "global_pool": True, "pool_type": "max"}, {}),
    "global_avg": ("Pooling", {"kernel": "(7, 7)", "global_pool": True, "pool_type": "avg"}, {}),
    "normalise": ("L2Normalization", {}, {}),
    "normalise_channels": ("L2Normalization", {"mode": "channel", "eps": 1e-4}, {}),
    "plus_scalar": ("_plus_scalar", {"scalar": "1.5"}, {}),
    "minus_scalar": ("_minus_scalar", {"scalar": "127.5"}, {}),
    "times_scalar": ("_mul_scalar", {"scalar": "1e-2"}, {}),
    "over_scalar": ("_div_scalar", {"scalar": "3"}, {}),
    "concat": ("Concat", {"dim": 1, "num_args": 2}, {"arg:other": (2, 5, 9, 8)}),
    "concat_last": ("Concat", {"dim": 3, "num_args": 2}, {"arg:other": (2, 3, 9, 1)}),
    "add": ("elemwise_add", {}, _OTHER),
    "old_add": ("_Plus", {}, _OTHER),
    "subtract": ("elemwise_sub", {}, _OTHER),
    "multiply": ("elemwise_mul", {}, _OTHER),
    "broadcast_add": ("broadcast_add", {}, {"arg:other": (2, 3, 1, 1)}),
    "broadcast_mul": ("broadcast_mul", {}, {"arg:other": (2, 3, 1, 1)}),
    "sum": ("add_n", {"num_args": 3}, {**_OTHER, "arg:third": (2, 3, 9, 8)}),
    "clip": ("clip", {"a_min": "-0.5", "a_max": "1"}, {}),
    "cast": ("Cast", {"dtype": "float32"}, {}),
}


@pytest.mark.parametrize("case", list(OPERATORS))
def test_every_operator_equals_mxnets(tmp_path: Path, mxnet: ModuleType, case: str) -> None:
    operator, attributes, shapes = OPERATORS[case]
    generator = np.random.default_rng(1)
    data = (generator.standard_normal((2, 3, 9, 8)) * 2).astype(np.float32)
    arrays = {
        name: np.asarray(
            generator.uniform(0.1, 1.5, shape) if name == "aux:var" else generator.standard_normal(shape), np.float32
        )
        for name, shape in shapes.items()
    }
    inputs = ["data", *(name.partition(":")[2] for name in shapes)]
    content = symbol([(operator, "embedding", attributes, inputs)])
    answer = graph_of(tmp_path, content, arrays)(torch.from_numpy(data)).numpy()
    expected = oracle(mxnet, content, arrays, data, "embedding_output")
    assert answer.shape == expected.shape
    np.testing.assert_allclose(answer, expected, rtol=1e-4, atol=1e-5)


def test_a_graph_of_float16_is_computed_in_float32(tmp_path: Path) -> None:
    """As those of InsightFace's partial_fc: float16 from behind the input to the embedding."""
    content = symbol(
        [
            ("_mul_scalar", "scaled", {"scalar": "0.5"}, ["data"]),
            ("Cast", "narrow", {"dtype": "float16"}, ["scaled"]),
            ("Activation", "active", {"act_type": "tanh"}, ["narrow"]),
            ("Cast", "embedding", {"dtype": "float32"}, ["active"]),
        ]
    )
    data = torch.randn(2, 3, 9, 8)
    torch.testing.assert_close(graph_of(tmp_path, content, {})(data), torch.tanh(data * 0.5))


def test_the_embedding_is_fc1_or_what_goes_into_the_loss_or_the_head(tmp_path: Path) -> None:
    nodes = face_nodes()
    with_loss, without_loss = graph_of(tmp_path, symbol(nodes)), graph_of(tmp_path, symbol(nodes[:-2]))
    renamed: Any = [
        (a, b.replace("fc1", "out"), c, [origin.replace("fc1", "out") for origin in d]) for a, b, c, d in nodes
    ]
    arrays = {name.replace("fc1", "out"): array for name, array in face_arrays().items()}
    arrays["arg:fc7_weight"] = np.eye(3, 16, dtype=np.float32)
    before_loss = graph_of(tmp_path, symbol(renamed), arrays)
    assert torch.equal(with_loss(faces()), without_loss(faces()))
    torch.testing.assert_close(before_loss(faces()), with_loss(faces())[:, :3])


@pytest.mark.parametrize("key", ["attr", "param"])
def test_attributes_are_read_from_every_age_of_the_format(tmp_path: Path, key: str) -> None:
    content = symbol(face_nodes())
    for entry in content["nodes"]:
        if "attrs" in entry:
            entry[key] = entry.pop("attrs")
        entry["inputs"] = [origin[:2] for origin in entry["inputs"]]
    assert torch.equal(graph_of(tmp_path, content)(faces()), graph_of(tmp_path, symbol(face_nodes()))(faces()))


def test_memory_is_given_back_as_the_graph_goes(tmp_path: Path) -> None:
    names = ["data", *(f"node{number}" for number in range(40))]
    nodes = [("_plus_scalar", name, {"scalar": 1}, [before]) for before, name in itertools.pairwise(names)]
    network = graph_of(tmp_path, symbol(nodes), {})
    made: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def step(node: Any, *inputs: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = node.run(*inputs)
        made.append(weakref.ref(output))
        alive.append(sum(reference() is not None for reference in made))
        return output

    assert network._execute(torch.zeros(1, 3, 4, 4), step)[0, 0, 0, 0] == 40
    assert max(alive) <= 3


def _convolved(**attributes: object) -> Any:
    return [("Convolution", "c", {"kernel": "(1, 1)", "num_filter": 2, **attributes}, ["data", "w"])]


def _one(operator: str, attributes: dict[str, object], *inputs: str) -> Any:
    return [(operator, "n", attributes, inputs or ("data",))]


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        (_one("Deconvolution", {}, "data", "w"), "'n' is a 'Deconvolution'"),
        (_one("Convolution", {"num_filter": 2}, "data", "w"), "'n' has kernel=None"),
        (_convolved(kernel="(3, 3, 3)"), "'c' has kernel="),
        (_convolved(layout="NHWC"), "'c' has layout='NHWC'"),
        (_one("Activation", {"act_type": "swish"}), "'n' has act_type='swish'"),
        (_one("LeakyReLU", {"act_type": "gelu"}), "'n' has act_type='gelu'"),
        (_one("LeakyReLU", {"act_type": "prelu"}), "'n' .* cannot take"),
        (_one("Pooling", {"pool_type": "lp", "kernel": "(1, 1)"}), "'n' has pool_type='lp'"),
        (_one("Pooling", {"kernel": "(1, 1)", "stride": "(0, 1)"}), "'n' .* cannot take"),
        (_one("Pooling", {"kernel": "(1, 1)", "stride": "(2, 2)", "pooling_convention": "full"}), "that torch has not"),
        (_one("BatchNorm", {"eps": "nan"}, "data", *["v"] * 4), "'n' has eps='nan'"),
        (_one("BatchNorm", {"fix_gamma": "maybe"}, "data", *["v"] * 4), "'n' has fix_gamma='maybe'"),
        (_one("_plus_scalar", {}), "'n' has scalar=None"),
        (_one("Concat", {"dim": "1.5"}), "'n' has dim='1.5'"),
        (_one("Cast", {"dtype": "int32"}), "'n' has dtype='int32'"),
        (_one("_plus_scalar", {"scalar": 1}, "w"), "does not depend on an image"),
        (_one("elemwise_add", {}, "data", "missing"), "no array named 'missing'"),
        (_convolved(kernel="(3, 3)"), r"'c' has weights \(2, 3, 1, 1\)"),
        (_convolved(num_group=2), "'c' .* cannot take"),
        (_convolved(stride="(0, 0)"), "'c' .* cannot take"),
        (_one("FullyConnected", {"num_hidden": 2}, "data", "w"), "'n' .* cannot take"),
        (_one("BatchNorm", {}, "data", "w"), "'n' .* cannot take"),
        (_one("Pooling", {"kernel": "(900, 900)"}), "'n' .* cannot take"),
        (_convolved(pad="(9999, 9999)"), "larger than any"),
        ([("Concat", f"c{n}", {"dim": 1}, [f"c{n - 1}" if n else "data"] * 2) for n in range(60)], "larger than any"),
    ],
)
def test_what_cannot_be_is_named_before_anything_is_computed(tmp_path: Path, nodes: Any, message: str) -> None:
    arrays = {"arg:w": np.zeros((2, 3, 1, 1), np.float32), "arg:v": np.ones(3, np.float32)}
    with pytest.raises(TeacherError, match=message) as caught:
        graph_of(tmp_path, symbol(nodes), arrays).check(112)
    assert "\n" not in str(caught.value)


def _entry(**changes: object) -> dict[str, object]:
    return {"op": "identity", "name": "embedding", "inputs": [[0, 0, 0]], **changes}


_DATA = {"op": "null", "name": "data", "inputs": []}


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]", "5", "[" * 100_000, '{"nodes": [], "heads": [[0, 0, 0]]}', '{"nodes": 5, "heads": []}'),
        "\ud800".encode("utf-8", "surrogatepass").decode("latin-1"),
        *({"nodes": [_DATA, _entry()], "heads": heads} for heads in ([], [[7, 0, 0]], [[-1, 0, 0]], [[1e999, 0, 0]])),
        *(
            {"nodes": [_DATA, _entry(inputs=inputs)], "heads": [[1, 0, 0]]}
            for inputs in ([[1, 0, 0]], [[-1, 0, 0]], [[0, 1, 0]], [0])
        ),
        {"nodes": [_DATA, _entry(attrs=[1])], "heads": [[1, 0, 0]]},
        {"nodes": [_DATA, {"op": "identity"}], "heads": [[1, 0, 0]]},
        {"nodes": [_DATA] * 20_001, "heads": [[0, 0, 0]]},
    ],
    ids=lambda content: str(content)[:40],
)
def test_what_is_no_symbol_ends_in_one_line(tmp_path: Path, content: object) -> None:
    with pytest.raises(TeacherError, match=r"damaged or no MXNet symbol|an empty file") as caught:
        graph_of(tmp_path, content)
    assert "\n" not in str(caught.value)


def test_a_symbol_of_many_lists_is_refused_before_it_is_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred megabytes of empty lists would be 2.5 GB of objects."""
    monkeypatch.setattr(json, "loads", lambda *_: pytest.fail("parsed"))
    with pytest.raises(TeacherError, match=r"model-symbol\.json has \d+ bytes"):
        graph_of(tmp_path, '{"nodes": [' + "[]," * (1 << 23) + "[]]}")


def test_nan_among_the_arrays_is_named(tmp_path: Path) -> None:
    arrays = face_arrays()
    arrays["arg:bn0_beta"][2] = np.inf
    with pytest.raises(TeacherError, match="'bn0_beta' holds NaN or inf"):
        graph_of(tmp_path, symbol(face_nodes()), arrays)
