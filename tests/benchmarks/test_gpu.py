"""``make gpu``: all that a CPU can show of it, and that no check takes the others down."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import bare_machine
from benchmarks.gpu.checks import CHECKS, Check, Findings, Place, Skipped
from benchmarks.gpu.page import page
from benchmarks.gpu.processes import run_check

ROOT = Path(__file__).resolve().parents[2]


def sound(place: Place, found: Findings) -> None:
    found.add("answer", 42)
    found.goal("fast", False)


def wrong(place: Place, found: Findings) -> None:
    found.expect(False, "two is not three")


def raising(place: Place, found: Findings) -> None:
    found.add("before", 1)
    raise ValueError("no such thing")


def hanging(place: Place, found: Findings) -> None:
    found.add("before", 1)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (place.scratch / "child").write_text(str(child.pid))
    time.sleep(600)


def killed(place: Place, found: Findings) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def absent(place: Place, found: Findings) -> None:
    raise Skipped("no checkout")


def outcome_of(function: str, folder: Path, seconds: float = 120.0) -> dict[str, object]:
    check = Check(1, "a check", 1, f"{__name__}:{function}")
    return run_check(check, Place(torch.device("cpu"), True, folder), seconds)


@pytest.mark.slow
def test_a_check_ends_as_it_ends(tmp_path: Path) -> None:
    """One test for all: they share the process that has imported torch."""
    met = {name: outcome_of(name, tmp_path) for name in ("sound", "wrong", "raising", "killed", "absent")}
    assert {name: each["status"] for name, each in met.items()} == {
        "sound": "passed",
        "wrong": "failed",
        "raising": "failed",
        "killed": "failed",
        "absent": "skipped",
    }
    assert met["sound"]["numbers"] == {"answer": 42}
    assert met["raising"]["numbers"] == {"before": 1}
    assert "no such thing" in str(met["raising"]["faults"])
    assert met["absent"]["faults"] == ["no checkout"]
    began = time.monotonic()
    hung = outcome_of("hanging", tmp_path, 20)
    assert time.monotonic() - began < 120
    assert (hung["status"], hung["numbers"]) == ("timed out", {"before": 1})
    # What the check has started ends with it, once the system gives it a turn.
    status = Path("/proc") / (tmp_path / "child").read_text() / "status"
    deadline = time.monotonic() + 60
    with suppress(FileNotFoundError, ProcessLookupError):
        while "zombie" not in status.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)
    run = {"device": "a card", "tiny": True, "commit": "0", "date": "today", "seconds": 1.0}
    text = page(run, list(met.values()))
    shown = ("a card", "two is not three", "MISSED: fast", "no checkout", "| answer | 42 |")
    assert [words for words in shown if words not in text] == []


def test_limits_leave_time_on_the_lent_machine() -> None:
    assert [check.number for check in CHECKS] == list(range(1, 14))
    alone = sum(check.seconds for check in CHECKS if check.alone)
    assert alone + max(check.seconds for check in CHECKS if not check.alone) <= 470


def test_the_package_is_found_in_its_checkout(tmp_path: Path) -> None:
    """Without an installation: the entry points come from setup.cfg."""
    code = """
import sys
from pathlib import Path
from benchmarks.gpu import bare_machine
bare_machine.make_importable(Path(sys.argv[1]) / "site", None)
from importlib import metadata
print(*(point.value for point in metadata.entry_points(group="arcface_kd.teachers", name="onnx")))
print(*(dist.locate_file("") for dist in metadata.distributions(name="arcface_kd")), sep="\\n")
"""
    printed = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    assert printed[0] == "arcface_kd.teachers.onnx.source:OnnxSource"
    assert Path(printed[1]) == tmp_path / "site"


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bare_machine.missing() == []
    monkeypatch.setattr(bare_machine, "_installed", lambda name: name != "unidiff")
    monkeypatch.setattr(bare_machine, "find_spec", lambda name: None if name == "cv2" else object())
    assert bare_machine.missing() == ["unidiff", "cv2"]
