"""``make gpu``: all that a CPU can show of it, and that no check takes the others down."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from arcface_kd.data.formats.verification_bin import read_bin
from arcface_kd.losses import fused
from benchmarks.gpu import bare_machine, environment, inputs, methods, runs, speed, steps
from benchmarks.gpu.__main__ import main
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


def falling_back(place: Place, found: Findings) -> None:
    fused._warn("a function cannot be compiled here", ValueError("no such operation"))


def hanging(place: Place, found: Findings) -> None:
    found.add("before", 1)
    # In a session of its own, as torchrun starts its workers.
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
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
    names = ("sound", "wrong", "raising", "killed", "absent", "falling_back")
    met = {name: outcome_of(name, tmp_path) for name in names}
    assert {name: each["status"] for name, each in met.items()} == {
        "sound": "passed",
        "wrong": "failed",
        "raising": "failed",
        "killed": "failed",
        "absent": "skipped",
        "falling_back": "failed",
    }
    assert "no such operation" in str(met["falling_back"]["faults"])
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


def test_findings_are_whole_when_a_check_is_ended_while_it_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Findings(tmp_path / "found.json")
    found.add("before", 1)

    def half(file: Path, text: str, encoding: str) -> None:
        with file.open("w", encoding=encoding) as stream:
            stream.write(text[:9])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(KeyboardInterrupt):
        found.add("behind", 2)
    assert json.loads(found.file.read_text())["numbers"] == {"before": 1}


def test_marked_tests_are_shared_out_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "def test_other(): raise ValueError('is not marked')\n"
        "@pytest.mark.gpu\n@pytest.mark.parametrize('number', range(5))\n"
        "def test_one(number):\n    if number == 4: pytest.skip('no card')\n    assert number != 2, 'two is wrong'\n"
    )
    monkeypatch.setattr(environment, "_PROCESSES", 2)
    found = Findings(tmp_path / "found.json")
    environment.marked_tests(Place(torch.device("cpu"), False, tmp_path), found, tmp_path)
    assert found.numbers == {"passed": 3, "skipped": 1, "failed": 1}
    (fault,) = found.faults
    assert "test_one[2]" in fault


def test_one_kind_of_run_that_fails_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class FakeRuns:
        def __init__(self, *arguments: object, precision: str) -> None:
            self.precision, self.cache = precision, "rows"

        def kd(self, method: str) -> dict[str, object]:
            return {"kd": method}

        def teacher(self) -> str:
            return self.precision

        def run(self, output: str, teacher: str, **keys: object) -> SimpleNamespace:
            if keys.get("kd") == "proxylesskd":
                raise ValueError("no such run")
            return SimpleNamespace(head=SimpleNamespace(monitor=SimpleNamespace(settle=lambda: None)))

    monkeypatch.setattr(steps, "Runs", FakeRuns)
    monkeypatch.setattr(steps, "training_steps", lambda run: itertools.repeat(0))
    found = Findings(tmp_path / "found.json")
    steps.waits(Place(torch.device("cpu"), True, tmp_path), found)
    assert found.faults == ["proxylesskd: ValueError: no such run"]
    assert len(found.numbers) == 3


def test_speeds_are_told_round_by_round_and_a_teacher_is_loaded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    # All rounds of the first student, and two of the second.
    seconds, found = iter([0.1] * 20), Findings(tmp_path / "found.json")

    class FakeRuns:
        cache = "rows"

        def __init__(self, *arguments: object) -> None: ...

        def teacher(self, precision: str) -> str:
            loaded.append(precision)
            return precision

        def run(self, *arguments: object, **keys: object) -> None: ...

    def told(place: Place, name: str, *arguments: object) -> None:
        assert len(found.numbers) == 5

    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(speed, "Runs", FakeRuns)
    monkeypatch.setattr(speed, "training_steps", lambda run: itertools.repeat(0))
    monkeypatch.setattr(speed, "_seconds_a_step", lambda *arguments: next(seconds))
    monkeypatch.setattr(speed, "_where_time_goes", told)
    with pytest.raises(StopIteration):
        speed.training(Place(torch.device("cpu"), False, tmp_path), found)
    assert loaded == ["fp32", "fp16"]
    assert [name for name in found.numbers if name.startswith("r18")] == [
        f"r18, {kind}: images/s" for kind in ("alone", "cached", "r50 fp32", "r50 fp16")
    ]


def test_a_method_under_adaface_s_margin_is_held_against_fp64(tmp_path: Path) -> None:
    numbers, faults = methods._of_method(methods._ADAFACE, Place(torch.device("cpu"), True, tmp_path))
    assert not faults
    assert all(0 < value < 2e-2 for value in numbers.values())


def test_a_verification_set_lies_beside_the_records(tmp_path: Path) -> None:
    pairs = read_bin(tmp_path / f"{inputs.verification_set(tmp_path)}.bin")
    assert pairs.is_same.tolist() == [True] * 10 + [False] * 10


def test_a_cache_is_filled_in_the_precision_of_its_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled: list[object] = []
    monkeypatch.setattr(runs, "records", lambda *arguments: tmp_path)
    monkeypatch.setattr(runs, "teacher_file", lambda *arguments: tmp_path / "teacher.pt")
    monkeypatch.setattr(runs, "load_teacher", lambda path, options: options["precision"])
    monkeypatch.setattr(runs, "fill_cache", lambda config, teacher: filled.append(teacher))
    made = runs.Runs(Place(torch.device("cpu"), True, tmp_path), "r18", "mbf", 4, 8, precision="fp16")
    assert made.cache.name.endswith("fp16.rows")
    assert filled == [made.teacher()] == ["fp16"]


def test_a_kernel_s_time_is_counted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not again in the region that the optimiser has named."""

    def row(key: str, milliseconds: float, device: DeviceType, named: bool = False) -> SimpleNamespace:
        return SimpleNamespace(
            key=key, count=1, self_device_time_total=1000 * milliseconds, device_type=device, is_user_annotation=named
        )

    rows = [
        row("cudaLaunchKernel", 0, DeviceType.CPU),
        row("aten::mm", 3, DeviceType.CPU),
        row("gemm", 3, DeviceType.CUDA),
        row("Optimizer.step#SGD.step", 3, DeviceType.CUDA, named=True),
    ]
    profiled = SimpleNamespace(key_averages=lambda: rows)
    monkeypatch.setattr(speed, "profile", lambda activities: nullcontext(profiled))
    monkeypatch.setattr(speed, "_wait", lambda place: None)
    found = Findings(tmp_path / "found.json")
    speed._where_time_goes(Place(torch.device("cuda"), False, tmp_path), "a", lambda: None, 1, 5, found)
    assert found.numbers == {"a: kernel launches a step": 1, "a: GPU ms a step": 3, "a: ms a step in gemm": 3}


def test_limits_leave_time_on_the_lent_machine() -> None:
    assert [check.number for check in CHECKS] == list(range(1, 14))
    alone = sum(check.seconds for check in CHECKS if check.alone)
    # The others run at once.
    assert alone + 180 <= 470
    assert max(check.seconds for check in CHECKS if not check.alone) <= 250


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


def test_a_folder_that_is_no_checkout_is_named_before_any_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"ARCFACE_TORCH": str(tmp_path), "PYTHONPATH": "", "CUDA_VISIBLE_DEVICES": ""}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert main(["--device", "cpu", "--out", str(tmp_path / "out")]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bare_machine.missing() == []
    monkeypatch.setattr(bare_machine, "_installed", lambda name: name != "unidiff")
    monkeypatch.setattr(bare_machine, "find_spec", lambda name: None if name == "cv2" else object())
    assert bare_machine.missing() == ["unidiff", "cv2"]
