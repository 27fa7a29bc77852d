"""MXNet's file of named arrays (``*-0000.params``), read without mxnet.

The format, little-endian throughout: u64 magic 0x112, u64 reserved, u64 count, that many arrays; u64 count of names,
each a u64 length and its bytes. An array of version 2 (magic 0xF993FAC9; version 3, 0xF993FACA, differs in what a shape
without dimensions means): i32 storage type (0 dense), u32 number of dimensions, i64 each; i32 device type, i32 device
number; i32 element type; the elements. Version 1 (0xF993FAC8) lacks the storage type. Older files have no magic: what
stands in its place is the number of dimensions, and those are u32.
"""

import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arcface_kd.errors import TeacherError
from arcface_kd.teachers.base import read_bytes

_LIST_MAGIC = 0x112
_V1, _V2, _V3 = 0xF993FAC8, 0xF993FAC9, 0xF993FACA
_DENSE = 0
# mshadow's numbers of element types.
_ELEMENTS: dict[int, str] = {0: "<f4", 1: "<f8", 2: "<f2", 3: "|u1", 4: "<i4", 5: "|i1", 6: "<i8"}
_MOST_DIMENSIONS = 8
# r100 has a thousand. One without elements takes four bytes of a file and a hundred of memory.
_MOST_ARRAYS = 100_000


class _Cursor:
    """A place in the file's bytes that never runs past their end."""

    def __init__(self, content: bytes, path: Path) -> None:
        self.content = content
        self.path = path
        self.position = 0

    def take(self, count: int, what: str) -> memoryview:
        left = len(self.content) - self.position
        if count > left:
            met = f"{what} at byte {self.position} needs {count} bytes, {left} left"
            raise TeacherError(f"teacher {self.path} is damaged or cut short: {met}")
        start = self.position
        self.position += count
        return memoryview(self.content)[start : self.position]

    def number(self, kind: str, what: str) -> int:
        (value,) = struct.unpack("<" + kind, self.take(struct.calcsize("<" + kind), what))
        return int(value)

    def damaged(self, what: str) -> TeacherError:
        return TeacherError(
            f"teacher {self.path} is damaged or no MXNet parameter file: {what} at byte {self.position}"
        )


def _dimensions(cursor: _Cursor, count: int, kind: str) -> tuple[int, ...]:
    if count > _MOST_DIMENSIONS:
        raise cursor.damaged(f"an array of {count} dimensions")
    shape = tuple(cursor.number(kind, "a dimension") for _ in range(count))
    # numpy takes no empty array whose other sizes multiply to more than it can count.
    empty_and_vast = 0 in shape and math.prod(size or 1 for size in shape) > len(cursor.content)
    if empty_and_vast or any(size < 0 for size in shape):
        raise cursor.damaged(f"an array of shape {shape}")
    return shape


def _array(cursor: _Cursor) -> NDArray[Any]:
    version = cursor.number("I", "an array")
    if version in (_V2, _V3):
        storage = cursor.number("i", "a storage type")
        if storage != _DENSE:
            raise cursor.damaged(f"a sparse array (storage type {storage})")
    if version in (_V1, _V2, _V3):
        shape = _dimensions(cursor, cursor.number("I", "a number of dimensions"), "q")
    else:
        shape = _dimensions(cursor, version, "I")
    # Before version 3 no dimensions meant no array, and nothing follows.
    if not shape and version != _V3:
        return np.zeros(0, np.float32)
    cursor.take(8, "a device")
    kind = cursor.number("i", "an element type")
    if kind not in _ELEMENTS:
        raise cursor.damaged(f"an unknown element type {kind}")
    element = np.dtype(_ELEMENTS[kind])
    content = cursor.take(math.prod(shape) * element.itemsize, f"an array of shape {shape}")
    return np.frombuffer(content, element).reshape(shape)


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Read all arrays of a ``.params`` file by name (``arg:conv_weight``); they are views of its bytes."""
    cursor = _Cursor(read_bytes(path), path)
    if cursor.number("Q", "the magic number") != _LIST_MAGIC:
        raise cursor.damaged("another magic number")
    cursor.number("Q", "the header")
    count = cursor.number("Q", "the number of arrays")
    if count > min(_MOST_ARRAYS, len(cursor.content) // 4):
        raise cursor.damaged(f"{count} arrays in {len(cursor.content)} bytes")
    arrays = [_array(cursor) for _ in range(count)]
    named = cursor.number("Q", "the number of names")
    if named != count:
        raise cursor.damaged(f"{named} names for {count} arrays")
    found: dict[str, NDArray[Any]] = {}
    for array in arrays:
        raw = bytes(cursor.take(cursor.number("Q", "a name's length"), "a name"))
        try:
            name = raw.decode()
        except UnicodeDecodeError:
            raise cursor.damaged("a name that is not text") from None
        if name in found:
            raise cursor.damaged(f"a second array named {name!r}")
        found[name] = array
    if cursor.position != len(cursor.content):
        raise cursor.damaged(f"{len(cursor.content) - cursor.position} bytes after the last name")
    return found
