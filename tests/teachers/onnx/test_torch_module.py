"""An ONNX graph as a torch module: the same embeddings, gradients, training, its parts, and the way back to a file."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from arcface_kd.errors import TeacherError
from arcface_kd.teachers.onnx.graph import OnnxGraph, read_graph
from arcface_kd.teachers.onnx.session import any_batch
from arcface_kd.teachers.onnx.torch_module import TorchGraph
from arcface_kd.teachers.options import Preprocessing
from tests.teachers.onnx_models import embed_one_by_one, face_network


def read(model: Any, folder: Path) -> OnnxGraph:
    path = folder / "network.onnx"
    path.write_bytes(model.SerializeToString())
    return read_graph(path)


def images(count: int = 3, size: int = 112, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


class Twin(nn.Module):
    """A small network with a shortcut and batch norms, and the same written down as an ONNX graph."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.conv1, self.bn1, self.prelu = nn.Conv2d(3, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4), nn.PReLU(4)
            self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, 1, 1, groups=2), nn.BatchNorm2d(4, momentum=0.3)
            self.fc, self.bn3 = nn.Linear(4 * 4 * 4, 5), nn.BatchNorm1d(5, eps=2e-5)
            for norm in (self.bn1, self.bn2, self.bn3):
                nn.init.uniform_(norm.weight, 0.5, 1.5)
                nn.init.normal_(norm.bias)
                assert norm.running_mean is not None
                assert norm.running_var is not None
                nn.init.normal_(norm.running_mean)
                nn.init.uniform_(norm.running_var, 0.5, 1.5)
            nn.init.uniform_(self.prelu.weight)

    def feature_map(self, prepared: Tensor) -> Tensor:
        x = self.prelu(self.bn1(self.conv1(prepared / 2 + 0.25)))
        return x + self.bn2(self.conv2(x))

    def forward(self, prepared: Tensor) -> Tensor:
        return self.bn3(self.fc(self.feature_map(prepared).flatten(1)))

    def onnx(self) -> Any:
        arrays = {name: value.detach().numpy() for name, value in self.state_dict().items() if value.dim()}
        arrays["prelu.weight"] = arrays["prelu.weight"].reshape(4, 1, 1)
        arrays |= {"half": np.array([0.5], np.float32), "quarter": np.full((3, 1, 1), 0.25, np.float32)}

        def norm(name: str, source: str, result: str) -> Any:
            own = getattr(self, name)
            entries = [f"{name}.{part}" for part in ("weight", "bias", "running_mean", "running_var")]
            return helper.make_node(
                "BatchNormalization", [source, *entries], [result], epsilon=own.eps, momentum=1 - own.momentum
            )

        nodes = [
            helper.make_node("Mul", ["image", "half"], ["halved"]),
            helper.make_node("Add", ["halved", "quarter"], ["prepared"]),
            helper.make_node(
                "Conv", ["prepared", "conv1.weight"], ["c1"], strides=[2, 2], pads=[1] * 4, kernel_shape=[3, 3]
            ),
            norm("bn1", "c1", "b1"),
            helper.make_node("PRelu", ["b1", "prelu.weight"], ["p1"]),
            helper.make_node("Conv", ["p1", "conv2.weight", "conv2.bias"], ["c2"], pads=[1] * 4, group=2),
            norm("bn2", "c2", "b2"),
            helper.make_node("Add", ["p1", "b2"], ["map"]),
            # The batch size comes from the input, as old exporters have it.
            helper.make_node("Shape", ["image"], ["shape"]),
            helper.make_node("Constant", [], ["first"], value=numpy_helper.from_array(np.array(0, np.int64))),
            helper.make_node("Gather", ["shape", "first"], ["batch"]),
            helper.make_node("Unsqueeze", ["batch", "axis"], ["batch_vector"]),
            helper.make_node("Concat", ["batch_vector", "minus"], ["flat_shape"], axis=0),
            helper.make_node("Reshape", ["map", "flat_shape"], ["flat"]),
            helper.make_node("Gemm", ["flat", "fc.weight", "fc.bias"], ["row"], transB=1),
            norm("bn3", "row", "embedding"),
        ]
        arrays |= {"axis": np.array([0], np.int64), "minus": np.array([-1], np.int64)}
        graph = helper.make_graph(
            nodes,
            "twin",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, 8, 8])],
            [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, [1, 5])],
            [numpy_helper.from_array(array, name) for name, array in arrays.items()],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


@pytest.fixture
def twin() -> Twin:
    return Twin()


@pytest.fixture
def graph(twin: Twin, tmp_path: Path) -> TorchGraph:
    return TorchGraph(read(twin.onnx(), tmp_path))


@pytest.mark.parametrize("tail", ["reshape", "constant_node", "flatten"])
def test_any_batch_embeds_as_onnxruntime_does_one_by_one(tail: Any, tmp_path: Path) -> None:
    model = face_network(tail=tail)
    met = TorchGraph(read(model, tmp_path)).eval()(images(3))
    wanted = embed_one_by_one(model, images(3).numpy())
    torch.testing.assert_close(met, torch.from_numpy(wanted), rtol=1e-4, atol=1e-5)


@pytest.mark.real
def test_a_real_teacher_embeds_as_onnxruntime_does(real_data: Path) -> None:
    """Batch size 1 is baked into its Reshape."""
    graph = read_graph(real_data / "teachers" / "mobilefacenet_512.onnx")
    with torch.no_grad():
        met = TorchGraph(graph).eval()(images(3))
    torch.testing.assert_close(met, any_batch(graph, Preprocessing())(images(3)), rtol=0, atol=1e-4)
    assert met.shape == (3, 512)


def named_gradients(module: nn.Module, loss: Tensor) -> list[Tensor]:
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return list(torch.autograd.grad(loss, parameters))


def test_gradients_are_those_of_the_module_that_was_exported(twin: Twin, graph: TorchGraph) -> None:
    """In float64, in the images and in every weight; constants of the input's normalisation are no weights."""
    twin.double().train()
    graph.double().train()
    goal = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    answers = []
    for module in (twin, graph):
        given = images(4, 8).double().requires_grad_()
        loss = (module(given) * goal).sum()
        answers.append([*torch.autograd.grad(loss, given, retain_graph=True), *named_gradients(module, loss)])
    assert len(answers[0]) == len(answers[1])
    by_size = [sorted(answer[1:], key=lambda g: (g.numel(), float(g.abs().sum()))) for answer in answers]
    torch.testing.assert_close(answers[1][0], answers[0][0], rtol=1e-9, atol=1e-9)
    for met, wanted in zip(by_size[1], by_size[0], strict=True):
        torch.testing.assert_close(met.flatten(), wanted.flatten(), rtol=1e-9, atol=1e-9)


def test_it_trains_as_the_module_does_and_goes_back_to_a_file(twin: Twin, graph: TorchGraph, tmp_path: Path) -> None:
    """Weights and running statistics alike; onnxruntime reads what is written, for any batch."""
    for module in (twin, graph):
        module.train()
        optimiser = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
        for step in range(5):
            optimiser.zero_grad()
            module(images(4, 8, seed=step)).square().sum().backward()
            optimiser.step()
        module.eval()
    wanted = twin(images(3, 8, seed=9))
    torch.testing.assert_close(graph(images(3, 8, seed=9)), wanted, rtol=1e-3, atol=1e-4)
    file = tmp_path / "trained.onnx"
    file.write_bytes(graph.serialised())
    again = read_graph(file)
    assert again.fixed_batch is None
    torch.testing.assert_close(
        any_batch(again, Preprocessing(size=8))(images(3, 8, seed=9)), wanted.detach(), rtol=1e-3, atol=1e-4
    )
    torch.testing.assert_close(TorchGraph(again).eval()(images(3, 8, seed=9)), wanted, rtol=1e-3, atol=1e-4)


def test_untrained_it_goes_back_as_it_came(graph: TorchGraph, tmp_path: Path) -> None:
    before = onnx.load_model_from_string(graph.graph.model)
    after = onnx.load_model_from_string(graph.serialised())
    assert [t.SerializeToString() for t in after.graph.initializer] == [
        t.SerializeToString() for t in before.graph.initializer
    ]
    assert after.graph.node == before.graph.node


def test_a_state_of_the_graph_loads_into_another_of_it(twin: Twin, graph: TorchGraph, tmp_path: Path) -> None:
    with torch.no_grad():
        for parameter in graph.parameters():
            parameter.add_(0.1)
    other = TorchGraph(read(twin.onnx(), tmp_path))
    other.load_state_dict(graph.state_dict())
    assert torch.equal(other.eval()(images(2, 8)), graph.eval()(images(2, 8)))


def test_bottlenecks_are_what_all_of_the_embedding_is_made_of(graph: TorchGraph) -> None:
    """Not the shortcut's two branches; the shape of the input is no way around."""
    assert graph.bottlenecks() == ["halved", "prepared", "c1", "b1", "p1", "map", "flat", "row"]


def test_what_lies_behind_a_bottleneck(twin: Twin, graph: TorchGraph) -> None:
    twin.eval()
    graph.eval()
    given = images(3, 8)
    (found,) = graph.run({"image": given}, ["map"])
    torch.testing.assert_close(found, twin.feature_map(given), rtol=1e-5, atol=1e-5)
    # Another map, so that nothing of the images can have come along.
    other = torch.randn(5, 4, 4, 4, requires_grad=True)
    wanted = twin.bn3(twin.fc(other.flatten(1)))
    met = graph.behind("map", other)
    torch.testing.assert_close(met, wanted, rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(met.square().sum(), other)
    (wanted_gradient,) = torch.autograd.grad(wanted.square().sum(), other)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-4, atol=1e-4)


def test_a_value_with_a_way_around_it_is_refused(graph: TorchGraph) -> None:
    with pytest.raises(TeacherError, match="cannot compute embedding from b2: it needs image as well"):
        graph.behind("b2", torch.zeros(1, 4, 4, 4))


def test_a_value_that_is_not_there_is_refused(graph: TorchGraph) -> None:
    with pytest.raises(TeacherError, match="it needs elsewhere as well"):
        graph.run({"image": images(1, 8)}, ["elsewhere"])


def test_images_of_another_size_are_refused_by_node(graph: TorchGraph) -> None:
    with pytest.raises(TeacherError, match=r"operator Gemm of node 'Gemm_\d+' cannot be run on \(2, 100\), \(5, 64\)"):
        graph.eval()(images(2, 10))


def test_damaged_graphs_are_refused(twin: Twin, graph: TorchGraph) -> None:
    def changed(change: Any) -> OnnxGraph:
        model = onnx.load_model_from_string(graph.graph.model)
        change(model.graph)
        return OnnxGraph(**{**vars(graph.graph), "model": model.SerializeToString()})

    def cut(part: Any) -> None:
        del part.node[3]

    def without_end(part: Any) -> None:
        del part.node[-1]

    with pytest.raises(TeacherError, match=r"node 'PRelu_3' takes 'b1', which no node before it returns"):
        TorchGraph(changed(cut))
    with pytest.raises(TeacherError, match="no node of the ONNX graph returns its output 'embedding'"):
        TorchGraph(changed(without_end))


def test_constants_given_as_numbers_and_as_text(tmp_path: Path) -> None:
    def model(**value: Any) -> OnnxGraph:
        nodes = [
            helper.make_node("Constant", [], ["shape"], value_ints=[0, -1]),
            helper.make_node("Constant", [], ["factor"], **value),
            helper.make_node("Reshape", ["image", "shape"], ["flat"]),
            helper.make_node("Mul", ["flat", "factor"], ["embedding"]),
        ]
        made = helper.make_graph(
            nodes,
            "constants",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 2, 2])],
            [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, None)],
        )
        content = helper.make_model(made, opset_imports=[helper.make_opsetid("", 13)]).SerializeToString()
        return OnnxGraph(content, "image", "embedding", None, None, 0, "")

    met = TorchGraph(model(value_float=2.5))(images(2, 2))
    assert torch.equal(met, images(2, 2).flatten(1) * 2.5)
    with pytest.raises(TeacherError, match="constant 'factor' is given as value_string"):
        TorchGraph(model(value_string=b"two"))


def test_half_precision_weights_compute_in_float32_and_go_back_to_half(tmp_path: Path) -> None:
    arrays = {"matrix": np.linspace(-1, 1, 24).reshape(12, 2).astype(np.float16)}
    nodes = [
        helper.make_node("Flatten", ["image"], ["flat"]),
        helper.make_node("Cast", ["flat"], ["half"], to=TensorProto.FLOAT16),
        helper.make_node("MatMul", ["half", "matrix"], ["product"]),
        helper.make_node("Cast", ["product"], ["embedding"], to=TensorProto.FLOAT),
    ]
    made = helper.make_graph(
        nodes,
        "half",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 2, 2])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", 2])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    half = TorchGraph(read(model, tmp_path))
    wanted = images(3, 2).flatten(1) @ torch.from_numpy(arrays["matrix"].astype(np.float32))
    torch.testing.assert_close(half(images(3, 2)), wanted)
    (again,) = onnx.load_model_from_string(half.serialised()).graph.initializer
    assert again.data_type == TensorProto.FLOAT16
    assert np.array_equal(numpy_helper.to_array(again), arrays["matrix"])
