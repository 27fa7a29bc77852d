"""The loader's benchmark: what it reads, the index that it opens, the memory that it counts."""

from pathlib import Path

import numpy as np
import pytest
import torch

from arcface_kd.data.formats.recordio import RecordReader
from benchmarks import loader
from benchmarks.loader import TINY, index_mb, write_index
from tests.mxnet_oracle import silently


@pytest.mark.slow
def test_tiny(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ARCFACE_KD_REAL_DATA", raising=False)
    # In processes of its own, which the last test here has.
    monkeypatch.setattr(loader, "index_mb", lambda rec, idx: 0.1)
    rows = silently(loader.run)(TINY, torch.device("cpu"))
    met = {(row.provider, row.size, row.metric) for row in rows}
    ours = {
        ("arcface_kd", "drawn faces, one worker", "images_per_second"),
        ("quality", "drawn faces, one worker", "images_per_second"),
        ("arcface_kd", "N=1000", "seconds"),
        ("arcface_kd", "N=1000", "index_mb"),
    }
    theirs = {("mxnet", where, metric) for name, where, metric in ours if name == "arcface_kd" and metric != "index_mb"}
    assert met in (ours, ours | theirs)
    printed = capsys.readouterr().out
    assert "held in at most 100 MB by 4 workers together" in printed
    assert ("at least 3.5 times mxnet's" in printed) == (met != ours)


def test_the_index_is_one_that_opens(tmp_path: Path) -> None:
    rec, idx = write_index(tmp_path, 1234)
    with RecordReader(rec, idx) as reader:
        assert len(reader) == 1234
        assert bytes(reader.read(1233)) == bytes(64)
    assert rec.stat().st_blocks * 512 < rec.stat().st_size / 100, "the file should be a hole"


def test_the_memory_of_an_index_is_counted_once_for_all_workers(tmp_path: Path) -> None:
    """16 bytes a record; counted for each of five processes it would be 80."""
    records = 500_000
    keys = np.arange(records, dtype=np.int64)
    rec, idx = write_index(tmp_path, records)
    megabytes = index_mb(rec, idx)
    assert 2 * keys.nbytes / 1e6 - 1 < megabytes < 3 * keys.nbytes / 1e6 + 6
