"""An ONNX graph as a torch module: the same embeddings, gradients, training, its parts, and the way back to a file."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn

from arcface_kd.errors import TeacherError
from arcface_kd.teachers.onnx.graph import OnnxGraph, read_graph
from arcface_kd.teachers.onnx.session import any_batch
from arcface_kd.teachers.onnx.torch_module import TorchGraph
from arcface_kd.teachers.options import Preprocessing
from tests.teachers.onnx_models import model_of, saved


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
        arrays = {
            name.replace(".", "_"): value.detach().numpy() for name, value in self.state_dict().items() if value.dim()
        }
        arrays["prelu_weight"] = arrays["prelu_weight"].reshape(4, 1, 1)
        arrays |= {"half": np.array([0.5], np.float32), "quarter": np.full((3, 1, 1), 0.25, np.float32)}
        arrays |= {"axis": np.array([0]), "minus": np.array([-1])}

        def norm(name: str, source: str) -> str:
            own = getattr(self, name)
            attributes = f"<epsilon = {own.eps:.9f}, momentum = {1 - own.momentum}>"
            entries = ", ".join(f"{name}_{part}" for part in ("weight", "bias", "running_mean", "running_var"))
            return f"BatchNormalization {attributes} ({source}, {entries})"

        # The batch size comes from the input, as old exporters have it.
        nodes = f"""
            halved = Mul (image, half)
            prepared = Add (halved, quarter)
            c1 = Conv <strides = [2, 2], pads = [1, 1, 1, 1]> (prepared, conv1_weight)
            b1 = {norm("bn1", "c1")}
            [PRelu_3] p1 = PRelu (b1, prelu_weight)
            c2 = Conv <pads = [1, 1, 1, 1], group = 2> (p1, conv2_weight, conv2_bias)
            b2 = {norm("bn2", "c2")}
            map = Add (p1, b2)
            shape = Shape (image)
            first = Constant <value_int = 0> ()
            batch = Gather (shape, first)
            batch_vector = Unsqueeze (batch, axis)
            flat_shape = Concat <axis = 0> (batch_vector, minus)
            flat = Reshape (map, flat_shape)
            row = Gemm <transB = 1> (flat, fc_weight, fc_bias)
            embedding = {norm("bn3", "row")}
        """
        return model_of(nodes, "float[1, 3, 8, 8] image", "float[1, 5] embedding", arrays)


@pytest.fixture
def twin() -> Twin:
    return Twin()


@pytest.fixture
def graph(twin: Twin, tmp_path: Path) -> TorchGraph:
    return TorchGraph(read_graph(saved(tmp_path, twin.onnx())))


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


def test_what_the_given_values_do_not_lead_to_is_refused(graph: TorchGraph) -> None:
    with pytest.raises(TeacherError, match="cannot compute embedding from b2: it needs image as well"):
        graph.behind("b2", torch.zeros(1, 4, 4, 4))
    with pytest.raises(TeacherError, match="it needs elsewhere as well"):
        graph.run({"image": images(1, 8)}, ["elsewhere"])


def test_images_of_another_size_are_refused_by_node(graph: TorchGraph) -> None:
    with pytest.raises(TeacherError, match=r"'Gemm_\d+' cannot be run on \(2, 100\), \(5, 64\)"):
        graph.eval()(images(2, 10))


@pytest.mark.parametrize(("missing", "said"), [(3, "'PRelu_3' takes 'b1'"), (-1, "returns its output 'embedding'")])
def test_damaged_graphs_are_refused(graph: TorchGraph, missing: int, said: str) -> None:
    model = onnx.load_model_from_string(graph.graph.model)
    del model.graph.node[missing]
    with pytest.raises(TeacherError, match=said):
        TorchGraph(OnnxGraph(**{**vars(graph.graph), "model": model.SerializeToString()}))


def test_constants_given_as_numbers_and_as_text() -> None:
    def graph(factor: str) -> OnnxGraph:
        nodes = f"""
            shape = Constant <value_ints = [0, -1]> () factor = Constant <{factor}> ()
            flat = Reshape (image, shape) embedding = Mul (flat, factor)
        """
        model = model_of(nodes, "float[N, 3, 2, 2] image", "float embedding", {})
        return OnnxGraph(model.SerializeToString(), "image", "embedding", None, None, 0, "")

    assert torch.equal(TorchGraph(graph("value_float = 2.5"))(images(2, 2)), images(2, 2).flatten(1) * 2.5)
    with pytest.raises(TeacherError, match="'factor' is neither a tensor nor numbers"):
        TorchGraph(graph('value_string = "two"'))


def test_half_precision_weights_compute_in_float32_and_go_back_to_half(tmp_path: Path) -> None:
    matrix = np.linspace(-1, 1, 24).reshape(12, 2).astype(np.float16)
    nodes = """
        flat = Flatten (image) half = Cast <to = 10> (flat)
        product = MatMul (half, matrix) embedding = Cast <to = 1> (product)
    """
    model = model_of(nodes, "float[N, 3, 2, 2] image", "float[N, 2] embedding", {"matrix": matrix})
    half = TorchGraph(read_graph(saved(tmp_path, model)))
    torch.testing.assert_close(half(images(3, 2)), images(3, 2).flatten(1) @ torch.from_numpy(matrix).float())
    (again,) = onnx.load_model_from_string(half.serialised()).graph.initializer
    assert again.data_type == TensorProto.FLOAT16
    assert np.array_equal(numpy_helper.to_array(again), matrix)
