"""The index: parsed as Python parses it, and refused by line where it is none."""

import os
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arcface_kd.data.formats import record_index
from arcface_kd.data.formats.recordio import RecordReader
from arcface_kd.errors import DataError
from tests.data.record_sets import MAGIC


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 10**18 - 1), st.integers(0, 10**18 - 1)), min_size=1, max_size=60),
    end=st.sampled_from(["\n", "\r\n"]),
    finished=st.booleans(),
    width=st.integers(0, 12),
    chunk=st.sampled_from([64, 1 << 20]),
)
def test_the_index_is_what_python_reads(
    rows: list[tuple[int, int]],
    end: str,
    finished: bool,
    width: int,
    chunk: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.idx"
    # Leading zeros make lines of one width, which take the quick way.
    text = end.join(f"{key:0{width}}\t{offset:0{width}}" for key, offset in rows) + (end if finished else "")
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record_index, "_INDEX_CHUNK", chunk)
        index = record_index.read_index(path)
    assert index.T.tolist() == [[int(word) for word in line.split("\t")] for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    "line",
    [
        *("", "5", "5 40", "5\t", "\t40", "5\t40\t3", "-5\t40", "5\t4O", "5\t40 ", "5.0\t40", "5\t\t40", "5\r\t40"),
        *("5\t1234567890123456789", "1234567890123456789\t40", "\x00\x01\x02", "five\tforty"),
    ],
)
@pytest.mark.parametrize("wide", [False, True])
def test_garbage_in_the_index_is_named_with_its_line(tmp_path: Path, line: str, wide: bool) -> None:
    good = [f"{key}\t{key * 12}" for key in (range(3) if wide else range(9, 12))]
    (tmp_path / "train.idx").write_text("\n".join([*good[:2], line, good[2]]) + "\n")
    with pytest.raises(DataError, match=r"train\.idx: line 3 ") as caught:
        record_index.read_index(tmp_path / "train.idx")
    assert "\n" not in str(caught.value)


def test_a_binary_index_is_refused_at_its_first_chunk(tmp_path: Path) -> None:
    (tmp_path / "train.idx").touch()
    os.truncate(tmp_path / "train.idx", 1 << 33)
    tracemalloc.start()
    with pytest.raises(DataError, match="line 1 is"):
        record_index.read_index(tmp_path / "train.idx")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50 << 20


@pytest.mark.slow
def test_a_million_lines_are_kept_once(tmp_path: Path) -> None:
    offsets = np.arange(1_000_000) * 4980
    rec, idx = tmp_path / "train.rec", tmp_path / "train.idx"
    idx.write_text("".join(f"{key}\t{offset}\n" for key, offset in enumerate(offsets.tolist())))
    with open(rec, "wb") as stream:
        stream.seek(int(offsets[-1]))
        stream.write(MAGIC + struct.pack("<I", 0))
    with RecordReader(rec, idx) as reader:
        np.testing.assert_array_equal(reader.offsets, offsets)
        np.testing.assert_array_equal(reader.keys, np.arange(len(offsets)))
        # 93 MB for the 5.8 M records of MS1MV2.
        assert np.shares_memory(reader.keys, reader._index.numpy())
        assert np.shares_memory(reader.offsets, reader._index.numpy())
        assert reader._index.nbytes == 16 * len(offsets)


@pytest.mark.parametrize("at_once", [1, 2, 3, 4, 100])
def test_whether_values_ascend_does_not_depend_on_the_pieces(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(record_index, "_COMPARED_AT_ONCE", at_once)
    for size in range(9):
        values = np.arange(size)
        assert record_index.ascending(values)
        for place in range(1, size):
            for smaller in (values[place - 1], -1):
                assert not record_index.ascending(np.where(values == place, smaller, values))
