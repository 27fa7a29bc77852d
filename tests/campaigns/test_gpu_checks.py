"""Every check of ``make gpu``, at its tiny size, on a CPU: a minute of two cores."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_check_runs_on_a_cpu(tmp_path: Path) -> None:
    command = ["make", "--silent", "gpu", "DEVICE=cpu", f"PYTHON={sys.executable}", f"GPU_OUT={tmp_path / 'out'}"]
    environment = {name: value for name, value in os.environ.items() if name != "ARCFACE_TORCH"}
    ended = subprocess.run(
        command, cwd=ROOT, env={**environment, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    checks = json.loads((tmp_path / "out" / "results.json").read_text())["checks"]
    assert {each["number"]: each["status"] for each in checks} == {
        number: "skipped" if number == 7 else "passed" for number in range(1, 14)
    }
    assert "nothing about a GPU" in (tmp_path / "out" / "results.md").read_text()
