"""A full disk and a folder that cannot be written: one line, and what was there before is untouched."""

import importlib
import os
import resource
import signal
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from arcface_kd.checkpoints.tensor_file import archive_fault
from arcface_kd.cli import main as cli
from tests.data.record_sets import encoded
from tests.forked import start, wait
from tests.host.trainer.faces import Faces

PATIENCE = 300.0
_ROOM = 60 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk of its own, in memory."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={_ROOM}", "tmpfs", str(place)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("only root, where mounting is allowed, can make a small disk")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def write_config(faces: Faces, file: Path, **more: Any) -> Path:
    keys: dict[str, Any] = {
        **{"network": "thin_r18", "rec": str(faces.folder), "num_classes": 4, "num_image": 16, "num_epoch": 1},
        **{"warmup_epoch": 0, "val_targets": [], "embedding_size": 16, "batch_size": 8, "num_workers": 0},
        **{"save_all_states": True, **more},
    }
    file.write_text(f"from easydict import EasyDict\nconfig = EasyDict({keys!r})\n")
    return file


def command(words: list[str], limit: int | None = None, user: int | None = None) -> int:
    """A command in a process whose files cannot grow beyond a limit, or of another user."""
    if limit is not None:
        # A file at its limit is an error, and no signal.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if user is not None:
        # What torch imports late lies where this user may not look.
        importlib.import_module("torch._dynamo")
        os.setgid(user)
        os.setuid(user)
    return cli.main(words)


def run(words: list[str], log: Path, *limits: int | None) -> tuple[int | None, str]:
    """Run a command; its exit code and what it printed to stderr and stdout, without the log of the run."""
    log.unlink(missing_ok=True)
    (code,) = wait([start(command, words, *limits, log=log)], PATIENCE)
    lines = [line for line in log.read_text().splitlines() if not line.startswith("Training: ")]
    return code, "\n".join(lines)


def fill(disk: Path, leave: int) -> None:
    """Leave so many bytes free."""
    there = os.statvfs(disk)
    with open(disk / "filler", "wb") as stream:
        os.posix_fallocate(stream.fileno(), 0, there.f_bavail * there.f_frsize - leave)


def everything_in(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "tfevents" not in path.name and path.name != "training.log"
    }


@pytest.mark.slow
@pytest.mark.parametrize("leave", [1 << 20, 0], ids=["a megabyte", "not even the log"])
def test_training_ends_and_the_checkpoint_before_is_good(faces: Faces, disk: Path, tmp_path: Path, leave: int) -> None:
    config = write_config(faces, tmp_path / "small.py", output=str(disk / "run"), frequent=1)
    resume = ["train", str(config), "--set", "resume=True", "num_epoch=2"]
    assert run(["train", str(config)], tmp_path / "log")[0] == 0
    before = everything_in(disk)
    assert {"run/model.pt", "run/checkpoint_gpu_0.pt"} == before.keys()
    fill(disk, leave)
    code, said = run(resume, tmp_path / "log")
    assert code == 2, said
    assert said.splitlines()[-1].startswith("arcface-kd: ")
    assert "No space left on device" in said.splitlines()[-1]
    assert not leave or f"{disk}/run/model.pt" in said
    (disk / "filler").unlink()
    assert everything_in(disk) == before
    # With room again, it goes on.
    assert run(resume, tmp_path / "log")[0] == 0
    assert archive_fault(disk / "run" / "checkpoint_gpu_0.pt") is None


@pytest.mark.slow
@pytest.mark.parametrize("what", ["train", "pack", "merge-head", "cache"])
def test_a_disk_that_is_mounted_for_reading(faces: Faces, teacher: Path, disk: Path, tmp_path: Path, what: str) -> None:
    config = write_config(faces, tmp_path / "small.py", output=str(disk / "run"))
    images = tmp_path / "images" / "someone"
    images.mkdir(parents=True)
    words = {
        "train": ["train", str(config)],
        "pack": ["data", "pack", str(images.parent), str(disk / "packed")],
        "merge-head": ["merge-head", str(tmp_path / "run"), str(disk / "head.pt")],
        "cache": ["cache", str(config), "--kd-teacher", str(teacher), "--out", str(disk / "rows")],
    }[what]
    if what == "merge-head":
        other = write_config(faces, tmp_path / "other.py", output=str(tmp_path / "run"))
        assert run(["train", str(other)], tmp_path / "log")[0] == 0
    if what == "pack":
        (images / "1.jpg").write_bytes(encoded(1))
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    code, said = run(words, tmp_path / "log")
    assert code == 2, said
    assert said.count("\n") == 0
    assert said.startswith("arcface-kd: ")
    assert "Read-only file system" in said
    assert str(disk) in said


@pytest.mark.slow
def test_a_folder_that_this_user_may_not_write(faces: Faces, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    for path in [*tmp_path.parents, *faces.folder.parents]:
        if path.stat().st_uid == os.geteuid() and str(path).startswith("/tmp/"):
            path.chmod(path.stat().st_mode | stat.S_IXOTH | stat.S_IROTH)
    tmp_path.chmod(0o755)
    faces.folder.chmod(0o755)
    config = write_config(faces, tmp_path / "small.py", output=str(tmp_path / "theirs" / "run"))
    (tmp_path / "theirs").mkdir(mode=0o755)
    code, said = run(["train", str(config)], tmp_path / "log", None, 65534)
    assert code == 2, said
    folder = tmp_path / "theirs" / "run"
    assert said == f"arcface-kd: the folder output={str(folder)!r} cannot be made: Permission denied; name another"


@pytest.mark.slow
def test_a_file_that_may_not_grow(faces: Faces, tmp_path: Path) -> None:
    """A quota, where nobody can mount a disk."""
    config = write_config(faces, tmp_path / "small.py", output=str(tmp_path / "run"))
    assert run(["train", str(config)], tmp_path / "log")[0] == 0
    before = everything_in(tmp_path / "run")
    code, said = run(["train", str(config), "--set", "resume=True", "num_epoch=2"], tmp_path / "log", 1 << 20)
    assert code == 2, said
    assert said.startswith(f"arcface-kd: cannot write {tmp_path}/run/model.pt: File too large")
    assert everything_in(tmp_path / "run") == before
