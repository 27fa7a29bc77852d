"""The main job, at a small size: its files, its rows, its honesty."""

import json
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from arcface_kd import demo
from arcface_kd.backbones import get_backbone
from arcface_kd.cli.main import main
from arcface_kd.demo import DemoSettings, Row, _config_for, run_demo, table, verdict
from arcface_kd.errors import ConfigError, DataError, TeacherError
from arcface_kd.evaluation.report.bootstrap import Interval
from arcface_kd.evaluation.scoring import Score, find_sets, load_models, score
from tests.host.trainer.faces import draw_faces


def row(model: str, accuracy: float, gain: tuple[float, float, float] | None = None) -> Row:
    numbers = {"accuracy": accuracy, "auc": 0.9, "tar@far=1e-1": 0.75, "tar@far=1e-2": 0.5, "tar@far=1e-3": None}
    gains = {} if gain is None else {"accuracy": (gain[0], Interval(*gain[1:]))}
    adds = 105_200_000 if model == "teacher" else 13_900_000
    return Row(Score(model, "pairs", "pairs", "rgb", numbers), [accuracy], 1234567, adds, 2.125, gain=gains)


def test_table_has_a_line_a_row_and_leaves_out_what_no_set_tells() -> None:
    lines = table([row("teacher", 0.9), row("alone", 0.85)]).splitlines()
    heads = [*("model", "set", "accuracy", "TAR@FAR=1e-1", "TAR@FAR=1e-2", "parameters", "multiply-adds", "ms/image")]
    assert lines[0].split() == heads
    assert lines[1].split() == ["teacher", "pairs", "90.00", "75.00", "50.00", "1.2", "M", "105.2", "M", "2.12"]
    assert lines[2].split() == ["alone", "pairs", "85.00", "75.00", "50.00", "1.2", "M", "13.9", "M", "2.12"]


@pytest.mark.parametrize(
    ("gain", "words", "sure"),
    [
        ((0.05, 0.01, 0.09), "+5.00 points (95 % interval +1.00 to +9.00)", True),
        ((-0.05, -0.09, -0.01), "-5.00 points", True),
        ((0.02, -0.01, 0.05), "+2.00 points", False),
    ],
)
def test_verdict_says_what_was_gained_and_whether_the_pairs_tell(
    gain: tuple[float, float, float], words: str, sure: bool
) -> None:
    said = verdict([row("teacher", 0.9), row("alone", 0.85), row("adadistill", 0.9, gain)], "adadistill")
    assert words in said
    assert ("too few pairs" in said) != sure
    assert "1/7.6 of the teacher's multiply-adds" in said


def test_runs_on_given_data_with_a_given_teacher(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "faces").mkdir()
    faces = draw_faces(tmp_path / "faces", identities=8, images=4)
    torch.manual_seed(0)
    teacher = tmp_path / "teacher.pt"
    torch.save(get_backbone("thin_r18").state_dict(), teacher)
    out = tmp_path / "out"
    rows = run_demo(DemoSettings(out=out, data=faces.folder, keys={"kd_teacher": str(teacher)}, epochs=1, seeds=2))
    assert [r.score.model for r in rows] == ["teacher", "alone", "adadistill"]
    assert [len(r.accuracy_by_seed) for r in rows] == [1, 2, 2]
    assert rows[2].kd_overhead is not None
    written = json.loads((out / "results.json").read_text())
    assert written == [r.as_row() for r in rows]
    # A row of `eval` and the demo's own numbers.
    (student,) = score(load_models([str(out / "alone_seed1")]), find_sets([faces.folder]))
    own = ["accuracy_by_seed", "parameters", "multiply_adds", "ms_per_image"]
    own += ["images_per_second", "kd_overhead", "gain"]
    assert [list(each) for each in written] == 3 * [[*student.as_row(), *own]]
    assert written[1]["accuracy_by_seed"][1] == pytest.approx(student.numbers["accuracy"], abs=0.051)
    assert written[0]["input"] == written[1]["input"] == student.input
    report = (out / "report.html").read_text()
    for name in ("teacher", "alone_seed0", "adadistill_seed1", "alpha"):
        assert name in report
    printed = capsys.readouterr().out
    assert table(rows) in printed
    assert "accuracy of adadistill against alone" in printed
    assert "[4/5] student adadistill, seed 1" in printed
    assert "arcface-kd data pack" in printed
    teacher_row, alone_row, distilled_row = rows
    assert teacher_row.multiply_adds is not None
    assert alone_row.multiply_adds is not None
    assert teacher_row.multiply_adds >= 3 * alone_row.multiply_adds
    assert set(distilled_row.gain) >= {"accuracy"}
    value, interval = distilled_row.gain["accuracy"]
    assert value == pytest.approx(np.mean(distilled_row.accuracy_by_seed) - np.mean(alone_row.accuracy_by_seed))
    assert interval.low <= value <= interval.high


def test_fewer_faces_than_a_batch_are_one_batch(tmp_path: Path) -> None:
    faces = draw_faces(tmp_path, identities=4, images=4)
    config = _config_for(
        faces.folder, DemoSettings(out=tmp_path / "out", data=faces.folder, keys={"kd_teacher": "none.pt"})
    )
    assert config.batch_size == 16
    assert config.frequent == 1


@pytest.mark.slow
def test_draws_trains_and_compares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"_STUDENT_IDENTITIES": 8, "_TEACHER_IDENTITIES": 12, "_IMAGES": 4, "_HELDOUT_IDENTITIES": 6, "_PAIRS": 20}
    for name, value in {**sizes, "_TEACHER_EPOCHS": 1, "TEACHER_NETWORK": "thin_r10"}.items():
        monkeypatch.setattr(demo, name, value)
    # Each process that draws would import torch.
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    rows = run_demo(DemoSettings(out=tmp_path, epochs=1))
    assert [(r.score.model, r.score.set) for r in rows] == [
        ("teacher", "synthetic"),
        ("alone", "synthetic"),
        ("adadistill", "synthetic"),
    ]
    assert (tmp_path / "faces" / "train.rec").is_file()
    assert (tmp_path / "teacher" / "model.pt").is_file()


def test_a_method_of_class_means_finds_the_cache_filled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "faces").mkdir()
    faces = draw_faces(tmp_path / "faces", identities=8, images=4)
    torch.manual_seed(0)
    torch.save(get_backbone("thin_r10").state_dict(), tmp_path / "teacher.pt")
    settings = DemoSettings(
        out=tmp_path / "out",
        data=faces.folder,
        keys={
            "kd": "proxylesskd",
            "kd_teacher": str(tmp_path / "teacher.pt"),
            "kd_classifier": "class-means",
            "kd_cache": str(tmp_path / "kept.cache"),
        },
        epochs=1,
        network="python:tests.networks:tiny",
    )
    assert [r.score.model for r in run_demo(settings)] == ["teacher", "alone", "proxylesskd"]
    assert "[1/4] embedding all faces with the teacher" in capsys.readouterr().out
    assert (tmp_path / "kept.cache").is_file()


@pytest.mark.parametrize(
    ("method", "dimension", "error", "words"),
    [
        ("adadistill", 64, ConfigError, "the teacher has 64 dimensions and the student 512"),
        ("proxylesskd", 512, TeacherError, "proxylesskd needs"),
        ("shkd", 512, ConfigError, "shkd is 3 runs"),
    ],
)
def test_what_the_student_cannot_use_is_refused_before_anything_is_trained(
    tmp_path: Path, method: str, dimension: int, error: type[Exception], words: str
) -> None:
    (tmp_path / "faces").mkdir()
    faces = draw_faces(tmp_path / "faces", identities=4, images=4)
    torch.save(get_backbone("mobilefacenet", num_features=dimension).state_dict(), tmp_path / "teacher.pt")
    with pytest.raises(error, match=words):
        run_demo(
            DemoSettings(
                out=tmp_path / "out",
                data=faces.folder,
                keys={"kd": method, "kd_teacher": str(tmp_path / "teacher.pt")},
                epochs=1,
            )
        )
    assert not (tmp_path / "out").exists()


def test_every_flag_of_the_command_reaches_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[DemoSettings] = []
    monkeypatch.setattr(demo, "run_demo", asked.append)
    words = (
        "demo --kd kd --kd-teacher t --kd-cache c --kd-option kd.t=1 --kd-classifier class-means --on-bad-record skip"
    )
    assert main(words.split()) == 0
    (settings,) = asked
    assert settings.kd.flags() == shlex.split(words.removeprefix("demo "))


def test_missing_pictures_are_told_before_anything_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"pictures need matplotlib: pip install"):
        run_demo(DemoSettings(out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_data_without_pairs_is_refused(tmp_path: Path) -> None:
    (tmp_path / "faces").mkdir()
    faces = draw_faces(tmp_path / "faces", identities=4, images=4)
    (faces.folder / "pairs.bin").unlink()
    with pytest.raises(DataError, match="no verification set"):
        run_demo(DemoSettings(out=tmp_path / "out", data=faces.folder))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("settings", [{"seeds": 0}, {"epochs": 0}])
def test_numbers_out_of_range(settings: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        DemoSettings(out=tmp_path, **settings)  # type: ignore[arg-type]
