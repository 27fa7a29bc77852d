"""Parameters and multiply-adds against sums by hand and published ones; speed against a model of known slowness."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from arcface_kd.backbones import get_backbone
from arcface_kd.evaluation.report.cost import costs, images_per_second, latency, multiply_adds, size_line
from arcface_kd.teachers.base import load_teacher
from tests.teachers.onnx_models import face_network, model_of


class Layers(nn.Module):
    """A convolution, a depthwise one and a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.fc = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.fc(self.depthwise(torch.relu(self.wide(images))).mean((2, 3)))
        return out


def test_multiply_adds_by_hand() -> None:
    model = Layers().eval()
    assert multiply_adds(model, size=32) == 16 * 16 * (8 * 3 * 9 + 8 * 9) + 8 * 5
    assert costs({"layers": model})["layers"].parameters == 8 * 3 * 9 + 8 * 9 + 8 * 5 + 5


def test_a_size_is_told_in_words_and_the_mode_kept() -> None:
    model = Layers()
    assert size_line(model, size=32) == "0.00 M parameters, 0 M multiply-adds an image"
    assert model.training
    network = get_backbone("mbf", fp16=True)
    assert size_line(network) == "2.06 M parameters, 438 M multiply-adds an image"
    assert network.fp16
    assert size_line(nn.Linear(2_000_000, 1)) == "2.00 M parameters"


class Sleeper(nn.Module):
    """Takes a millisecond an image, outside torch."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        self.calls.append(len(images))
        time.sleep(1e-3 * len(images))
        return images.new_zeros(len(images), 4)


def test_speed_is_that_of_whole_batches_in_turns() -> None:
    first, other = Sleeper(), Sleeper()
    other.calls = first.calls
    found = images_per_second({"first": first, "other": other}, 8, batch_size=20, rounds=3)
    assert all(0 < speed <= 1000 for speed in found.values())
    assert first.calls == [1, 1, *[20] * 6]


def test_the_fastest_pass_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.4, 1.0, 1.1, 2.0, 2.3])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    assert images_per_second({"a": Layers().eval()}, 8, batch_size=20, rounds=3)["a"] == pytest.approx(200)


def test_a_slow_model_is_timed_once() -> None:
    slow, quick = Sleeper(), Layers().eval()
    images_per_second({"slow": slow, "quick": quick}, 8, batch_size=20, rounds=50, seconds=1e-3)
    assert slow.calls == [1, 20]


def test_latency_is_that_of_single_images() -> None:
    model = Sleeper()
    met = latency(model, None, 8, seconds=0)
    assert met is not None
    assert 1 <= met.p50 <= met.p95
    assert model.calls == [1] * 21


def test_an_onnx_file_is_timed_by_onnxruntime(tmp_path: Path) -> None:
    path = tmp_path / "student.onnx"
    path.write_bytes(face_network().SerializeToString())
    model = Sleeper()
    found = costs({"exported": model}, files={"exported": path})["exported"]
    assert found.latency is not None
    assert model.calls.count(1) <= 2, "only for what torch counts"
    assert found.file_bytes == path.stat().st_size
    path.write_bytes(b"no graph")
    assert latency(model, path) is None
    path.write_bytes(face_network(batch=4).SerializeToString())
    assert latency(model, path) is None, "of four images at once"


def test_a_teacher_s_file_is_timed_at_the_size_that_it_takes(tmp_path: Path) -> None:
    """The file leaves its size open; the network behind takes one."""
    path = tmp_path / "large.onnx"
    path.write_bytes(
        model_of(
            "row = Flatten (image) embedding = MatMul (row, matrix)",
            "float[N, 3, H, W] image",
            "float[N, 4] embedding",
            {"matrix": np.ones((3 * 16 * 16, 4), np.float32)},
        ).SerializeToString()
    )
    teacher = load_teacher(path, {"size": 16})
    assert costs({"large": teacher}, files={"large": path})["large"].latency is not None


def test_what_torch_does_not_see_is_unknown() -> None:
    assert multiply_adds(Sleeper(), 8) is None
    found = costs({"told": Sleeper(), "other": Sleeper()}, parameters={"told": 7, "other": None})
    assert {name: (one.parameters, one.multiply_adds) for name, one in found.items()} == {
        "told": (7, None),
        "other": (None, None),
    }
