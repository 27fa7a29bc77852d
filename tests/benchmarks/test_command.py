"""``python -m benchmarks``: in a tiny size every benchmark runs, writes well-formed rows and draws its pictures."""

import csv
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import peak_memory
from benchmarks.__main__ import BENCHMARKS, main
from benchmarks.plots import PICTURES
from benchmarks.record import RESULTS, Row, classes_of, read
from tests.forked import CONTEXT

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def _cheaply(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the host, and each measured process forked from one that has imported torch."""
    monkeypatch.delenv("ARCFACE_TORCH", raising=False)
    monkeypatch.setattr(peak_memory, "multiprocessing", SimpleNamespace(get_context=lambda _: CONTEXT))


def run(tmp_path: Path, name: str | None = None) -> list[Row]:
    threads = torch.get_num_threads()
    only = [] if name is None else [name]
    try:
        main(
            [*only, "--tiny", "--threads=1", f"--results={tmp_path / 'results.csv'}", f"--pictures={tmp_path / 'png'}"]
        )
    finally:
        torch.set_num_threads(threads)
    return read(tmp_path / "results.csv")


def assert_well_formed(rows: list[Row]) -> None:
    assert rows
    for row in rows:
        assert math.isfinite(row.value)
        assert row.value > 0
        assert row.size.startswith(f"C={classes_of(row.size)} B=")
        assert " D=" in row.size
        assert row.device.startswith("cpu")
        assert row.torch == torch.__version__
        assert row.commit


@pytest.mark.slow
def test_head(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = run(tmp_path, "head")
    assert_well_formed(rows)
    met = {(row.benchmark, row.provider, row.metric) for row in rows}
    narrow = {("head", row.provider, "seconds") for row in rows if row.provider.startswith("arcface_kd_")}
    assert met - narrow == {
        ("head", "floor", "seconds"),
        ("head", "arcface_kd", "seconds"),
        ("head", "dense_reference", "seconds"),
        ("head", "arcface_kd", "peak_mb"),
        ("head", "dense_reference", "peak_mb"),
        ("head_cost", "arcface_kd", "seconds"),
    }
    printed = capsys.readouterr().out
    for claim in ("no longer than the two products", "a tenth of the dense", "at most 96 MB", "slope 1.0 +- 0.05"):
        assert claim in printed
    for picture in ("head_time", "head_cost", "head_memory"):
        assert (tmp_path / "png" / f"{picture}.png").read_bytes().startswith(PNG)


@pytest.mark.slow
def test_learned_against_the_dense_twin(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = run(tmp_path, "learned")
    assert_well_formed(rows)
    assert {(row.provider, row.metric) for row in rows} == {
        (provider, metric) for provider in ("arcface_kd", "dense_twin") for metric in ("seconds", "peak_mb")
    }
    assert "never slower than dense_twin" in capsys.readouterr().out
    assert (tmp_path / "png" / "learned_time.png").read_bytes().startswith(PNG)


@pytest.mark.slow
def test_scale_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are appended to those that are there."""
    once = run(tmp_path, "scale")
    assert_well_formed(once)
    computed = {"state_mb", "working_mb", "tflop", "sent_mb"}
    for provider in ("arcface_kd", "partial_fc", "published_adadistill"):
        metrics = {row.metric for row in once if row.provider == provider}
        assert metrics == computed | ({"seconds", "peak_mb"} if provider == "arcface_kd" else set())
    assert "published_adadistill, 3 ranks" in capsys.readouterr().out
    assert (tmp_path / "png" / "scale.png").read_bytes().startswith(PNG)
    monkeypatch.setattr("benchmarks.scale.can_measure", lambda device: False)
    assert run(tmp_path, "scale")[: len(once)] == once
    with (tmp_path / "results.csv").open(newline="") as stream:
        assert sum(line[0] == "benchmark" for line in csv.reader(stream)) == 1


def test_tiny_numbers_never_reach_the_real_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for arguments in (["--tiny"], ["--tiny", f"--results={tmp_path / 'a.csv'}"], ["--tiny", f"--pictures={tmp_path}"]):
        with pytest.raises(SystemExit):
            main(arguments)
        assert "--tiny would mix" in capsys.readouterr().err
    assert RESULTS.name == "results.csv"
    assert PICTURES.parts[-2:] == ("docs", "benchmarks")


def test_an_unknown_benchmark_is_refused_with_the_names(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["foot"])
    said = capsys.readouterr().err
    assert all(name in said for name in BENCHMARKS)
