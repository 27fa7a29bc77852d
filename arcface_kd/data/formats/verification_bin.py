"""InsightFace verification sets: ``.bin`` files, pickles of ``(images, is_same)``.

They come from the internet, and unpickling runs whatever a file says. So a file is read twice. The first time its
opcodes are checked and nothing is built, which bounds the memory that the second time can take. Then the standard
library's ``Unpickler`` builds it; ``find_class`` gives stand-ins for the few globals that such files name and refuses
all others. Every pickle protocol is read, the byte strings of Python 2, and what packers left in their lists:
bytearrays, numpy's arrays and scalars.
"""

import logging
import mmap
import os
import pickle
import pickletools
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from arcface_kd.data.formats.image import decode_rgb
from arcface_kd.errors import DataError
from arcface_kd.system.downloads import found_instead, is_archive
from arcface_kd.system.files import atomic_write, open_regular

logger = logging.getLogger(__name__)

# An image takes about ten opcodes and some thousand bytes; a file beyond this is built to fill memory with empty lists.
_FREE_OPCODES = 1_000_000
_BYTES_PER_OPCODE = 16
# The largest known sets have 24,000 images. Faces of 112x112 take a kilobyte at the least.
_FREE_IMAGES = 1 << 16
_BYTES_PER_IMAGE = 1 << 10

# They build lists, tuples, byte strings, texts and numbers, and call a global; see ``pickletools`` for each.
_OPCODE_NAMES = (
    "PROTO FRAME STOP MARK POP POP_MARK PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET "
    "EMPTY_LIST LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 "
    "STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8 "
    "UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 "
    "INT LONG BININT BININT1 BININT2 LONG1 FLOAT BINFLOAT NEWTRUE NEWFALSE NONE GLOBAL STACK_GLOBAL REDUCE BUILD"
)
_OPCODES = frozenset(_OPCODE_NAMES.split())
_KNOWN = {opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes}
_HEAD = 512
_MEMO_OPCODES = frozenset(("PUT", "BINPUT", "LONG_BINPUT"))
# What a pickled pair begins with: a tuple's or list's opcode, or the global that makes an array of images.
_BEGINNING = re.compile(rb"(\x80[\x02-\x05](\x95.{8})?)?[(\]c\x8c]", re.DOTALL)


@dataclass(frozen=True, eq=False)
class VerificationSet:
    """Pairs of face images and whether each shows one person.

    Attributes:
        name: the file's name without its ending, such as ``lfw``.
        images: encoded images, 2P of them; ``images[2i]`` and ``images[2i + 1]`` are pair i.
        is_same: bool (P,).
    """

    name: str
    images: list[bytes]
    is_same: np.ndarray


class _Refused(Exception):
    """What a pickle holds that a verification set does not."""


def _scan(data: mmap.mmap) -> None:
    """Go through the opcodes without building anything.

    Raises:
        _Refused: an opcode that a verification set has no use for, more of them than it can need, or a place in the
            memo that would take more memory than the file.
    """
    most = _FREE_OPCODES + len(data) // _BYTES_PER_OPCODE
    for _ in range(most):
        code = data.read(1)
        opcode = _KNOWN.get(code)
        if opcode is None:
            raise _Refused(f"the byte {code!r}, no pickle opcode" if code else "a pickle without an end")
        if opcode.name not in _OPCODES:
            raise _Refused(f"the pickle opcode {opcode.name}")
        argument: Any = None
        if opcode.name == "STRING":
            # pickletools' own reader wants ASCII, which Python 2's images are not.
            data.readline()
        elif opcode.arg is not None:
            argument = opcode.arg.reader(data)  # type: ignore[arg-type]
        if opcode.name in _MEMO_OPCODES and argument > most:
            raise _Refused(f"memo entry {argument} of a pickle of {len(data)} bytes")
        if opcode.name == "STOP":
            return
    raise _Refused(f"more than {most} pickle opcodes")


class _Global:
    """Stands for a function that a pickle may call; a state that would change it is refused."""

    def __init__(self, function: Callable[..., object]) -> None:
        self._function = function

    def __call__(self, *arguments: object) -> object:
        return self._function(*arguments)

    def __setstate__(self, state: object) -> None:
        raise _Refused("a state for a global")


class _DType:
    """A numpy dtype of numbers, booleans, byte strings or objects, as its pickle describes it."""

    def __init__(self, code: object, *_: object) -> None:
        self.code = code.decode("latin-1") if isinstance(code, bytes) else str(code)
        if not re.fullmatch(r"[biu][1248]|f[248]|O[48]?|S[0-9]{1,9}", self.code):
            raise _Refused(f"the numpy dtype {self.code[:20]!a}")
        self.order = "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order = state[1].decode("latin-1") if isinstance(state[1], bytes) else state[1]
        if order not in ("<", ">", "=", "|"):
            raise _Refused("a numpy dtype of an unknown byte order")
        self.order = order

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.order + self.code)


class _Array:
    """A numpy array, as its pickle describes it; the elements stay where they are in the pickle."""

    def __init__(self, *_: object) -> None:
        self.values: np.ndarray = np.zeros(0)
        self.data: bytes | bytearray | list[object] = b""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, _, data = state
        self.fill(data, dtype, shape)

    def fill(self, data: object, dtype: object, shape: object) -> None:
        if not isinstance(dtype, _DType) or not isinstance(shape, tuple):
            raise _Refused("a numpy array without a dtype or a shape")
        if dtype.code.startswith("O"):
            if not isinstance(data, list) or shape != (len(data),):
                raise _Refused("a numpy array of objects that is no list")
        elif not isinstance(data, bytes | bytearray):
            raise _Refused("a numpy array without its bytes")
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
        raise _Refused(f"the global {f'{module}.{name}'[:100]!a}")

    def _encode(self, text: str, encoding: str) -> bytes:
        if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
            raise _Refused("a call of _codecs.encode with arguments that are not a verification set's")
        self._copied += len(text)
        if self._copied > self._size:
            raise _Refused("one string encoded again and again")
        return text.encode("latin-1")

    def _bytes(self, *arguments: Any) -> bytes:
        match arguments:
            case ():
                return b""
            case (bytes() as data,):
                return data
            case (str() as text, str() as encoding):
                return self._encode(text, encoding)
        raise _Refused("a call of bytes with arguments that are not a verification set's")


def _scalar(dtype: object, data: object) -> object:
    if not isinstance(dtype, _DType) or not isinstance(data, bytes) or dtype.code.startswith("O"):
        raise _Refused("a numpy scalar that is no number")
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
        if len(items.values) > _FREE_IMAGES + items.values.nbytes // _BYTES_PER_IMAGE:
            raise _Refused(f"an array of {len(items.values)} {what}")
        items = items.values.tolist()
    if not isinstance(items, list | tuple):
        raise _Refused(f"no list where one of {what} was due")
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
            raise _Refused(f"a {type(item).__name__.lstrip('_')} among the images")
        return data

    return [image(item) for item in _elements(items, "images")]


def _flags(items: object) -> np.ndarray:
    flags = _elements(items, "booleans")
    for flag in flags:
        if not isinstance(flag, int | float) or flag not in (0, 1):
            shown = f"the number {flag}" if isinstance(flag, int | float) else f"a {type(flag).__name__.lstrip('_')}"
            raise _Refused(f"{shown[:60]} among the booleans")
    return np.array(flags, dtype=bool)


def _parse(data: mmap.mmap) -> tuple[list[bytes], np.ndarray]:
    try:
        _scan(data)
        data.seek(0)
        match _SetUnpickler(data).load():
            case [images, is_same]:
                return _images(images), _flags(is_same)
            case other:
                raise _Refused(f"a {type(other).__name__.lstrip('_')}, not a pair of lists")
    except (_Refused, MemoryError):
        raise
    # Unpicklers throw what a damaged pickle makes them run into: IndexError, KeyError, TypeError and others.
    except Exception as error:
        what = textwrap.shorten(str(error), 100, placeholder="...").encode("unicode_escape").decode()
        raise _Refused(f"a damaged pickle ({what})") from None


def _refuse_repetition(images: Sequence[bytes], size: int, name: Path) -> None:
    """A pickle may name one image any number of times, for two bytes each, and each is decoded to 38 kB."""
    if len(images) > _FREE_IMAGES + size // _BYTES_PER_IMAGE:
        raise DataError(
            f"{name} names {len(images)} images in {size} bytes: the same ones again and again; wanted a verification "
            "set of some thousand pairs"
        )


def _check(images: Sequence[bytes], is_same: np.ndarray, name: str) -> None:
    if len(images) != 2 * len(is_same) or not len(images):
        raise DataError(
            f"{name}: {len(images)} images and {len(is_same)} booleans; a verification set has two images a pair, "
            "and one pair at least"
        )


def list_bins(folder: str | os.PathLike[str]) -> list[Path]:
    """List the verification sets of a folder.

    Other files that end in ``.bin`` (macOS's ``._lfw.bin``, weights such as ``pytorch_model.bin``) are passed over with
    a warning. A damaged or empty set, a Git LFS pointer and an HTML page are not: whoever reads them is told.

    Args:
        folder: any folder.

    Returns:
        The paths, by name.
    """
    found = []
    for path in sorted(Path(folder).glob("*.bin")):
        what = "its name begins with a dot" if path.name.startswith(".") else _other_kind(path)
        if what is None:
            found.append(path)
        else:
            logger.warning("passed over %s, which is no verification set: %s", path, what)
    return found


def _other_kind(path: Path) -> str | None:
    """What a file is that nobody meant for a verification set, or None."""
    try:
        with open_regular(path) as stream:
            head = stream.read(_HEAD)
    except OSError:
        return None
    instead = found_instead(head)
    if not head or _BEGINNING.match(head) or (instead is not None and not is_archive(head)):
        return None
    return instead or f"it starts with {head[:8]!r}"


def read_bin(path: str | os.PathLike[str]) -> VerificationSet:
    """Read a verification set; nothing that a hostile file says is run.

    Args:
        path: an InsightFace ``.bin`` file.

    Returns:
        The encoded images and the truth about each pair.

    Raises:
        DataError: no such file, not a verification set, or a pickle that holds anything else, which is named.
    """
    name = Path(path)
    try:
        with open_regular(name) as stream:
            size = os.fstat(stream.fileno()).st_size
            if size == 0:
                raise DataError(f"{name} is empty; copy or download it again")
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
                instead = found_instead(data[:_HEAD])
                if instead is not None:
                    raise DataError(f"{name} is no verification set: {instead}")
                images, is_same = _parse(data)
    except OSError as error:
        raise DataError(f"cannot read {name}: {error.strerror}") from None
    except _Refused as refusal:
        raise DataError(
            f"{name} is no verification set: it holds {refusal}; wanted a pickled list of images and one of booleans"
        ) from None
    _check(images, is_same, str(name))
    _refuse_repetition(images, size, name)
    return VerificationSet(name.stem, images, is_same)


def write_bin(path: str | os.PathLike[str], images: Sequence[bytes], is_same: Sequence[bool] | np.ndarray) -> None:
    """Write a verification set that InsightFace's own tools read; the file appears whole or not at all.

    Args:
        path: the ``.bin`` file; its folder must exist.
        images: encoded images, 2P of them; ``images[2i]`` and ``images[2i + 1]`` are pair i.
        is_same: P booleans.

    Raises:
        DataError: the counts do not fit, or an image is not bytes.
        OSError: the file cannot be written.
    """
    truths = np.asarray(is_same, dtype=bool)
    _check(images, truths, os.fspath(path))
    for number, image in enumerate(images):
        if not isinstance(image, bytes) or not image:
            raise DataError(
                f"{os.fspath(path)}: image {number} is {type(image).__name__}, wanted an encoded image as bytes"
            )
    with atomic_write(path) as stream:
        pickle.dump((list(images), truths.tolist()), stream, protocol=4)


def _fit(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Scale the shorter edge to ``size[0]`` where the width is another, as the host's ``load_bin`` does.

    Raises:
        DataError: that is another size than ``size``.
    """
    import cv2

    height, width = pixels.shape[:2]
    if width != size[0]:
        shorter = min(height, width)
        height, width = size[0] * height // shorter, size[0] * width // shorter
    if (height, width) != size:
        raise DataError(f"it is {height}x{width} after scaling, wanted {size[0]}x{size[1]}")
    if pixels.shape[:2] == size:
        return pixels
    return cv2.resize(pixels, size[::-1], interpolation=cv2.INTER_CUBIC)


def decode(verification_set: VerificationSet, size: tuple[int, int] = (112, 112)) -> torch.Tensor:
    """Decode the images of a verification set.

    Images of another size are scaled, bicubic, as the host's ``eval/verification.py`` scales them.

    Args:
        verification_set: the encoded images.
        size: height and width wanted, in pixels.

    Returns:
        uint8 (2P, 3, H, W), RGB, 0..255.

    Raises:
        DataError: an image that cannot be decoded or is not of the wanted shape; the message names it.
    """
    decoded = torch.empty((len(verification_set.images), *size, 3), dtype=torch.uint8)
    rows = decoded.numpy()
    # A set's file may name one image many times; it is one object then.
    places: dict[int, int] = {}
    for number, image in enumerate(verification_set.images):
        place = places.setdefault(id(image), number)
        try:
            rows[number] = rows[place] if place < number else _fit(decode_rgb(image), size)
        except DataError as error:
            raise DataError(f"{verification_set.name}: image {number}: {error}") from None
    return decoded.permute(0, 3, 1, 2).contiguous()
