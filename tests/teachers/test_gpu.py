"""Teachers on a make-believe GPU: they follow their images, and no step waits for the device or mixes the two."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from arcface_kd.backbones import get_backbone
from arcface_kd.errors import TeacherError
from arcface_kd.teachers import Teacher, load_teacher
from arcface_kd.teachers.onnx.torch_module import TorchGraph
from tests.make_believe_gpu import make_believe_gpu, on_device
from tests.teachers.mxnet_files import write_checkpoint
from tests.teachers.onnx_models import face_network, saved

IMAGES = torch.rand(4, 3, 112, 112, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(autouse=True)
def _beside_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def _onnx_with_everything_that_is_read() -> Any:
    """Swapped channels, computed bounds, padding by a number, a mask, a long index, a factor made of a shape."""
    before = """
        g = Gather <axis = 1> (image, backwards) s = Slice (g, minus, end, one, minus) lowest = Squeeze (low, zero)
        c = Clip (s, lowest, high) prepared = Pad (c, pads, filling)
    """
    behind = """
        shape = Shape (raw) size = Gather (shape, width) length = Cast <to = 1> (size) root = Sqrt (length)
        d = Div (raw, root) w = Where (mask, d, raw) embedding = Gather <axis = 1> (w, places)
    """
    whole = {"backwards": [2, 1, 0], "minus": [-1], "end": [-9], "one": [1], "zero": [0], "pads": [0] * 8, "width": 1}
    real = {"low": [-2], "high": 2, "filling": 0.5}
    arrays: dict[str, np.ndarray] = {
        **{name: np.array(value, np.int64) for name, value in whole.items()},
        **{name: np.array(value, np.float32) for name, value in real.items()},
        "mask": np.arange(16) % 3 > 0,
        "places": np.arange(16)[::-1].copy(),
    }
    return face_network(batch=None, tail="flatten", before=before, behind=behind, more=arrays)


def onnx_teacher(folder: Path) -> Teacher:
    options = {"mean": "123.675,116.28,103.53", "std": "58.395,57.12,57.375"}
    teacher = load_teacher(saved(folder, _onnx_with_everything_that_is_read()), options)
    assert isinstance(teacher.network, TorchGraph)
    return teacher


def mxnet_teacher(folder: Path) -> Teacher:
    return load_teacher(write_checkpoint(folder), {"channels": "bgr"})


def checkpoint_teacher(folder: Path) -> Teacher:
    torch.save(get_backbone("thin_r10", num_features=16).eval().state_dict(), folder / "model.pt")
    return load_teacher(folder / "model.pt", {"mean": [120, 110, 100]})


@pytest.mark.parametrize("load", [onnx_teacher, mxnet_teacher, checkpoint_teacher])
def test_a_step_neither_waits_nor_mixes(load: Callable[[Path], Teacher], tmp_path: Path) -> None:
    teacher = load(tmp_path)
    assert teacher.precision == "fp16"
    wanted = teacher(IMAGES)
    with make_believe_gpu() as record:
        images = IMAGES.to("cuda")
        teacher(images)
        record.clear()
        embeddings = teacher(images)
        assert on_device(embeddings)
        assert record.launches
        assert (dict(record.syncs), dict(record.mixes)) == ({}, {})
        met = embeddings.cpu()
    torch.testing.assert_close(met, wanted, rtol=1e-3, atol=1e-3)


def test_a_graph_that_torch_cannot_run_is_run_on_the_host_and_said_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = face_network(batch=None, tail="flatten", behind="embedding = Softsign (raw)")
    teacher = load_teacher(saved(tmp_path, model))
    wanted = teacher(IMAGES)
    with make_believe_gpu(), caplog.at_level(logging.WARNING):
        embeddings = teacher(IMAGES.to("cuda"))
        assert on_device(embeddings)
        met = embeddings.cpu()
    torch.testing.assert_close(met, wanted)
    assert "runs on the CPU, to which each batch is copied" in caplog.text


class Fickle(nn.Module):
    """Embeds otherwise on a GPU, as a network does whose numbers are too large for fp16."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(48, 16, generator=torch.Generator().manual_seed(0)))

    def forward(self, images: Tensor) -> Tensor:
        embeddings = nn.functional.adaptive_avg_pool2d(images, 4).flatten(1) @ self.matrix
        return embeddings.flip(1) if on_device(embeddings) else embeddings


def test_a_gpu_that_embeds_otherwise_ends_the_run_before_its_first_step() -> None:
    teacher = load_teacher(Fickle(), {"size": 8, "precision": "fp16"})
    with make_believe_gpu(), pytest.raises(TeacherError, match=r"in fp16 otherwise.*teacher\.precision=fp32"):
        teacher(torch.zeros(2, 3, 8, 8, device="cuda"))


def test_a_module_of_the_users_own_stays_in_full_precision() -> None:
    assert load_teacher(Fickle(), {"size": 8}).precision == "fp32"
