"""Progress bars on terminals of all sizes, also on those that do not tell theirs."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios

import pytest

from arcface_kd.system.console import bar_size

_BAR = """
from tqdm import tqdm
from arcface_kd.system.console import bar_size
with tqdm(total=3, desc="run", mininterval=0, **bar_size()) as bar:
    bar.update(3)
"""


def shown(columns: int, rows: int, environment: dict[str, str]) -> str:
    """What a terminal of this size is left with."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    inherited = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")}
    subprocess.run(
        [sys.executable, "-c", _BAR],
        check=True,
        stdin=follower,
        stdout=follower,
        stderr=follower,
        env={**inherited, **environment},
    )
    os.close(follower)
    said = os.read(leader, 1 << 16).decode()
    os.close(leader)
    return said.rstrip().rpartition("\r")[2]


@pytest.mark.parametrize(
    ("columns", "rows", "environment", "width"),
    [(0, 0, {}, 120), (0, 0, {"COLUMNS": "60", "LINES": "10"}, 60), (90, 30, {}, 89)],
)
def test_a_bar_is_shown(columns: int, rows: int, environment: dict[str, str], width: int) -> None:
    line = shown(columns, rows, environment)
    assert line.startswith("run: 100%")
    assert "3/3" in line
    assert len(line) == width


def test_without_a_terminal_nothing_is_assumed() -> None:
    assert bar_size() == {"dynamic_ncols": True}
