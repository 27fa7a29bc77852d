import sys
import warnings
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from arcface_kd.errors import ConfigError, TeacherError
from arcface_kd.teachers import Preprocessing, load_teacher


def network(seed: int = 0, size: int = 8) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, size), nn.BatchNorm1d(size))


def images() -> Tensor:
    return torch.rand((3, 3, 112, 112), generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_a_module_is_a_teacher_with_the_students_view() -> None:
    module = network()
    teacher = load_teacher(module)
    assert teacher.network is module
    assert not module.training
    assert teacher.preprocessing == Preprocessing()
    assert teacher.embedding_size == 8
    assert teacher.description == "torch.nn.modules.container.Sequential"
    with torch.no_grad():
        assert torch.equal(teacher(images()), module(images()))


def test_options_apply_to_a_module() -> None:
    module = network()
    teacher = load_teacher(module, {"channels": "bgr", "mean": 0, "std": 255, "size": 32, "precision": "bf16"})
    assert teacher.preprocessing == Preprocessing("bgr", (0.0,) * 3, (255.0,) * 3, 32)
    assert teacher.precision == "bf16"
    with pytest.raises(TeacherError, match="dimension 8, wanted 512"):
        load_teacher(module, {"embedding_size": 512})
    with pytest.raises(ConfigError, match=r"teacher\.network='r50'"):
        load_teacher(module, {"network": "r50"})


def test_a_modules_fingerprint_follows_its_weights() -> None:
    assert load_teacher(network(0)).fingerprint == load_teacher(network(0)).fingerprint
    assert load_teacher(network(0)).fingerprint != load_teacher(network(1)).fingerprint
    pools = [nn.Sequential(pool(2), nn.Flatten()) for pool in (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)]
    assert load_teacher(pools[0]).fingerprint != load_teacher(pools[1]).fingerprint


def test_a_callable_is_a_teacher() -> None:
    def embed(batch: Tensor) -> Tensor:
        return batch.mean((2, 3))

    teacher = load_teacher(embed)
    assert teacher.embedding_size == 3
    assert teacher.parameter_count is None
    assert teacher.description.endswith("embed")
    torch.testing.assert_close(teacher(images()), images().mean((2, 3)))


def test_a_callables_fingerprint_follows_its_answers_or_is_its_own() -> None:
    def scaled(weights: Tensor) -> Any:
        return lambda batch: batch.mean((2, 3)) * weights

    one = load_teacher(scaled(torch.tensor([1.0, 2.0, 3.0]))).fingerprint
    assert one == load_teacher(scaled(torch.tensor([1.0, 2.0, 3.0]))).fingerprint
    assert one != load_teacher(scaled(torch.tensor([3.0, 2.0, 1.0]))).fingerprint

    class Named:
        fingerprint = "mine"

        def __call__(self, batch: Tensor) -> Tensor:
            return batch.mean((2, 3)) + torch.rand(3)

    assert load_teacher(Named()).fingerprint == load_teacher(Named()).fingerprint


def test_a_teacher_is_returned_as_it_is() -> None:
    teacher = load_teacher(network())
    assert load_teacher(teacher) is teacher
    with pytest.raises(TeacherError, match="is a teacher already"):
        load_teacher(teacher, {"channels": "bgr"})


def test_a_network_that_fails_ends_in_one_line() -> None:
    def broken(batch: Tensor) -> Tensor:
        raise KeyError("first\nsecond")

    for bad in (broken, nn.Linear(5, 5), lambda batch: None):
        with pytest.raises(TeacherError) as caught:
            load_teacher(bad)
        assert "\n" not in str(caught.value)


def test_a_missing_timm_names_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(TeacherError, match="pip install timm"):
        load_teacher("timm:resnet18")


class FakeTimm(ModuleType):
    """timm's few functions that are called, with one model."""

    def __init__(self) -> None:
        super().__init__("timm")
        self.asked: list[tuple[str, dict[str, object]]] = []
        self.data = SimpleNamespace(
            resolve_model_data_config=lambda model: {
                "input_size": (3, 96, 96),
                "mean": (0.485, 0.456, 0.406),
                "std": (0.229, 0.224, 0.225),
            }
        )

    def is_model_pretrained(self, name: str) -> bool:
        return name in ("small", "offline")

    def create_model(self, name: str, **options: object) -> nn.Module:
        self.asked.append((name, options))
        if name == "offline":
            raise OSError("no route\nto host")
        return network() if options.get("num_classes") == 0 else HubModel(int(name.rpartition("_")[2]))


class HubModel(nn.Module):
    """Features of 8 numbers, and a last layer that makes another number of them."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.features = network()
        self.head: nn.Module = nn.Linear(8, num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        assert num_classes == 0
        self.head = nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        embeddings: Tensor = self.head(self.features(images))
        return embeddings


def test_a_timm_model_comes_with_its_weights_and_its_own_preprocessing(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = FakeTimm()
    monkeypatch.setitem(sys.modules, "timm", timm)
    teacher = load_teacher("timm:small")
    assert timm.asked == [("small", {"pretrained": True, "num_classes": 0})]
    assert teacher.preprocessing.size == 96
    assert teacher.preprocessing.mean == pytest.approx((123.675, 116.28, 103.53))
    assert teacher.preprocessing.std == pytest.approx((58.395, 57.12, 57.375))
    assert teacher.description == "timm:small"
    assert load_teacher("timm:small", {"mean": 0}).preprocessing.mean == (0.0, 0.0, 0.0)


def test_timm_never_makes_a_random_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = FakeTimm()
    monkeypatch.setitem(sys.modules, "timm", timm)
    with pytest.raises(TeacherError, match="no model of that name with published weights"):
        load_teacher("timm:unknown")
    assert timm.asked == []
    with pytest.raises(TeacherError, match="cannot be loaded by timm: no route to host"):
        load_teacher("timm:offline")


def test_a_model_on_the_hub_keeps_its_embedding_layer_and_loses_its_classifier(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = FakeTimm()
    monkeypatch.setitem(sys.modules, "timm", timm)
    for name, size in (("hf-hub:somebody/face_vit_512", 512), ("hf_hub:somebody/imagenet_1000", 8)):
        assert load_teacher(f"timm:{name}").embedding_size == size
        assert timm.asked[-1] == (name, {"pretrained": True})


@pytest.mark.timm
def test_real_timm_refuses_an_unknown_name(timm: ModuleType) -> None:
    with pytest.raises(TeacherError, match="no model of that name with published weights"):
        load_teacher("timm:no_such_model_at_all")


@pytest.mark.timm
def test_real_timm_is_asked_for_what_it_offers(timm: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model
    # The published weights would come over the network.
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **rest: create(name, pretrained=False, **rest))
    teacher = load_teacher("timm:resnet10t")
    assert teacher.embedding_size == 512
    assert teacher.preprocessing.size == 176
    assert teacher.preprocessing.mean == pytest.approx((123.675, 116.28, 103.53))


def test_a_torchscript_module_is_a_teacher_when_its_owner_has_loaded_it() -> None:
    plain = nn.Sequential(nn.Flatten(), nn.Linear(3 * 112 * 112, 4)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        script = torch.jit.trace(plain, torch.zeros(1, 3, 112, 112))
    images = torch.rand(2, 3, 112, 112) * 2 - 1
    torch.testing.assert_close(load_teacher(script)(images), load_teacher(plain)(images))
