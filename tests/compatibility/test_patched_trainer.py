"""A trainer that commit a44a264 has patched trains as it did, and today's command takes it back.

Needs ARCFACE_TORCH. The trainer is rebuilt from the lines that were added and their places.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.compatibility.runs import BATCH, CLASSES, DIMENSION, IMAGES, command
from tests.compatibility.same_losses import losses_of, write_config

pytestmark = pytest.mark.trainer

# Two of our patches make the trainer run here; the third is the flag. Both ways of using it are tried.
PATCHES = ("current_stack", "cpu_gloo", "kd_flag")
HOST_KEYS: dict[str, Any] = {
    **{"rec": "records", "num_classes": CLASSES, "num_image": CLASSES * IMAGES, "num_epoch": 1, "warmup_epoch": 0},
    **{"val_targets": [], "network": "mbf", "embedding_size": DIMENSION, "margin_list": (1.0, 0.3, 0.0), "lr": 0.001},
    **{"batch_size": BATCH, "frequent": 1, "verbose": 10**6, "num_workers": 0, "save_all_states": True, "fp16": False},
    "output": "work_dirs/old",
}


def train_in_host(host: Path, config: str | None = None) -> Mapping[int, float]:
    """Train in a patched trainer beside ``records`` and ``teacher.onnx``; its losses.

    The config is one of its own with ``output = "work_dirs/old"``; None trains with AdaDistill by the flag.
    """
    words = [f"configs/{config}"]
    if config is None:
        here = Path.cwd()
        write_config(host / "configs" / "flag.py", {**HOST_KEYS, "rec": str(here / "records")})
        words = ["configs/flag", "--kd", "adadistill", "--kd-teacher", str(here / "teacher.onnx")]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", "train_v2.py", *words]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *launch], cwd=host, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return losses_of(host / "work_dirs" / "old")


@pytest.fixture
def host(arcface_torch: Path, work: Path, recorded: dict[str, Any]) -> Path:
    """A copy of the trainer as that commit has left it."""
    folder = work / "host"
    shutil.copytree(arcface_torch, folder, ignore=shutil.ignore_patterns(".git", "__pycache__"))
    for name, file in recorded["host"]["files"].items():
        path = folder / name
        content = path.read_bytes()
        assert hashlib.sha256(content).hexdigest() == file["sha256"], f"{name} is not the one that was recorded"
        lines = content.decode().splitlines(keepends=True)
        for first, behind, added in file["edits"]:
            lines[first:behind] = added
        path.write_bytes("".join(lines).encode())
    return folder


@pytest.mark.slow
def test_it_trains_with_the_flag_as_it_did(host: Path, recorded: dict[str, Any]) -> None:
    losses = {int(step): loss for step, loss in recorded["host"]["losses"].items()}
    assert len(losses) == 5
    assert train_in_host(host) == pytest.approx(losses, rel=1e-3)


def test_todays_command_takes_it_back(host: Path, arcface_torch: Path, recorded: dict[str, Any]) -> None:
    assert command("patch", str(host), *PATCHES, "--revert") == 0
    for name in recorded["host"]["files"]:
        assert (host / name).read_bytes() == (arcface_torch / name).read_bytes()


def test_todays_command_finds_it_patched(
    host: Path, recorded: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    before = {name: (host / name).read_bytes() for name in recorded["host"]["files"]}
    assert command("patch", str(host), *PATCHES) == 0
    assert capsys.readouterr().out.splitlines() == [f"{name}: already applied, nothing to do" for name in PATCHES]
    assert {name: (host / name).read_bytes() for name in before} == before


@pytest.mark.slow
def test_a_copied_config_trains_in_it(host: Path, work: Path) -> None:
    text = (work / "configs" / "ms1mv2_mbf_adadistill.py").read_text(encoding="utf-8")
    body, call, nothing = text.rpartition("arcface_kd.attach(config)\n")
    assert nothing == ""
    keys = {**HOST_KEYS, "rec": str(work / "records"), "kd_teacher": str(work / "teacher.onnx")}
    (host / "configs" / "copied.py").write_text(f"{body}config.update({keys!r})\n{call}", encoding="utf-8")
    assert len(train_in_host(host, config="copied")) == 5
