"""Runs that commit a44a264 began go on to the losses that it gave; what it wrote for others is read as it was."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from arcface_kd import RecordDataset, load_teacher
from tests.compatibility.conftest import unpack
from tests.compatibility.runs import (
    ALONE,
    CLASSES,
    DIMENSION,
    FINISHED,
    IMAGES,
    NETWORK,
    SHKD_TEACHER_EPOCHS,
    STEPS_AN_EPOCH,
    TWO_RANKS,
    command,
    go_on,
)
from tests.compatibility.same_losses import losses_of
from tests.forked import start_ranks, wait


def assert_goes_on(output: Path, recorded: Mapping[str, float], first: int = STEPS_AN_EPOCH + 1) -> None:
    """The losses from a step on; on another processor the last digits differ."""
    wanted = {int(step): loss for step, loss in recorded.items() if int(step) >= first}
    assert len(wanted) >= STEPS_AN_EPOCH
    assert losses_of(output) == pytest.approx(wanted, rel=1e-4)


def rows_of(path: str) -> np.ndarray:
    """A cache's numbers: fp16 with all bits inverted."""
    kept = np.fromfile(path, "<u2")
    return np.invert(kept).view("<f2").astype(np.float32).reshape(CLASSES * IMAGES, 2, DIMENSION)


@pytest.mark.parametrize("name", ALONE)
def test_one_rank_goes_on(work: Path, recorded: dict[str, Any], name: str) -> None:
    assert command("train", f"{name}.py", "--set", "resume=True") == 0
    assert_goes_on(work / name, recorded["losses"][name])


def _go_on(folder: str) -> None:
    """Of one rank."""
    sys.path.insert(0, f"{folder}/plugin")
    go_on(folder, *TWO_RANKS)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs of two ranks, gone on with in one job."""
    folder = unpack(tmp_path_factory.mktemp("two_ranks"))
    ranks = start_ranks(2, _go_on, str(folder), logs=folder, environment={"CUDA_VISIBLE_DEVICES": ""})
    assert wait(ranks, 600) == [0, 0], (folder / "rank0.log").read_text()[-3000:]
    assert json.loads((folder / "codes.json").read_text()) == dict.fromkeys(TWO_RANKS, 0)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", TWO_RANKS)
def test_two_ranks_go_on(two_ranks: Path, recorded: dict[str, Any], name: str) -> None:
    assert_goes_on(two_ranks / name, recorded["losses"][name])


@pytest.mark.parametrize("name", [name for name in TWO_RANKS if name != "similarity-2"])
def test_one_rank_goes_on_where_two_were(work: Path, recorded: dict[str, Any], name: str) -> None:
    assert command("train", f"{name}.py", "--set", "resume=True", "batch_size=8") == 0
    assert_goes_on(work / name, recorded["losses"][f"{name} on one rank"])


def test_shkd_goes_on_in_the_middle_of_its_second_run(work: Path, recorded: dict[str, Any]) -> None:
    assert command("train", "shkd.py") == 0
    losses = recorded["losses"]["shkd"]
    assert losses_of(work / "shkd" / "stage1_student") == {}, "the first run is done"
    assert_goes_on(
        work / "shkd" / "stage2_teacher", losses["stage2_teacher"], STEPS_AN_EPOCH * (SHKD_TEACHER_EPOCHS - 1) + 1
    )
    assert_goes_on(work / "shkd", losses["."], 1)


def test_a_head_is_merged_to_the_same_file(work: Path) -> None:
    assert command("merge-head", "teacher", "now.pt") == 0
    then, now = (torch.load(name, weights_only=True) for name in ("head.pt", "now.pt"))
    assert now.keys() == then.keys()
    assert now["num_classes"] == then["num_classes"] == CLASSES
    assert torch.equal(now["weight"], then["weight"])


def test_a_student_is_a_teacher_whose_cache_is_read(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = Path("rows").read_bytes(), Path("rows.json").read_bytes()
    assert command("cache", "tcs-1.py", "--kd-teacher", "teacher/model.pt") == 0
    assert "nothing was missing" in capsys.readouterr().out
    assert (Path("rows").read_bytes(), Path("rows.json").read_bytes()) == before
    faces, teacher = RecordDataset("records"), load_teacher("teacher/model.pt")
    images = torch.stack([faces[at].image for at in range(len(faces))]) / 127.5 - 1
    embeddings = torch.nn.functional.normalize(teacher(images)).numpy()
    np.testing.assert_allclose(rows_of("rows")[:, 0], embeddings, atol=1e-3)


def test_a_half_filled_cache_is_filled(work: Path) -> None:
    before, whole = rows_of("half"), rows_of("rows")
    there = ~np.isnan(before).any(axis=-1)
    assert 0.2 < there.mean() < 0.8
    assert command("cache", "half-filled.py") == 0
    after = rows_of("half")
    np.testing.assert_array_equal(after[there], before[there])
    np.testing.assert_allclose(after, whole, atol=1e-3)


def test_principal_components_are_read(work: Path) -> None:
    file = Path("rows.pca.npz")
    before = file.stat().st_mtime_ns, file.read_bytes()
    assert command("train", "tcs-1.py", "--set", "resume=True") == 0
    assert (file.stat().st_mtime_ns, file.read_bytes()) == before


def test_finished_runs_are_judged_as_they_were(work: Path, recorded: dict[str, Any]) -> None:
    runs = [f"finished/{name}" for name in FINISHED]
    assert command("eval", *runs, "--data", "records", "--out", "now.json") == 0
    now, then = json.loads(Path("now.json").read_text()), recorded["scores"]
    now = [row for row in now if row["protocol"] == "pairs"]
    assert len(now) == len(then) == 2
    for row, wanted in zip(now, then, strict=True):
        numbers = {key: value for key, value in wanted.items() if isinstance(value, int | float)}
        assert {key: row[key] for key in numbers} == pytest.approx(numbers, rel=1e-3)
        assert row["input"] == wanted["input"]


def test_finished_runs_are_compared(work: Path) -> None:
    pytest.importorskip("matplotlib", reason="a report has pictures")
    runs = [f"finished/{name}" for name in FINISHED]
    assert command("compare", *runs, "--data", "records", "--out", "report") == 0
    report = (work / "report" / "report.md").read_text(encoding="utf-8")
    assert "adadistill" in report
    assert NETWORK in report
