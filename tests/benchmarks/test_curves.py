"""Which students benchmarks.curves trains, with which commands, and the rows that it keeps."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import curves

RESULT = {"protocol": "pairs", "low_res": None, "accuracy": 0.9025, "tar@far=1e-2": 0.705}


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, ...]]:
    """What would have been run; a judged student gets one result."""
    seen: list[tuple[str, ...]] = []

    def run(*arguments: str) -> None:
        seen.append(arguments)
        if arguments[0] == "eval":
            Path(arguments[-1]).write_text(json.dumps([RESULT, {**RESULT, "low_res": "28 px, both sides"}]))

    monkeypatch.setattr(curves, "_run", run)
    monkeypatch.setenv("ARCFACE_KD_REAL_DATA", str(tmp_path))
    return seen


def _measure(folder: Path, *arguments: str) -> list[curves.Row]:
    out = folder / "curves.csv"
    curves.main([*arguments, "--work", str(folder / "work"), "--out", str(out), "--pictures", str(folder)])
    return curves.read(out)


def test_rows_are_kept_and_not_measured_again(commands: list[tuple[str, ...]], tmp_path: Path) -> None:
    rows = _measure(tmp_path, "--kd", "embedding", "bank", "--augment", "flip", "quality", "--seeds", "1", "2")
    assert len(rows) == 2 * len(commands) / 2 == 16
    assert {(row.kd, row.augment, row.seed) for row in rows} == {
        (kd, augment, seed) for kd in ("embedding", "bank") for augment in ("flip", "quality") for seed in (1, 2)
    }
    assert rows[1].pairs == "28 px, both sides"
    assert (rows[1].accuracy, rows[1].tar) == (90.25, 70.5)
    commands.clear()
    assert _measure(tmp_path, "--kd", "bank", "embedding", "--augment", "quality", "--epochs", "12") == rows
    assert not commands


def test_a_stopped_run_goes_on(commands: list[tuple[str, ...]], tmp_path: Path) -> None:
    folder = tmp_path / "work" / curves.Student("thin_r18", "", "", "flip", "clean", "", 12, 1).name
    folder.mkdir(parents=True)
    (folder / "checkpoint_gpu_0.pt").touch()
    (folder / "hours").write_text("2.5")
    rows = _measure(tmp_path)
    assert "resume=True" in commands[0]
    assert "--kd-teacher" not in commands[0]
    assert rows[0].hours == 2.5


def test_what_the_teacher_sees(commands: list[tuple[str, ...]], tmp_path: Path) -> None:
    _measure(tmp_path, "--kd", "embedding", "--augment", "strong", "--sees", "same")
    assert "student.augment.teacher=same" in commands[0]
    assert "--kd-cache" not in commands[0]


def test_a_curve_is_the_mean_of_its_seeds(commands: list[tuple[str, ...]], tmp_path: Path) -> None:
    rows = _measure(tmp_path, "--kd", "bank", "--seeds", "1", "2")
    rows[1:] = [replace(row, accuracy=91.25) for row in rows[1:]]
    assert curves.curves(rows, "thin_r18") == {"bank": {12: pytest.approx(90.75)}}
    rows = _measure(tmp_path, "--kd", "bank", "--epochs", "30", "--augment", "quality")
    assert curves.curves(rows, "thin_r18") == {"bank": {12: pytest.approx(90.25)}, "bank quality": {30: 90.25}}
    assert (tmp_path / "curves.png").read_bytes()[1:4] == b"PNG"
