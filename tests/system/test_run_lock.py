"""One run in a folder at a time, and nobody is kept out by one that was killed."""

import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from arcface_kd.errors import ConfigError
from arcface_kd.system.files import run_lock

_HOLD = """
import os, sys, time
from pathlib import Path
from arcface_kd.system.files import run_lock

with run_lock(Path(sys.argv[1])):
    # As loaders do, its child outlives it; from its first line on, it holds nothing of its parent's.
    begun, begins = os.pipe()
    if os.fork() == 0:
        os.write(begins, b".")
        os.close(1)
        time.sleep(5)
        os._exit(0)
    os.read(begun, 1)
    print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def held_by_another(folder: Path) -> Iterator[None]:
    """Another process has the lock, and is killed in the end."""
    process = subprocess.Popen([sys.executable, "-c", _HOLD, str(folder)], stdout=subprocess.PIPE)
    with process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == b"held\n"
            yield
        finally:
            process.kill()


def test_a_second_process_is_kept_out_until_the_first_is_dead(tmp_path: Path) -> None:
    with (
        held_by_another(tmp_path),
        pytest.raises(ConfigError, match=r"another run is writing to .*: wait for it"),
        run_lock(tmp_path),
    ):
        pass
    # At once, though the killed process's child still runs.
    with run_lock(tmp_path):
        pass


def test_the_lock_ends_with_its_block(tmp_path: Path) -> None:
    for _ in range(2):
        with run_lock(tmp_path):
            pass


def test_a_file_system_that_cannot_lock_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with run_lock(tmp_path):
        assert str(tmp_path) in caplog.text
