"""MXNet RecordIO (``.rec`` and ``.idx``) read through a memory map and written, without mxnet.

A ``.rec`` file is a row of parts: the magic number ``0xced7230a``, a word whose upper 3 bits are the continuation flag
and lower 29 the length, the bytes, zeros up to a multiple of 4. Flag 0 is a whole record. Where a record holds the
magic number at a multiple of 4, the writer cuts it there and leaves the number out: the parts are flagged 1, 2, ..., 3
and the reader puts the number back between them. An ``.idx`` file is text, one ``key<TAB>byte offset`` a record.
Format: dmlc-core ``recordio.h``, mxnet 1.9.1 ``recordio.py``.
"""

import mmap
import numbers
import os
import re
import struct
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cached_property
from multiprocessing.context import get_spawning_popen
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch

from arcface_kd.errors import DataError
from arcface_kd.system.files import atomic_write, open_regular

if TYPE_CHECKING:
    from typing_extensions import Self

_MAGIC = 0xCED7230A
_MAGIC_BYTES = struct.pack("<I", _MAGIC)
_PART = struct.Struct("<II")
_HEADER = struct.Struct("<IfQQ")
_LABEL = struct.Struct("<If")
_LENGTH_BITS = 29
_LENGTH_MASK = (1 << _LENGTH_BITS) - 1
_WHOLE, _FIRST, _MIDDLE, _LAST = range(4)

_TAB, _NEWLINE, _RETURN, _ZERO = b"\t\n\r0"
_INDEX_LINE = re.compile(rb"[0-9]{1,18}\t[0-9]{1,18}\r?")
_MAX_DIGITS = 18
# Large enough to amortise numpy's calls, small enough that the working arrays stay in the processor's cache.
_INDEX_CHUNK = 1 << 20
_COMPARED_AT_ONCE = 1 << 16


@dataclass(frozen=True, eq=False)
class RecordHeader:
    """What stands before the image in a record.

    Attributes:
        flag: number of labels in the vector; 0 when ``label`` is a single number.
        label: a number, or a float32 vector (flag,) when ``flag`` > 0. Stored as float32, exact up to 2**24.
        id: the record's number, 0 .. 2**64 - 1; usually its key.
        id2: upper part of the number; 0 in face data sets.
    """

    flag: int
    label: float | np.ndarray
    id: int
    id2: int


def pack(header: RecordHeader, payload: bytes) -> bytes:
    """Put a header before a payload, byte for byte as mxnet does.

    Args:
        header: ``header.flag`` is not read: it follows from ``header.label``, as in mxnet.
        payload: an encoded image, or nothing for header and identity records.

    Returns:
        The record, as ``RecordWriter.write`` takes it.

    Raises:
        DataError: a label or an id that the header cannot hold.
    """
    try:
        if isinstance(header.label, numbers.Number):
            return _HEADER.pack(0, header.label, header.id, header.id2) + payload
        labels = np.asarray(header.label, dtype="<f4")
        return _HEADER.pack(labels.size, 0.0, header.id, header.id2) + labels.tobytes() + payload
    except (struct.error, OverflowError, TypeError, ValueError) as error:
        raise DataError(
            f"a record header cannot hold label {header.label!r}, id {header.id!r}, id2 {header.id2!r}: {error}"
        ) from None


def unpack(record: bytes | memoryview) -> tuple[RecordHeader, memoryview]:
    """Take a record apart.

    Args:
        record: what ``RecordReader.read`` returned.

    Returns:
        The header and the payload; the payload and a label vector are views of ``record``, not copies.

    Raises:
        DataError: the record is shorter than its header says.
    """
    view = memoryview(record)
    if len(view) < _HEADER.size:
        raise DataError(f"a record of {len(view)} bytes is too short for its header of {_HEADER.size}")
    flag, label, number, number2 = _HEADER.unpack_from(view)
    if flag == 0:
        return RecordHeader(0, label, number, number2), view[_HEADER.size :]
    end = _HEADER.size + 4 * flag
    if end > len(view):
        raise DataError(f"a record of {len(view)} bytes is too short for the {flag} labels that its header announces")
    labels = np.frombuffer(view, dtype="<f4", count=flag, offset=_HEADER.size)
    return RecordHeader(flag, labels, number, number2), view[end:]


def unpack_label(record: bytes | memoryview) -> tuple[float, memoryview]:
    """Take the first label and the payload out of a record, without the rest of the header.

    Args:
        record: what ``RecordReader.read`` returned.

    Returns:
        The label as stored, a float32; the payload, a view of ``record``.

    Raises:
        DataError: the record is shorter than its header says.
    """
    if len(record) >= _HEADER.size:
        flag, label = _LABEL.unpack_from(record)
        if flag == 0:
            return label, memoryview(record)[_HEADER.size :]
    header, payload = unpack(record)
    return float(np.asarray(header.label)[0]), payload


def _column(digits: np.ndarray, stops: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """Decimal numbers that end before ``stops`` and are ``widths`` digits long, as int64."""
    values = np.zeros(len(stops), dtype=np.int64)
    narrowest = int(widths.min())
    for place in range(int(widths.max())):
        digit = digits.take(stops - (1 + place), mode="clip").astype(np.int64)
        if place >= narrowest:
            digit[widths <= place] = 0
        digit *= 10**place
        values += digit
    return values


def _parse_even_lines(text: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Keys and offsets of lines of one width with the tab in one place, as nearly all chunks are; else None."""
    width = int((text == _NEWLINE).argmax()) + 1
    tab = int((text[:width] == _TAB).argmax())
    if len(text) % width or not 1 <= tab <= _MAX_DIGITS or not 1 <= width - tab - 2 <= _MAX_DIGITS:
        return None
    lines = text.reshape(-1, width)
    if not (np.all(lines[:, tab] == _TAB) and np.all(lines[:, -1] == _NEWLINE)):
        return None
    # One row a digit place, so that the arithmetic below runs along memory.
    columns = np.subtract(lines.T, np.uint8(_ZERO), order="C")
    numbers = []
    for places in (columns[:tab], columns[tab + 1 : -1]):
        if places.max() > 9:
            return None
        values = np.zeros(columns.shape[1], dtype=np.int64)
        for place in places:
            values *= 10
            values += place
        numbers.append(values)
    return numbers[0], numbers[1]


def _parse_index_chunk(chunk: bytes) -> tuple[np.ndarray, np.ndarray] | None:
    """Keys and offsets of whole lines, or None when a line is not ``digits<TAB>digits``."""
    text = np.frombuffer(chunk, dtype=np.uint8)
    even = _parse_even_lines(text)
    if even is not None:
        return even
    ends = np.flatnonzero(text == _NEWLINE)
    tabs = np.flatnonzero(text == _TAB)
    if len(tabs) != len(ends):
        return None
    starts = np.concatenate(([0], ends[:-1] + 1))
    stops = ends - (text.take(ends - 1, mode="clip") == _RETURN)
    key_widths = tabs - starts
    offset_widths = stops - tabs - 1
    narrowest = min(int(key_widths.min()), int(offset_widths.min()))
    widest = max(int(key_widths.max()), int(offset_widths.max()))
    if narrowest < 1 or widest > _MAX_DIGITS:
        return None
    digits = text - np.uint8(_ZERO)
    if np.count_nonzero(digits <= 9) != int(key_widths.sum()) + int(offset_widths.sum()):
        return None
    return _column(digits, tabs, key_widths), _column(digits, stops, offset_widths)


def _bad_index_line(path: Path, lines_before: int, chunk: bytes) -> DataError:
    lines = chunk.split(b"\n")
    bad = next(place for place, line in enumerate(lines) if not _INDEX_LINE.fullmatch(line))
    number = lines_before + bad + 1
    return DataError(f"{path}: line {number} is {lines[bad][:40]!r}, wanted 'key<TAB>offset'; build the index anew")


def _whole_lines(stream: IO[bytes]) -> Iterator[bytes]:
    """Read a file in chunks that end with a line's end; the last line may lack it."""
    rest = b""
    while block := stream.read(_INDEX_CHUNK):
        head, newline, tail = block.rpartition(b"\n")
        if newline:
            yield rest + head + newline
            rest = tail
        else:
            # A line longer than a chunk is no index: let the parser see it and say so.
            yield rest + block + b"\n"
            return
    if rest:
        yield rest + b"\n"


def _read_index(path: Path) -> np.ndarray:
    """Parse an ``.idx`` file: int64 array (2, N), keys and byte offsets in the order of the file."""
    with open_regular(path) as stream:
        # Counted first and written in place: pieces that are put together at the end leave as much free memory behind,
        # which the process keeps.
        index = np.empty((2, sum(chunk.count(b"\n") for chunk in _whole_lines(stream))), dtype=np.int64)
        stream.seek(0)
        lines = 0
        for chunk in _whole_lines(stream):
            parsed = _parse_index_chunk(chunk)
            if parsed is None:
                raise _bad_index_line(path, lines, chunk)
            index[:, lines : lines + len(parsed[0])] = parsed
            lines += len(parsed[0])
    if not lines:
        raise DataError(f"{path} is empty; build the index anew")
    return index


def _ascending(values: np.ndarray) -> bool:
    # In pieces: the process would keep the memory of a comparison of all.
    pieces = (values[start : start + _COMPARED_AT_ONCE + 1] for start in range(0, len(values), _COMPARED_AT_ONCE))
    return all(bool(np.all(piece[1:] > piece[:-1])) for piece in pieces)


def _repeated(values: np.ndarray) -> int | None:
    """A value that occurs more than once, or None."""
    if _ascending(values):
        return None
    ordered = np.sort(values)
    repeated = np.flatnonzero(ordered[1:] == ordered[:-1])
    return int(ordered[repeated[0]]) if len(repeated) else None


class RecordReader:
    """Random access to a ``.rec`` file through its ``.idx``.

    The file is mapped, not read: a record costs a slice of the map, and all processes on a machine share the pages. The
    index is one int64 array of 16 bytes a record. Workers made by fork share it as it is; when a reader is sent to a
    worker made by spawn or forkserver, the index moves to shared memory once and every worker maps it.

    Opening checks what can be told without touching every record: the index is well formed, no key or offset occurs
    twice, every offset lies in the file, the first record begins where the file does and the last one ends where it
    ends. Reading checks the rest: no record reaches over one that the index lists, so that records of many parts, which
    have to be put together, are never longer in all than the file.

    Attributes:
        rec_path: the ``.rec`` file.
        idx_path: the ``.idx`` file.

    Args:
        rec_path: the ``.rec`` file.
        idx_path: its index.

    Raises:
        DataError: a file is missing, empty, cut short, damaged, or the two do not belong together.
    """

    def __init__(self, rec_path: str | os.PathLike[str], idx_path: str | os.PathLike[str]) -> None:
        self.rec_path = Path(rec_path)
        self.idx_path = Path(idx_path)
        self._shared: torch.Tensor | None = None
        self._open_map()
        try:
            try:
                self._hold(_read_index(self.idx_path))
            except OSError as error:
                raise DataError(f"cannot read {self.idx_path}: {error.strerror}") from None
            self._check_index()
        except DataError:
            self.close()
            raise

    def _hold(self, index: np.ndarray) -> None:
        self._index = index
        self._keys, self._offsets = index

    def _open_map(self) -> None:
        try:
            with open_regular(self.rec_path) as stream:
                size = os.fstat(stream.fileno()).st_size
                if size == 0:
                    raise DataError(f"{self.rec_path} is empty; copy or download it again")
                self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise DataError(f"cannot read {self.rec_path}: {error.strerror}") from None
        self._view = memoryview(self._map)
        self._size = len(self._view)

    def _check_index(self) -> None:
        offsets = self.offsets
        last = int(offsets.argmax())
        if int(offsets[last]) >= self._size:
            raise DataError(
                f"{self.idx_path}: key {self.keys[last]} points to byte {offsets[last]}, but {self.rec_path} has "
                f"{self._size} bytes: it is cut short or the index belongs to another file"
            )
        crooked = np.flatnonzero(offsets & 3)
        if len(crooked):
            where = int(crooked[0])
            raise DataError(
                f"{self.idx_path}: key {self.keys[where]} points to byte {offsets[where]}, which is no multiple of 4: "
                "build the index anew"
            )
        for what, values in (("key", self.keys), ("byte offset", offsets)):
            twice = _repeated(values)
            if twice is not None:
                raise DataError(f"{self.idx_path}: the {what} {twice} occurs twice; build the index anew")
        first = int(offsets.min())
        if first > 0:
            raise DataError(
                f"{self.idx_path} lists records from byte {first} on, but {self.rec_path} begins at byte 0: the "
                "index has lost its beginning or belongs to another file; build it anew"
            )
        _, end = self._record(last)
        if end < self._size:
            raise DataError(
                f"{self.idx_path} lists records up to byte {end}, but {self.rec_path} goes on to byte {self._size}: "
                "the index is cut short or belongs to another file; build it anew"
            )

    @property
    def keys(self) -> np.ndarray:
        """The record keys, int64 (N,), in the order of the ``.idx`` file."""
        return self._keys

    @property
    def offsets(self) -> np.ndarray:
        """The records' byte offsets in the ``.rec`` file, int64 (N,), in the order of the ``.idx`` file."""
        return self._offsets

    @cached_property
    def key_order(self) -> np.ndarray | None:
        """The positions in the order of their keys, int64 (N,); None where the index has that order already."""
        return None if _ascending(self.keys) else np.argsort(self.keys, kind="stable")

    @cached_property
    def _rising_offsets(self) -> np.ndarray | None:
        """The offsets in their order, int64 (N,); None where the index has that order already."""
        return None if _ascending(self.offsets) else np.sort(self.offsets)

    def _next_listed(self, position: int) -> int:
        """The byte offset of the listed record that follows the one at a position in the file, or the file's end."""
        rising = self._rising_offsets
        if rising is None:
            rising, place = self._offsets, position + 1
        else:
            place = int(np.searchsorted(rising, self._offsets[position], side="right"))
        return int(rising[place]) if place < len(rising) else self._size

    def __len__(self) -> int:
        return len(self._offsets)

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Look up where keys stand in the index.

        Args:
            keys: int64 (M,), any keys.

        Returns:
            int64 (M,): positions for ``read_at``, -1 where the index has no such key.
        """
        order = self.key_order
        places = np.minimum(np.searchsorted(self.keys, keys, sorter=order), len(self) - 1)
        positions = places if order is None else order[places]
        return np.where(self.keys[positions] == keys, positions, -1)

    def read(self, key: int) -> bytes | memoryview:
        """Read the record with a key.

        Args:
            key: one of ``keys``.

        Returns:
            The record: a view of the map, or bytes where a record of several parts had to be put together.

        Raises:
            DataError: no such key, or a damaged record; the message names key, byte offset and reason.
        """
        position = int(self.find(np.array([key], dtype=np.int64))[0])
        if position < 0:
            raise DataError(f"{self.idx_path} has no key {key}")
        return self.read_at(position)

    def read_at(self, position: int) -> bytes | memoryview:
        """Read the record at a position of the index.

        Args:
            position: 0 .. ``len(self) - 1``, in the order of the ``.idx`` file.

        Returns:
            The record, as ``read`` gives it.

        Raises:
            DataError: a damaged record; the message names key, byte offset and reason.
        """
        return self._record(position)[0]

    def where(self, position: int) -> str:
        """Say which record stands at a position of the index: file, key and byte offset, for messages."""
        return f"{self.rec_path}: record with key {self.keys[position]} at byte {self.offsets[position]}"

    def _record(self, position: int) -> tuple[bytes | memoryview, int]:
        """The record at a position and the byte after its padding."""
        limit = self._next_listed(position)
        flag, part, end = self._part(position, int(self._offsets[position]), limit)
        record: bytes | memoryview = part
        if flag == _FIRST:
            parts = [part]
            while flag != _LAST:
                flag, part, end = self._part(position, end, limit)
                if flag not in (_MIDDLE, _LAST):
                    raise self._damaged(position, f"a part flagged {flag} follows where 2 or 3 was due")
                parts.append(part)
            record = _MAGIC_BYTES.join(parts)
        elif flag != _WHOLE:
            raise self._damaged(position, f"it starts with a part flagged {flag}, wanted 0 or 1")
        # The next record's magic number tells a wrong length, which would otherwise hand on half an image.
        if end < self._size and self._view[end : end + 4] != _MAGIC_BYTES:
            raise self._damaged(position, f"no record follows at byte {end}, so that its length is wrong")
        return record, end

    def _part(self, position: int, offset: int, limit: int) -> tuple[int, memoryview, int]:
        """Continuation flag and bytes of the part at ``offset``, and the byte after its padding, at most ``limit``."""
        start = offset + _PART.size
        if start > self._size:
            raise self._damaged(position, f"the file ends at byte {self._size} inside it: it is cut short")
        magic, word = _PART.unpack_from(self._view, offset)
        if magic != _MAGIC:
            reason = f"no record starts at byte {offset} (found {magic:#010x}, wanted {_MAGIC:#x})"
            raise self._damaged(position, f"{reason}: the file is damaged or {self.idx_path.name} is not its index")
        length = word & _LENGTH_MASK
        end = start + (length + 3 & ~3)
        if end > self._size:
            raise self._damaged(position, f"it ends at byte {end}, but the file has {self._size}: it is cut short")
        if end > limit:
            reason = f"it goes on to byte {end}, into the record that {self.idx_path.name} lists at byte {limit}"
            raise self._damaged(position, reason)
        return word >> _LENGTH_BITS, self._view[start : start + length], end

    def _damaged(self, position: int, reason: str) -> DataError:
        return DataError(f"{self.where(position)}: {reason}")

    def close(self) -> None:
        """Close the file; the map itself goes when the last record that views it is gone."""
        self._view.release()
        with suppress(BufferError):
            self._map.close()

    def __enter__(self) -> "Self":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        if get_spawning_popen() is not None and self._shared is None:
            # Without room in /dev/shm every worker gets a copy of its own, which is dear but right.
            with suppress(RuntimeError):
                self._shared = torch.from_numpy(self._index).clone().share_memory_()
                self._hold(self._shared.numpy())
        return {
            "rec_path": self.rec_path,
            "idx_path": self.idx_path,
            "size": self._size,
            "index": self._index if self._shared is None else self._shared,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.rec_path = state["rec_path"]
        self.idx_path = state["idx_path"]
        index = state["index"]
        self._shared = index if isinstance(index, torch.Tensor) else None
        self._hold(index if self._shared is None else self._shared.numpy())
        self._open_map()
        if self._size != state["size"]:
            size = self._size
            self.close()
            raise DataError(f"{self.rec_path} had {state['size']} bytes when it was opened and has {size} now")


class RecordWriter:
    """Write a ``.rec`` file and its ``.idx``, byte for byte as mxnet's ``MXIndexedRecordIO`` does.

    A context manager: both files appear when the block ends, and neither does when it raises.

    Args:
        rec_path: the ``.rec`` file; its folder must exist.
        idx_path: its index.
    """

    def __init__(self, rec_path: str | os.PathLike[str], idx_path: str | os.PathLike[str]) -> None:
        self.rec_path = Path(rec_path)
        self.idx_path = Path(idx_path)
        self._offset = 0
        self._files = ExitStack()

    def __enter__(self) -> "Self":
        with ExitStack() as files:
            # Left in reverse: records without an index are no data set, so the index is the last to appear.
            self._idx = files.enter_context(atomic_write(self.idx_path))
            self._rec = files.enter_context(atomic_write(self.rec_path))
            self._files = files.pop_all()
        self._offset = 0
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._files.__exit__(kind, error, trace)
            return
        with self._files:
            self.sync()

    def sync(self) -> None:
        """Bring what was written to the disk: a full one shows here at the latest, before either file is in place.

        Raises:
            OSError: the disk is full or broken.
        """
        for stream in (self._idx, self._rec):
            stream.flush()
            os.fsync(stream.fileno())

    def write(self, key: int, record: bytes) -> None:
        """Append a record.

        Args:
            key: its key in the index, not negative; each key once.
            record: its bytes, less than 2**29, as ``pack`` returns them.

        Raises:
            DataError: the record is too long or the key is negative.
        """
        if len(record) > _LENGTH_MASK:
            raise DataError(f"the record with key {key} has {len(record)} bytes; RecordIO holds less than {1 << 29}")
        if key < 0:
            raise DataError(f"a record's key must not be negative, got {key}")
        self._idx.write(b"%d\t%d\n" % (key, self._offset))
        start = 0
        for cut in _aligned_magic(record):
            self._write_part(_MIDDLE if start else _FIRST, record[start:cut])
            start = cut + len(_MAGIC_BYTES)
        self._write_part(_LAST if start else _WHOLE, record[start:])

    def replace_first(self, record: bytes) -> None:
        """Put another record in the place of the first one, which must be whole and have the same length.

        Args:
            record: its bytes.
        """
        self._rec.seek(_PART.size)
        self._rec.write(record)
        self._rec.seek(0, os.SEEK_END)

    def _write_part(self, flag: int, part: bytes) -> None:
        padding = b"\0" * (-len(part) % 4)
        self._rec.write(_PART.pack(_MAGIC, flag << _LENGTH_BITS | len(part)))
        self._rec.write(part)
        self._rec.write(padding)
        self._offset += _PART.size + len(part) + len(padding)


def _aligned_magic(record: bytes) -> Iterator[int]:
    """Where the magic number stands at a multiple of 4."""
    found = record.find(_MAGIC_BYTES)
    while found >= 0:
        if found % 4 == 0:
            yield found
        # The number's four bytes differ, so that two occurrences cannot overlap.
        found = record.find(_MAGIC_BYTES, found + 4)
