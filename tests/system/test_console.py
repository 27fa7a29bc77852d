"""Commands whose output nobody reads, or finds no room, in processes of their own."""

import os
import subprocess
import sys

import pytest

# Without the package's torch, which takes its time.
_COMMAND = """
import os, sys
from arcface_kd.cli import main as cli

class Parser:
    def parse_args(self, words):
        return type("Arguments", (), {"run": staticmethod(lambda _: print("x" * int(os.environ["LETTERS"])))})

cli.build_parser = Parser
sys.exit(cli.main([]))
"""


def run(redirections: str, letters: str, writer: int = 2) -> tuple[int, str]:
    """A command's exit code and what it has printed to stderr."""
    done = subprocess.run(
        ["bash", "-c", f'"$0" -c "$1" {redirections}', sys.executable, _COMMAND],
        env={**os.environ, "LETTERS": letters},
        capture_output=True,
        text=True,
        timeout=120,
        pass_fds=[writer],
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("letters", ["1", "100000"])
def test_output_that_nobody_reads_is_no_traceback(letters: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        assert run(f">&{writer}", letters, writer) == (141, "")
    finally:
        os.close(writer)


@pytest.mark.parametrize("letters", ["1", "100000"])
def test_output_that_finds_no_room_is_one_line(letters: str) -> None:
    assert run(">/dev/full", letters) == (2, "arcface-kd: [Errno 28] No space left on device\n")
