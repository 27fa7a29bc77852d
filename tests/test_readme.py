"""The README's commands: what they name is there, and those that train and patch are run, at a small size."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from arcface_kd.backbones import get_backbone
from arcface_kd.cli.main import main
from tests.host.trainer.faces import draw_faces

ROOT = Path(__file__).resolve().parent.parent
_TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", _TEXT, re.MULTILINE | re.DOTALL)
_LINES = [line for language, block in BLOCKS if language == "bash" for line in block.splitlines()]
COMMANDS = [shlex.split(line) for line in _LINES if line]


def test_the_readme_names_its_two_commands_first() -> None:
    assert [command for command in COMMANDS if command[0] == "make"][:2] == [["make", "demo"], ["make", "test"]]


@pytest.mark.parametrize("target", [command[1] for command in COMMANDS if command[0] == "make"])
def test_make_knows_the_target(target: str) -> None:
    finished = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr


@pytest.mark.parametrize("file", [command[1] for command in COMMANDS if command[0] == "cp"])
def test_a_file_that_is_copied_is_there(file: str) -> None:
    assert (ROOT / file).is_file()


def _small(folder: Path) -> list[str]:
    """Settings that make a command of the README take seconds."""
    (folder / "faces").mkdir()
    faces = draw_faces(folder / "faces", identities=4, images=4)
    torch.manual_seed(0)
    torch.save(get_backbone("thin_r18", num_features=16).state_dict(), folder / "r50.pt")
    return [
        *("network=thin_r18", "embedding_size=16", f"rec={faces.folder}", f"num_classes={faces.num_classes}"),
        *(f"num_image={faces.num_image}", "num_epoch=1", "batch_size=8", "num_workers=0", f"output={folder / 'run'}"),
    ]


@pytest.mark.parametrize("command", [c for c in COMMANDS if c[:2] == ["arcface-kd", "train"]], ids=" ".join)
def test_a_train_command_runs(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = _small(tmp_path)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    assert main([*command[1:], "--set", *settings]) == 0
    assert (tmp_path / "run" / "model.pt").is_file()


@pytest.mark.trainer
@pytest.mark.slow
def test_the_patch_command_runs_on_the_host(arcface_torch: Path, tmp_path: Path) -> None:
    checkout = tmp_path / "arcface_torch"
    shutil.copytree(arcface_torch, checkout)
    patch = next(c for c in COMMANDS if c[:2] == ["arcface-kd", "patch"])
    assert main([str(checkout) if "PATH/TO" in word else word for word in patch[1:]]) == 0
    assert "--kd" in (checkout / "train_v2.py").read_text() or "add_arguments" in (checkout / "train_v2.py").read_text()
    assert os.environ["ARCFACE_TORCH"]
