"""Rows on disk, the newest of them, and the commit that they name."""

from pathlib import Path

import pytest
import torch

from benchmarks import record
from benchmarks.record import Recorder, Row, append, classes_of, latest, print_table, read, size

ROW = Row("head", "floor", "C=10 B=2 D=4", "seconds", 0.25, "cpu", "2.13.0", "abc")


def test_what_is_written_is_read(tmp_path: Path) -> None:
    rows = [ROW, Row("a", 'b, "c"', "C=1 B=1 D=1", "peak_mb", 123.456, "cpu", "2", "d+")]
    append(tmp_path / "r.csv", rows[:1])
    append(tmp_path / "r.csv", rows[1:])
    assert read(tmp_path / "r.csv") == rows
    first = (tmp_path / "r.csv").read_text().splitlines()[0]
    assert first == "benchmark,provider,size,metric,value,device,torch,commit"


def test_other_columns_are_refused(tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"r\.csv has the columns \['a', 'b'\]"):
        read(tmp_path / "r.csv")


def test_the_newest_value_counts() -> None:
    newer = Row(**{**vars(ROW), "value": 0.5})
    other = Row(**{**vars(ROW), "benchmark": "learned"})
    assert latest([ROW, newer, other], "head") == {("floor", "C=10 B=2 D=4", "seconds"): 0.5}


def test_sizes_are_read_back() -> None:
    assert classes_of(size(85_742, 256, 512)) == 85_742


def test_a_recorder_knows_where_and_what(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recorder = Recorder("head", torch.device("cpu"))
    recorder.add("floor", "C=1 B=1 D=1", "seconds", 1.0)
    (row,) = recorder.rows
    assert row.device.endswith(f"{torch.get_num_threads()} threads")
    assert row.commit
    monkeypatch.setattr(record, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert Recorder("head", torch.device("cpu"))._commit == "unknown"


def test_tables_are_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("title", ["name", "value"], [["a", "1.0"], ["longer", "100.0"]])
    assert capsys.readouterr().out.splitlines()[1:] == [
        "title",
        "  name    value",
        "  ------  -----",
        "  a         1.0",
        "  longer  100.0",
    ]
