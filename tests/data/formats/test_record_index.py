"""The index: parsed as Python parses it, and refused by line where it is none."""

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
from tests.data.record_sets import write_records

MAGIC = struct.pack("<I", 0xCED7230A)


def write(folder: Path, records: list[bytes]) -> tuple[Path, Path]:
    write_records(folder, list(enumerate(records)))
    return folder / "train.rec", folder / "train.idx"


def naive_index(path: Path) -> tuple[list[int], list[int]]:
    rows = [line.split("\t") for line in path.read_text().splitlines()]
    return [int(row[0]) for row in rows], [int(row[1]) for row in rows]


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
    assert (index[0].tolist(), index[1].tolist()) == naive_index(path)


def test_a_long_index_goes_through_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_index, "_INDEX_CHUNK", 1000)
    path = tmp_path / "train.idx"
    rng = np.random.default_rng(0)
    offsets = np.cumsum(rng.integers(1, 10**4, 12_000)) * 4
    for keys in (np.arange(12_000), rng.permutation(12_000)):
        path.write_text("".join(f"{key}\t{offset}\n" for key, offset in zip(keys, offsets, strict=True)))
        index = record_index.read_index(path)
        np.testing.assert_array_equal(index, [keys, offsets])


@pytest.mark.parametrize(
    "line",
    [
        "",
        "5",
        "5 40",
        "5\t",
        "\t40",
        "5\t40\t3",
        "-5\t40",
        "5\t4O",
        "5\t40 ",
        "5.0\t40",
        "5\t\t40",
        "5\t1234567890123456789",
        "1234567890123456789\t40",
        "\x00\x01\x02",
        "five\tforty",
        "5\r\t40",
    ],
)
@pytest.mark.parametrize("wide", [False, True])
def test_garbage_in_the_index_is_named_with_its_line(tmp_path: Path, line: str, wide: bool) -> None:
    rec, idx = write(tmp_path, [b"x"] * 3)
    good = [f"{key}\t{key * 12}" for key in (range(3) if wide else range(9, 12))]
    idx.write_text("\n".join([*good[:2], line, good[2]]) + "\n")
    with pytest.raises(DataError, match=r"train\.idx: line 3 is .*, wanted 'key<TAB>offset'") as caught:
        RecordReader(rec, idx)
    assert "\n" not in str(caught.value)


def test_a_binary_index_is_refused_at_its_first_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rec, idx = write(tmp_path, [b"x"])
    with open(idx, "wb") as stream:
        stream.truncate(1 << 33)
    tracemalloc.start()
    with pytest.raises(DataError, match="line 1 is"):
        RecordReader(rec, idx)
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
        assert np.shares_memory(reader.keys, reader._index)
        assert np.shares_memory(reader.offsets, reader._index)
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
