"""The pickles of verification sets: what they may hold, and how it is read without running anything.

They come from the internet, and unpickling runs whatever a file says. So a file is read twice. The first time its
opcodes are checked and nothing is built, which bounds the memory that the second time can take. Then the standard
library's ``Unpickler`` builds it; ``find_class`` gives stand-ins for the few globals that such files name and refuses
all others. Every pickle protocol is read, the byte strings of Python 2, and what packers left in their lists:
bytearrays, numpy's arrays and scalars.
"""

import mmap
import os
import pickle
import pickletools
import re
import struct
import textwrap
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

# An image takes about ten opcodes and some thousand bytes; a file beyond this is built to fill memory with empty lists.
_FREE_OPCODES = 1_000_000
_BYTES_PER_OPCODE = 16
# The largest known sets have 24,000 images. Faces of 112x112 take a kilobyte at the least.
FREE_IMAGES = 1 << 16
BYTES_PER_IMAGE = 1 << 10

# They build lists, tuples, byte strings, texts and numbers, and call a global; see ``pickletools`` for each.
_OPCODE_NAMES = (
    "PROTO FRAME STOP MARK POP POP_MARK PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET "
    "EMPTY_LIST LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 "
    "STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8 "
    "UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 "
    "INT LONG BININT BININT1 BININT2 LONG1 FLOAT BINFLOAT NEWTRUE NEWFALSE NONE GLOBAL STACK_GLOBAL REDUCE BUILD"
)
_OPCODES = frozenset(_OPCODE_NAMES.split())
# How the bytes of an item are counted before it.
_COUNTS = {
    pickletools.TAKEN_FROM_ARGUMENT1: "<B",
    pickletools.TAKEN_FROM_ARGUMENT4: "<i",
    pickletools.TAKEN_FROM_ARGUMENT4U: "<I",
    pickletools.TAKEN_FROM_ARGUMENT8U: "<Q",
}
_KNOWN = {opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes}
_MEMO_OPCODES = frozenset(("PUT", "BINPUT", "LONG_BINPUT"))


class Refused(Exception):
    """What a pickle holds that a verification set does not."""


def _scan(data: mmap.mmap) -> None:
    """Go through the opcodes without building anything; refuse what no verification set needs, by kind or number."""
    most = _FREE_OPCODES + len(data) // _BYTES_PER_OPCODE
    for _ in range(most):
        code = data.read(1)
        opcode = _KNOWN.get(code)
        if opcode is None:
            raise Refused(f"the byte {code!r}, no pickle opcode" if code else "a pickle without an end")
        if opcode.name not in _OPCODES:
            raise Refused(f"the pickle opcode {opcode.name}")
        argument: Any = None
        if opcode.name == "STRING":
            # pickletools' own reader wants ASCII, which Python 2's images are not.
            data.readline()
        elif opcode.arg is not None and opcode.arg.n in _COUNTS:
            # Stepped over: pickletools would copy and decode every image.
            count = struct.unpack(layout := _COUNTS[opcode.arg.n], data.read(struct.calcsize(layout)))[0]
            if not 0 <= count <= len(data) - data.tell():
                raise Refused(f"an item of {count} bytes where {len(data) - data.tell()} are left")
            data.seek(count, os.SEEK_CUR)
        elif opcode.arg is not None:
            argument = opcode.arg.reader(data)  # type: ignore[arg-type]
        if opcode.name in _MEMO_OPCODES and argument > most:
            raise Refused(f"memo entry {argument} of a pickle of {len(data)} bytes")
        if opcode.name == "STOP":
            return
    raise Refused(f"more than {most} pickle opcodes")


class _Global:
    """Stands for a function that a pickle may call; a state that would change it is refused."""

    def __init__(self, function: Callable[..., object]) -> None:
        self._function = function

    def __call__(self, *arguments: object) -> object:
        return self._function(*arguments)

    def __setstate__(self, state: object) -> None:
        raise Refused("a state for a global")


class _DType:
    """A numpy dtype of numbers, booleans, byte strings or objects, as its pickle describes it."""

    def __init__(self, code: object, *_: object) -> None:
        self.code = code.decode("latin-1") if isinstance(code, bytes) else str(code)
        if not re.fullmatch(r"[biu][1248]|f[248]|O[48]?|S[0-9]{1,9}", self.code):
            raise Refused(f"the numpy dtype {self.code[:20]!a}")
        self.order = "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order = state[1].decode("latin-1") if isinstance(state[1], bytes) else state[1]
        if order not in ("<", ">", "=", "|"):
            raise Refused("a numpy dtype of an unknown byte order")
        self.order = order

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self.order + self.code)


class _Array:
    """A numpy array, as its pickle describes it; the elements stay where they are in the pickle."""

    def __init__(self, *_: object) -> None:
        self.values: NDArray[Any] = np.zeros(0)
        self.data: bytes | bytearray | list[object] = b""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, _, data = state
        self.fill(data, dtype, shape)

    def fill(self, data: object, dtype: object, shape: object) -> None:
        if not isinstance(dtype, _DType) or not isinstance(shape, tuple):
            raise Refused("a numpy array without a dtype or a shape")
        if dtype.code.startswith("O"):
            if not isinstance(data, list) or shape != (len(data),):
                raise Refused("a numpy array of objects that is no list")
        elif not isinstance(data, bytes | bytearray):
            raise Refused("a numpy array without its bytes")
        else:
            self.values = np.frombuffer(data, dtype.dtype).reshape(shape)
        self.data = data


class _SetUnpickler(pickle.Unpickler):
    """Unpickles lists, byte strings and numbers, and carries out a few globals itself; none is imported."""

    def __init__(self, data: mmap.mmap) -> None:
        # Python 2's strings are the images of the oldest sets.
        super().__init__(data, encoding="bytes")
        self._size = len(data)
        self._copied = 0

    def find_class(self, module: str, name: str) -> object:
        known = re.sub(r"^numpy\._core\.", "numpy.core.", re.sub("^__builtin__$", "builtins", module))
        match known, name:
            case "_codecs", "encode":
                return _Global(self._encode)
            case "builtins", "bytes" | "bytearray":
                return _Global(self._bytes)
            case "numpy", "dtype":
                return _Global(_DType)
            case ("numpy", "ndarray") | ("numpy.core.multiarray", "_reconstruct"):
                return _Global(_Array)
            case "numpy.core.multiarray", "scalar":
                return _Global(_scalar)
            case "numpy.core.numeric", "_frombuffer":
                return _Global(_from_buffer)
        raise Refused(f"the global {f'{module}.{name}'[:100]!a}")

    def _encode(self, text: str, encoding: str) -> bytes:
        if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
            raise Refused("a call of _codecs.encode with arguments that are not a verification set's")
        self._copied += len(text)
        if self._copied > self._size:
            raise Refused("one string encoded again and again")
        return text.encode("latin-1")

    def _bytes(self, *arguments: Any) -> bytes:
        match arguments:
            case ():
                return b""
            case (bytes() as data,):
                return data
            case (str() as text, str() as encoding):
                return self._encode(text, encoding)
        raise Refused("a call of bytes with arguments that are not a verification set's")


def _scalar(dtype: object, data: object) -> object:
    if not isinstance(dtype, _DType) or not isinstance(data, bytes) or dtype.code.startswith("O"):
        raise Refused("a numpy scalar that is no number")
    return np.frombuffer(data, dtype.dtype, count=1)[0].item()


def _from_buffer(data: object, dtype: object, shape: object, *_: object) -> _Array:
    array = _Array()
    array.fill(data, dtype, shape)
    return array


def _elements(items: object, what: str) -> Iterable[object]:
    """The elements of a list, a tuple or an array of one side."""
    if isinstance(items, _Array) and isinstance(items.data, list):
        return items.data
    if isinstance(items, _Array) and items.values.ndim == 1:
        # No set is longer; a million strings of one byte each would take fifty times the file.
        if len(items.values) > FREE_IMAGES + items.values.nbytes // BYTES_PER_IMAGE:
            raise Refused(f"an array of {len(items.values)} {what}")
        items = items.values.tolist()
    if not isinstance(items, list | tuple):
        raise Refused(f"no list where one of {what} was due")
    return items


def _images(items: object) -> list[bytes]:
    # One object may stand in many pairs: its bytes are then copied once.
    copies: dict[int, bytes] = {}

    def image(item: object) -> bytes:
        if isinstance(item, bytes):
            return item
        data = item
        if isinstance(item, _Array) and item.values.dtype == np.uint8 and max(item.values.shape) == item.values.size:
            # The column of bytes that cv2.imencode returns.
            data = item.data
        if isinstance(data, bytearray):
            if id(data) not in copies:
                copies[id(data)] = bytes(data)
            data = copies[id(data)]
        if not isinstance(data, bytes):
            raise Refused(f"a {type(item).__name__.lstrip('_')} among the images")
        return data

    return [image(item) for item in _elements(items, "images")]


def _flags(items: object) -> NDArray[Any]:
    flags = _elements(items, "booleans")
    for flag in flags:
        if not isinstance(flag, int | float) or flag not in (0, 1):
            shown = f"the number {flag}" if isinstance(flag, int | float) else f"a {type(flag).__name__.lstrip('_')}"
            raise Refused(f"{shown[:60]} among the booleans")
    return np.array(flags, dtype=bool)


def read_pickle(data: mmap.mmap) -> tuple[list[bytes], NDArray[Any]]:
    """The encoded images of a verification set, and the flags of its pairs, bool (P,), whose number is not checked."""
    try:
        _scan(data)
        data.seek(0)
        match _SetUnpickler(data).load():
            case [images, is_same]:
                return _images(images), _flags(is_same)
            case other:
                raise Refused(f"a {type(other).__name__.lstrip('_')}, not a pair of lists")
    except (Refused, MemoryError):
        raise
    # Unpicklers throw what a damaged pickle makes them run into: IndexError, KeyError, TypeError and others.
    except Exception as error:
        what = textwrap.shorten(str(error), 100, placeholder="...").encode("unicode_escape").decode()
        raise Refused(f"a damaged pickle ({what})") from None
