import struct
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from arcface_kd.errors import TeacherError
from arcface_kd.teachers.mxnet.arrays import read_arrays
from tests.mxnet_oracle import silently
from tests.teachers.mxnet_files import array_bytes, params_bytes


def written(folder: Path, content: bytes) -> Path:
    path = folder / "model-0000.params"
    path.write_bytes(content)
    return path


def some_arrays() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {
        "arg:weight": generator.standard_normal((4, 3, 2, 2)).astype(np.float32),
        "aux:mean": generator.standard_normal(5).astype(np.float64),
        "arg:half": generator.standard_normal((2, 2)).astype(np.float16),
        "arg:count": np.arange(6, dtype=np.int64).reshape(2, 3),
        "arg:bytes": np.arange(7, dtype=np.uint8),
        "arg:small": np.arange(-3, 3, dtype=np.int8),
        "arg:whole": np.arange(3, dtype=np.int32),
    }


def assert_same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert list(found) == list(wanted)
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize("version", [0, 1, 2, 3])
def test_every_version_of_the_format_is_read(tmp_path: Path, version: int) -> None:
    assert_same(read_arrays(written(tmp_path, params_bytes(some_arrays(), version))), some_arrays())


@silently
def test_what_mxnet_writes_is_read_and_what_our_writer_writes_mxnet_reads(tmp_path: Path, mxnet: ModuleType) -> None:
    arrays = some_arrays()
    path = tmp_path / "model-0000.params"
    mxnet.nd.save(str(path), {name: mxnet.nd.array(array, dtype=array.dtype) for name, array in arrays.items()})
    assert_same(dict(sorted(read_arrays(path).items())), dict(sorted(arrays.items())))
    for version in (0, 1, 2):
        loaded = mxnet.nd.load(str(written(tmp_path, params_bytes(arrays, version))))
        assert_same({name: loaded[name].asnumpy() for name in arrays}, arrays)


def test_an_array_without_dimensions_has_no_elements_before_version_3(tmp_path: Path) -> None:
    empty = struct.pack("<IiI", 0xF993FAC9, 0, 0)
    names = struct.pack("<QQ", 1, 1) + b"a"
    found = read_arrays(written(tmp_path, struct.pack("<QQQ", 0x112, 0, 1) + empty + names))
    assert found["a"].size == 0
    scalar = array_bytes(np.array(3.5, np.float32), version=3)
    found = read_arrays(written(tmp_path, struct.pack("<QQQ", 0x112, 0, 1) + scalar + names))
    assert found["a"].shape == ()
    assert found["a"] == 3.5


def test_every_truncation_is_an_error(tmp_path: Path) -> None:
    whole = params_bytes({"arg:a": np.zeros((2, 3), np.float32), "aux:b": np.ones(2, np.float32)})
    for length in range(len(whole)):
        with pytest.raises(TeacherError, match=r"params is damaged|params: an empty file") as caught:
            read_arrays(written(tmp_path, whole[:length]))
        assert "\n" not in str(caught.value)
    assert len(read_arrays(written(tmp_path, whole))) == 2


def _list_of(array: bytes) -> bytes:
    return struct.pack("<QQQ", 0x112, 0, 1) + array + struct.pack("<QQ", 1, 1) + b"a"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (params_bytes(some_arrays()) + b"\0", "1 bytes after the last name"),
        (struct.pack("<QQQ", 0x113, 0, 0), "another magic number"),
        (struct.pack("<QQQ", 0x112, 0, 1 << 60), "1152921504606846976 arrays in 24 bytes"),
        (struct.pack("<QQQQ", 0x112, 0, 0, 7), "7 names for 0 arrays"),
        (_list_of(struct.pack("<Ii", 0xF993FAC9, 1)), "a sparse array"),
        (_list_of(struct.pack("<IiI", 0xF993FAC9, 0, 2**31)), "an array of 2147483648 dimensions"),
        (_list_of(struct.pack("<IiIq", 0xF993FAC9, 0, 1, -4)), r"an array of shape \(-4,\)"),
        (
            _list_of(struct.pack("<IiIqqiii", 0xF993FAC9, 0, 2, 1 << 40, 1 << 40, 1, 0, 0)),
            "needs 4835703278458516698824704",
        ),
        (
            _list_of(struct.pack("<IiIqqiii", 0xF993FAC9, 0, 2, 0, 1 << 62, 1, 0, 0)),
            r"an array of shape \(0, 4611686018427387904\)",
        ),
        (struct.pack("<QQQ", 0x112, 0, 100_001) + bytes(400_004), "100001 arrays in 400028 bytes"),
        (_list_of(struct.pack("<IiIqiii", 0xF993FAC9, 0, 1, 1, 1, 0, 99)), "an unknown element type 99"),
        (_list_of(array_bytes(np.zeros(1, np.float32)))[:-1] + b"\xff", "a name that is not text"),
        (params_bytes({"a": np.zeros(1), "b": np.zeros(1)})[:-1] + b"a", "a second array named 'a'"),
    ],
)
def test_what_cannot_be_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(TeacherError, match=message) as caught:
        read_arrays(written(tmp_path, content))
    assert "\n" not in str(caught.value)
