"""Commands whose streams are closed, or whose reader is gone, in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Without the package's torch, which takes its time.
_COMMAND = """
import os, sys
from arcface_kd import cli

def command(arguments):
    print("x" * int(os.environ["LETTERS"]))
    if "FILE" in os.environ:
        stream = open(os.environ["FILE"], "wb")
        print("a warning", file=sys.stderr)
        assert stream.fileno() > 2

class Parser:
    def parse_args(self, words):
        return type("Arguments", (), {"run": staticmethod(command)})

cli.build_parser = Parser
sys.exit(cli.main([]))
"""


def run(redirections: str, writer: int = 2, **environment: str) -> tuple[int, str]:
    """A command's exit code and what it has printed to stderr."""
    done = subprocess.run(
        ["bash", "-c", f'"$0" -c "$1" {redirections}', sys.executable, _COMMAND],
        env={**os.environ, "LETTERS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
        pass_fds=[writer],
    )
    return done.returncode, done.stderr


def test_files_do_not_take_the_numbers_of_closed_streams(tmp_path: Path) -> None:
    assert run("<&- >&- 2>&-", FILE=str(tmp_path / "weights")) == (0, "")
    assert (tmp_path / "weights").read_bytes() == b""


@pytest.mark.parametrize("letters", ["1", "100000"])
def test_output_that_nobody_reads_is_no_traceback(letters: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        assert run(f">&{writer}", writer, LETTERS=letters) == (141, "")
    finally:
        os.close(writer)


@pytest.mark.parametrize("letters", ["1", "100000"])
def test_output_that_finds_no_room_is_one_line(letters: str) -> None:
    assert run(">/dev/full", LETTERS=letters) == (2, "arcface-kd: [Errno 28] No space left on device\n")
