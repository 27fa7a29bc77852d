"""A record: header, label and payload, byte for byte as mxnet packs them."""

import struct
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from arcface_kd.data.formats.record import RecordHeader, pack, unpack, unpack_label
from arcface_kd.errors import DataError
from tests.data.record_sets import insightface_records, plain_records, write_records

LABELS = st.one_of(
    st.floats(width=32),
    st.integers(-(2**31), 2**31),
    st.booleans(),
    st.lists(st.floats(width=32), max_size=6),
    st.lists(st.floats(width=32), max_size=6).map(lambda values: np.array(values, dtype=np.float64)),
    st.sampled_from([np.float32(3), np.float64(4), np.int64(5), np.array(6.0)]),
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flag=st.integers(0, 9), label=LABELS, number=st.integers(0, 2**64 - 1), payload=st.binary(max_size=40))
def test_packing_equals_mxnets(mxnet: ModuleType, flag: int, label: float, number: int, payload: bytes) -> None:
    theirs = mxnet.recordio.pack(mxnet.recordio.IRHeader(flag, label, number, 7), payload)
    assert pack(RecordHeader(flag, label, number, 7), payload) == theirs
    expected, rest = mxnet.recordio.unpack(theirs)
    header, mine = unpack(theirs)
    assert (header.flag, header.id, header.id2, bytes(mine)) == (expected.flag, expected.id, expected.id2, rest)
    np.testing.assert_array_equal(header.label, expected.label)
    if np.size(expected.label):
        value, mine = unpack_label(theirs)
        np.testing.assert_equal(value, float(np.atleast_1d(expected.label)[0]))
        assert bytes(mine) == rest


def test_packing_is_what_the_format_says() -> None:
    packed = pack(RecordHeader(0, 3.0, 5, 6), b"xy")
    assert packed == struct.pack("<IfQQ", 0, 3.0, 5, 6) + b"xy"
    packed = pack(RecordHeader(0, np.array([1.0, 2.5]), 5, 0), b"xy")
    assert packed == struct.pack("<IfQQ2f", 2, 0.0, 5, 0, 1.0, 2.5) + b"xy"
    header, payload = unpack(packed)
    assert header.flag == 2
    assert header.label.tolist() == [1.0, 2.5]  # type: ignore[union-attr]
    assert payload == b"xy"
    assert unpack_label(packed) == (1.0, b"xy")


@pytest.mark.parametrize("header", [(0, 1.0, -1, 0), (0, 1.0, 2**64, 0), (0, 1e300, 0, 0), (0, "name", 0, 0)])
def test_what_a_header_cannot_hold_is_refused(header: tuple[int, float, int, int]) -> None:
    with pytest.raises(DataError, match="a record header cannot hold label"):
        pack(RecordHeader(*header), b"")


@pytest.mark.parametrize("take_apart", [unpack, unpack_label])
def test_short_records_are_refused(take_apart: Callable[[bytes], object]) -> None:
    with pytest.raises(DataError, match="a record of 23 bytes is too short for its header of 24"):
        take_apart(bytes(23))
    with pytest.raises(DataError, match="a record of 31 bytes is too short for the 2 labels"):
        take_apart(struct.pack("<IfQQ", 2, 0, 0, 0) + bytes(7))
    with pytest.raises(DataError, match="too short for the 4294967295 labels"):
        take_apart(struct.pack("<IfQQ", 2**32 - 1, 0, 0, 0) + bytes(7))


def test_both_layouts_are_bytes_that_mxnet_writes(mxnet: ModuleType, tmp_path: Path) -> None:
    for records in (insightface_records([2, 3]), plain_records([0, 1, 1])):
        write_records(tmp_path, records)
        oracle = mxnet.recordio.MXIndexedRecordIO(str(tmp_path / "mx.idx"), str(tmp_path / "mx.rec"), "w")
        for key, packed in records:
            header, payload = unpack(packed)
            oracle.write_idx(key, mxnet.recordio.pack((header.flag, header.label, header.id, 0), bytes(payload)))
        oracle.close()
        assert (tmp_path / "train.rec").read_bytes() == (tmp_path / "mx.rec").read_bytes()
        assert (tmp_path / "train.idx").read_bytes() == (tmp_path / "mx.idx").read_bytes()
