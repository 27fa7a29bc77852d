"""Runs read back from their files."""

import os
import re
import struct
from pathlib import Path

import pytest
import torch
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

from arcface_kd.backbones import get_backbone
from arcface_kd.errors import ConfigError, DataError, TeacherError
from arcface_kd.evaluation.report.run_folder import read_run
from arcface_kd.teachers.checkpoint import NetworkCheckpoint
from tests.evaluation.runs import DIMENSION, NETWORK, write_run

SCALARS = {
    "loss": [9.0, 8.0, 7.0],
    "kd/ce": [5.0, 4.0, 3.0],
    "kd/pull": [4.0, 4.0, 4.0],
    "kd/gradient_norm/ce": [1.0, 1.0, 1.0],
    "kd/gradient_norm/pull": [1.0, 1.0, 1.0],
    "kd/alpha_mean": [0.1, 0.2, 0.3],
}


def test_settings_curves_and_speed(tmp_path: Path) -> None:
    keys = {"kd": "adadistill", "rec": "/train tmp/faces", "val_targets": ["lfw"], "interclass_filtering_threshold": 0}
    run = read_run(write_run(tmp_path / "run", keys, SCALARS))
    assert run.name == "run"
    assert run.method == "adadistill"
    assert run.settings["rec"] == "/train tmp/faces"
    assert run.settings["val_targets"] == "['lfw']"
    assert run.training_speed == 123.4
    assert {name: curve.y.tolist() for name, curve in run.loss_terms().items()} == {
        "ce": [5.0, 4.0, 3.0],
        "pull": [4.0, 4.0, 4.0],
    }
    assert list(run.family("kd/alpha_")) == ["mean"]
    with (tmp_path / "run" / "training.log").open("ab") as log:
        log.write(b"Speed . samples/sec\nSpeed 1.2.3 samples/sec\n\xff\0\xfe\n")
        log.write(f"Training: 2026-01-03 03:04:05,678-: {'kd'.ljust(25)}rkd\n".encode())
    resumed = read_run(tmp_path / "run")
    assert (resumed.method, resumed.training_speed) == ("rkd", 123.4)


@pytest.mark.parametrize("kd", [None, {"kd": ""}, {"kd": None}])
def test_a_run_without_a_method_is_alone(tmp_path: Path, kd: dict[str, str] | None) -> None:
    run = read_run(write_run(tmp_path / "run", kd or {}, {"loss": [1.0]}))
    assert run.method == "alone"
    assert list(run.loss_terms()) == ["loss"]


def test_nothing_but_the_model_is_needed(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", {})
    (folder / "training.log").unlink()
    run = read_run(folder, "mine")
    assert (run.name, run.settings, run.curves, run.training_speed) == ("mine", {}, {}, None)
    assert run.loss_terms() == {}
    assert isinstance(run.load(), torch.nn.Module)
    assert (run.method, run.network) == ("-", NETWORK), "nobody knows the method; the tensors tell the network"


@pytest.mark.parametrize("fp16", [False, True])
def test_the_student_is_as_it_was_saved(tmp_path: Path, fp16: bool) -> None:
    run = read_run(write_run(tmp_path / "run", {"fp16": fp16}, seed=3))
    torch.manual_seed(3)
    wanted = get_backbone(NETWORK, num_features=DIMENSION).eval()
    images = torch.rand(2, 3, 112, 112) * 2 - 1
    student = run.load()
    assert not student.training
    assert run.half == fp16
    with torch.no_grad():
        torch.testing.assert_close(student(images), wanted(images), rtol=0.1 if fp16 else 1e-4, atol=0.05)


@pytest.mark.parametrize(
    ("length", "content", "reason"),
    [(1 << 60, b"", r"MemoryError|cannot fit|length|size"), (20, b"\xff" * 20, "protobuf|parsing|Wire")],
    ids=["a record without end", "no message"],
)
def test_damaged_curves_are_refused_by_the_name_of_their_file(
    tmp_path: Path, length: int, content: bytes, reason: str
) -> None:
    """Both checksums are right: what damages a file on purpose sees to that."""
    folder = write_run(tmp_path / "run", {}, SCALARS)
    (events,) = (folder / "tensorboard").glob("events.out.tfevents.*")
    head = struct.pack("<Q", length)
    with events.open("ab") as stream:
        stream.write(
            head + struct.pack("<I", masked_crc32c(head)) + content + struct.pack("<I", masked_crc32c(content))
        )
    with pytest.raises(DataError, match=rf"{re.escape(str(events))} is damaged \(.*({reason})") as caught:
        read_run(folder)
    assert "\n" not in str(caught.value)
    events.unlink()
    os.mkfifo(events)
    with pytest.raises(DataError, match="is no regular file; remove it"):
        read_run(folder)


def test_what_is_no_run_or_no_network_of_ours_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none is no folder"):
        read_run(tmp_path / "none")
    with pytest.raises(DataError, match=r"holds no model.pt"):
        read_run(tmp_path)
    with pytest.raises(ConfigError, match=r"'r2060' .* mbf"):
        read_run(write_run(tmp_path / "theirs", {"network": "r2060"})).load()
    folder = write_run(tmp_path / "run", {})
    content = (folder / "model.pt").read_bytes()
    (folder / "model.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(TeacherError, match=r"model\.pt"):
        read_run(folder).load()


def test_the_host_s_vits_are_loaded_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str | None] = []

    def load(path: Path, name: str | None, *, fp16: bool) -> NetworkCheckpoint:
        asked.append(name)
        return NetworkCheckpoint(get_backbone(NETWORK, num_features=DIMENSION), "vit_t", DIMENSION, "")

    monkeypatch.setattr("arcface_kd.evaluation.report.run_folder.load_network", load)
    run = read_run(write_run(tmp_path / "run", {"network": "vit_t_dp005_mask0"}))
    assert not run.load().training
    assert (run.network, asked) == ("vit_t_dp005_mask0", ["vit_t_dp005_mask0"])
