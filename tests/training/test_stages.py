"""The launcher of a recipe's runs, interrupted."""

import signal
import subprocess
import sys
from pathlib import Path

_LAUNCHER = """
import pathlib, signal, sys, time

def end(*_):
    pathlib.Path("ended").touch()
    sys.exit(1)

signal.signal(signal.SIGTERM, end)
print("there", flush=True)
time.sleep(60)
"""
_RECIPE = """
import signal, sys
from pathlib import Path
from arcface_kd.host import recipe

# What a shell starts in the background ignores interruptions.
signal.signal(signal.SIGINT, signal.default_int_handler)
recipe._SECONDS_TO_END = 0.2
recipe._ended([sys.executable, "-c", sys.argv[1]], Path.cwd())
"""


def test_an_interrupted_recipe_leaves_no_ranks(tmp_path: Path) -> None:
    recipe = subprocess.Popen(
        [sys.executable, "-c", _RECIPE, _LAUNCHER], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert recipe.stdout is not None
    assert recipe.stdout.readline() == b"there\n"
    recipe.send_signal(signal.SIGINT)
    _, said = recipe.communicate(timeout=60)
    assert b"KeyboardInterrupt" in said
    assert (tmp_path / "ended").exists()
