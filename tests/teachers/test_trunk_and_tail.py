"""Teachers cut at a feature map: the halves make up the whole, and the tail has the gradient of the network's own."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from arcface_kd.backbones import FaceBackbone, get_backbone
from arcface_kd.errors import TeacherError
from arcface_kd.teachers.base import Teacher, load_teacher
from arcface_kd.teachers.student_init import TrainedGraph, start_from, trained_graph_file
from arcface_kd.teachers.trunk_and_tail import CutTeacher, cut_teacher
from tests.teachers import onnx_models
from tests.teachers.checkpoint_files import saved
from tests.teachers.feature_networks import Around, Iresnet, Plain, Vit, seeded
from tests.teachers.onnx_models import face_network, weights


def images(count: int, size: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def assert_makes_up(cut: CutTeacher, teacher: Teacher, tail: Callable[[Tensor], Tensor]) -> None:
    """Embeddings are the teacher's, and of any map, values and gradient are those of the network's own tail."""
    size = teacher.preprocessing.size
    given = images(4, size, seed=5)
    found = cut.feature_map(given)
    assert found.shape == (4, *cut.map_shape)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    torch.testing.assert_close(cut.tail(found), teacher(given), rtol=1e-4, atol=1e-5)
    other = torch.randn(5, *cut.map_shape, generator=torch.Generator().manual_seed(3)).requires_grad_()
    met, wanted = cut.tail(other), tail(other)
    torch.testing.assert_close(met, wanted, rtol=1e-4, atol=1e-5)
    gradients = [torch.autograd.grad(each.square().sum(), other)[0] for each in (met, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)
    assert gradients[0].abs().max() > 0


@pytest.fixture
def backbone() -> FaceBackbone:
    return seeded(get_backbone("thin_r10", num_features=16), 1)


@pytest.mark.parametrize("how", [{}, {"tap": 1}, {"name": "stages.2"}], ids=str)
def test_a_checkpoint_at_its_last_map_and_at_an_earlier_one(
    how: dict[str, Any], backbone: FaceBackbone, tmp_path: Path
) -> None:
    options = {"channels": "bgr", "mean": 100, "std": 64}
    teacher = load_teacher(saved(tmp_path, backbone.state_dict()), options)
    cut = cut_teacher(teacher, **how)
    last_stage = backbone.get_submodule("stages.3") if how else nn.Identity()
    assert cut.map_shape == ((64, 7, 7) if how else (96, 4, 4))
    assert_makes_up(cut, teacher, lambda feature_map: backbone.tail(last_stage(feature_map)))


@pytest.mark.parametrize("tap", [0, 1, 3])
def test_somebody_s_iresnet(tap: int) -> None:
    network = seeded(Iresnet(), 1)
    teacher = load_teacher(network, {"size": 32})

    def tail(feature_map: Tensor) -> Tensor:
        for number in range(5 - tap, 5):
            feature_map = network.get_submodule(f"layer{number}")(feature_map)
        return network.features(network.fc(network.bn2(feature_map).flatten(1)))

    cut = cut_teacher(teacher, tap=tap)
    assert cut.map_shape == [(8, 2, 2), (6, 4, 4), (6, 8, 8), (4, 16, 16)][tap]
    assert_makes_up(cut, teacher, tail)


def vit_tail(network: Vit, feature_map: Tensor) -> Tensor:
    embeddings: Tensor = network.feature(feature_map.flatten(2).transpose(1, 2).flatten(1))
    return embeddings


@pytest.mark.parametrize("name", [None, "norm"])
def test_a_vit_at_its_head_and_at_a_named_module(name: str | None) -> None:
    """It counts its images: what lies before the named place is run on as many empty images as there are maps."""
    network = seeded(Vit(), 1)
    teacher = load_teacher(network, {"size": 16})
    cut = cut_teacher(teacher, name)
    assert cut.map_shape == (8, 4, 4)
    assert_makes_up(cut, teacher, partial(vit_tail, network))


def test_anybody_s_network_at_a_named_module() -> None:
    network = seeded(Plain(), 1)
    teacher = load_teacher(network, {"size": 16})
    cut = cut_teacher(teacher, "second.0")
    assert cut.place == "the output of 'second.0'"
    assert_makes_up(cut, teacher, lambda each: network.head(network.second[1](each)))
    assert not network.second[0]._forward_hooks


@pytest.fixture
def graph_file(tmp_path: Path) -> Path:
    return onnx_models.saved(tmp_path, face_network())


def graph_tail(feature_map: Tensor) -> Tensor:
    return feature_map.flatten(1) @ torch.from_numpy(weights()["matrix"])


@pytest.mark.parametrize("batch", [1, None])
def test_an_onnx_graph_at_its_last_map(batch: int | None, tmp_path: Path) -> None:
    path = onnx_models.saved(tmp_path, face_network(batch=batch))
    teacher = load_teacher(path, {"channels": "bgr", "mean": 100, "std": 64})
    cut = cut_teacher(teacher)
    assert cut.map_shape == (16, 2, 2)
    assert cut.place == "the tensor 'map2'"
    assert_makes_up(cut, teacher, graph_tail)


@pytest.mark.parametrize("how", [{"tap": 1}, {"name": "active"}])
def test_an_onnx_graph_at_an_earlier_map(how: dict[str, Any], graph_file: Path) -> None:
    cut = cut_teacher(load_teacher(graph_file), **how)
    assert cut.map_shape == (8, 14, 14)
    assert cut.place == "the tensor 'active'"


def test_a_graph_that_torch_runs_is_cut_and_trained_as_one_that_onnxruntime_does(
    graph_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: the weights are there once, and a run may start from them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    teacher = load_teacher(graph_file)
    cut = cut_teacher(teacher)
    assert cut._cut.network is teacher.network
    assert_makes_up(cut, teacher, graph_tail)
    student, _ = start_from(graph_file, None, nn.Identity, 16)
    assert isinstance(student, TrainedGraph)
    assert all(parameter.requires_grad for parameter in student.parameters())
    graph_file.write_bytes(trained_graph_file(teacher, student.state_dict()))
    given = images(2, 112)
    torch.testing.assert_close(load_teacher(graph_file)(given), teacher(given))


@pytest.mark.real
def test_a_real_teacher_at_its_last_map(real_data: Path) -> None:
    file = real_data / "teachers" / "mobilefacenet_512.onnx"
    teacher = load_teacher(file, {"channels": "bgr", "mean": 127, "std": 128})
    cut = cut_teacher(teacher)
    assert cut.map_shape == (512, 7, 7)
    given = images(2, 112)
    torch.testing.assert_close(cut.tail(cut.feature_map(given)), teacher(given), rtol=0, atol=1e-4)


def test_the_tail_is_frozen_in_evaluation_mode_and_follows_its_maps() -> None:
    network = seeded(Iresnet(), 1)
    cut = cut_teacher(load_teacher(network, {"size": 32}))
    network.train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    feature_map = torch.randn(3, 8, 2, 2, requires_grad=True)
    cut.tail(feature_map).sum().backward()
    assert not network.training
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_no_images_and_no_maps() -> None:
    cut = cut_teacher(load_teacher(seeded(Iresnet(), 1), {"size": 32}))
    assert cut.feature_map(images(0, 32)).shape == (0, 8, 2, 2)
    feature_map = torch.zeros(0, 8, 2, 2, requires_grad=True)
    embeddings = cut.tail(feature_map)
    assert embeddings.shape == (0, 5)
    embeddings.sum().backward()


def test_half_precision_is_the_teacher_s_own(backbone: FaceBackbone, tmp_path: Path) -> None:
    teacher = load_teacher(saved(tmp_path, backbone.state_dict()), {"precision": "bf16"})
    feature_map = torch.randn(2, 64, 7, 7)
    met = cut_teacher(teacher, tap=1).tail(feature_map)
    wanted = backbone.tail(backbone.get_submodule("stages.3")(feature_map))
    assert met.dtype == torch.float32
    assert 0 < (met - wanted).abs().max() < 0.05 * wanted.abs().max()
    # The student's autocast does not reach into it.
    cut = cut_teacher(load_teacher(seeded(Iresnet(), 1), {"size": 32}))
    full = cut.tail(torch.ones(1, 8, 2, 2))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(cut.tail(torch.ones(1, 8, 2, 2)), full)


@pytest.mark.parametrize(
    ("make", "name", "said"),
    [
        (lambda: seeded(Plain(), 1), None, "where Plain has its feature map"),
        (lambda: seeded(Plain(), 1), "third", "Plain has no module 'third'"),
        (lambda: seeded(Plain(), 1), "head", r"'head' is no feature map but \(3, 5\)"),
        (lambda: seeded(Around(), 1), "second", "cannot be cut at the output of 'second'"),
        # There is a way around a block of a ViT.
        (lambda: seeded(Vit(), 1), "blocks.0", r"cannot be cut at the output of 'blocks\.0'"),
        (lambda: lambda given: given.flatten(1)[:, :5] + 1, None, "is a function"),
    ],
)
def test_what_cannot_be_cut_is_said(make: Callable[[], Any], name: str | None, said: str) -> None:
    teacher = load_teacher(make(), {"size": 16})
    with pytest.raises(TeacherError, match=said) as error:
        cut_teacher(teacher, name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"name": "nothing"}, "'nothing'.* there are map1 8x14x14, active 8x14x14, map2 16x2x2"),
        ({"name": "row"}, "no feature map 'row'"),
        ({"tap": 2}, "no feature map 2 sizes before its last"),
    ],
)
def test_what_an_onnx_graph_does_not_have_is_said(how: dict[str, Any], said: str, graph_file: Path) -> None:
    with pytest.raises(TeacherError, match=said):
        cut_teacher(load_teacher(graph_file), **how)


def test_a_graph_that_mixes_its_images_is_not_cut(tmp_path: Path) -> None:
    """Batch norm would; here it is a softmax over the batch. onnxruntime embeds image by image."""
    path = onnx_models.saved(tmp_path, face_network(tail="mixing"))
    with pytest.raises(TeacherError, match="cannot be cut at the tensor 'map2'"):
        cut_teacher(load_teacher(path))
