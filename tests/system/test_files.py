"""Files that are old or new: whatever raises, kills or fills the disk in between."""

import errno
import os
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest

from arcface_kd.system import files
from arcface_kd.system.files import atomic_write, lock_file


def test_the_file_appears_when_the_block_ends(tmp_path: Path) -> None:
    file = tmp_path / "file"
    with atomic_write(file) as stream:
        stream.write(b"new")
        assert not file.exists()
    assert file.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]


def test_what_raises_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"old")
    with pytest.raises(TypeError), atomic_write(file) as stream:
        stream.write(b"new" * 100_000 + "text")  # type: ignore[operator]
    assert file.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_it_is_readable_as_any_other_file(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        with atomic_write(tmp_path / "file") as stream:
            stream.write(b"x")
        assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o644
    finally:
        os.umask(before)


def test_a_link_is_replaced_and_what_it_names_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(b"theirs")
    (tmp_path / "file").symlink_to(tmp_path / "elsewhere")
    with atomic_write(tmp_path / "file") as stream:
        stream.write(b"ours")
    assert (tmp_path / "elsewhere").read_bytes() == b"theirs"
    assert not (tmp_path / "file").is_symlink()


_KILLED = """
import os, signal, sys
from arcface_kd.system import files
from arcface_kd.system.files import atomic_write, lock_file
with atomic_write(sys.argv[1]) as stream:
    stream.write(b"half of it")
    stream.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_remains_of_a_killed_writer_are_taken_away_by_the_next(tmp_path: Path) -> None:
    file = tmp_path / "fi[l]e"
    file.write_bytes(b"old")
    other = tmp_path / ".other.12345678.part"
    other.write_bytes(b"not ours")
    killed = subprocess.run([sys.executable, "-c", _KILLED, str(file)])
    assert killed.returncode == -signal.SIGKILL
    assert file.read_bytes() == b"old"
    assert len(os.listdir(tmp_path)) == 3
    with atomic_write(file) as stream:
        stream.write(b"new")
    assert sorted(os.listdir(tmp_path)) == sorted([file.name, other.name])


def test_a_writer_that_is_at_work_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "file"
    with atomic_write(file) as first:
        first.write(b"first")
        with atomic_write(file) as second:
            second.write(b"second")
        assert file.read_bytes() == b"second"
    assert file.read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["file"]


def test_nobody_takes_a_whole_file_before_it_is_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, whole = tmp_path / "file", files.replace_file

    def after_another(source: Path, target: Path) -> None:
        monkeypatch.setattr(files, "replace_file", whole)
        with atomic_write(file) as stream:
            stream.write(b"another's")
        whole(source, target)

    monkeypatch.setattr(files, "replace_file", after_another)
    with atomic_write(file) as stream:
        stream.write(b"ours")
    assert file.read_bytes() == b"ours"
    assert os.listdir(tmp_path) == ["file"]


def test_a_new_file_that_another_takes_for_a_remain_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, begun = tempfile.mkstemp, threading.Event()
    takers: list[threading.Thread] = []

    def taken(**where: Any) -> tuple[int, str]:
        descriptor, name = make(**where)
        if not takers:
            other = os.open(name, os.O_RDWR)
            assert lock_file(other, wait=False)

            def take() -> None:
                # Whoever does not wait for the lock has begun to write by then.
                begun.wait(0.2)
                os.unlink(name)
                os.close(other)

            takers.append(threading.Thread(target=take))
            takers[0].start()
        return descriptor, name

    monkeypatch.setattr(tempfile, "mkstemp", taken)
    with atomic_write(tmp_path / "file") as stream:
        begun.set()
        takers[0].join()
        stream.write(b"x")
    assert os.listdir(tmp_path) == ["file"]


def test_a_system_without_locks_writes_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fcntl", None)
    (tmp_path / ".file.00000000.part").write_bytes(b"perhaps somebody's")
    with atomic_write(tmp_path / "file") as stream:
        stream.write(b"x")
    assert len(os.listdir(tmp_path)) == 2


def test_errors_name_the_file_that_was_asked_for(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught, atomic_write(tmp_path / "nowhere" / "file"):
        pass
    assert caught.value.filename == str(tmp_path / "nowhere" / "file")
    with pytest.raises(OSError, match=r"No space left on device: '.*/file'"), atomic_write(tmp_path / "file"):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(FileNotFoundError, match="'other'"), atomic_write(tmp_path / "file"):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "other")
    assert os.listdir(tmp_path) == []
