"""Go through a record file from its beginning to its end: the headers of all records, or an index that was lost."""

import mmap
import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from arcface_kd.data.formats.record import HEADER
from arcface_kd.data.formats.record_index import LARGEST_KEY, ascending, read_index
from arcface_kd.data.formats.recordio import FIRST, LENGTH_BITS, LENGTH_MASK, MAGIC, MIDDLE, PART, WHOLE, RecordReader
from arcface_kd.errors import DataError
from arcface_kd.system.downloads import found_instead
from arcface_kd.system.files import atomic_write, open_regular

# Records at once: large enough to amortise numpy's calls, small enough that the working arrays take some megabytes.
_CHUNK = 1 << 17
_WORD = 4


class Headers(NamedTuple):
    """The headers of some records."""

    positions: NDArray[np.int64]  # int64 (N,), their positions in the index
    labels: NDArray[np.float32]  # float32 (N,), the first label of each
    images: NDArray[Any]  # bool (N,), False for header and identity records, which have labels and nothing behind them
    # Bool (N,), damaged or empty records and those of several parts: of these the rest says nothing.
    odd: NDArray[np.bool_]


def read_headers(reader: RecordReader) -> Iterator[Headers]:
    """Read the headers of all records that an index lists, in one pass over the file.

    The pass goes through a memory map of its own in the order of the file, so that the disk reads ahead. It takes one
    to two seconds for a million records that the system has in memory, else the time of reading the file once, and
    keeps nothing but the chunk at hand.
    """
    offsets = reader.offsets
    order = None if ascending(offsets) else np.argsort(offsets, kind="stable")
    with open_regular(reader.rec_path) as stream:
        data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    advise = getattr(data, "madvise", lambda *_: None)
    advise(getattr(mmap, "MADV_SEQUENTIAL", 0))
    words = np.frombuffer(data, dtype="<u4", count=len(data) // _WORD)
    for start in range(0, len(offsets), _CHUNK):
        # One more than the chunk: where the next record begins.
        stop = min(start + _CHUNK + 1, len(offsets))
        positions = np.arange(start, stop) if order is None else order[start:stop]
        begins = offsets[positions]
        if len(positions) > _CHUNK:
            ends, begins, positions = begins[1:], begins[:-1], positions[:-1]
        else:
            ends = np.append(begins[1:], len(data))
        yield _headers(words, positions, begins, ends)
        # The pages stay in the system's cache, and no longer count as this process's own.
        advise(getattr(mmap, "MADV_DONTNEED", 0), 0, int(begins[-1]) // mmap.PAGESIZE * mmap.PAGESIZE)


def _headers(
    words: NDArray[Any], positions: NDArray[np.int64], begins: NDArray[np.int64], ends: NDArray[np.int64]
) -> Headers:
    """The headers of records between ``begins`` and at most ``ends``, of which a damaged one says anything."""
    at = begins // _WORD

    def word(place: NDArray[np.int64]) -> NDArray[Any]:
        return words.take(place, mode="clip")

    part = word(at + 1)
    length = (part & LENGTH_MASK).astype(np.int64)
    end = begins + PART.size + (length + 3 & ~3)
    flag = word(at + 2).astype(np.int64)
    labels = word(at + 3).view(np.float32)
    vectors = np.flatnonzero(flag)
    # The labels of a vector stand behind the header.
    labels[vectors] = word(at[vectors] + (PART.size + HEADER.size) // _WORD).view(np.float32)
    payload = length - HEADER.size - _WORD * flag
    followed = (end == len(words) * _WORD) | (word(end // _WORD) == MAGIC)
    whole = (word(at) == MAGIC) & (part >> LENGTH_BITS == WHOLE) & (end <= ends) & followed
    sound = whole & ((payload > 0) | (payload == 0) & (flag > 0))
    return Headers(positions, labels, payload > 0, ~sound)


class BuiltIndex(NamedTuple):
    """Result of building an index."""

    path: Path  # the index
    records: int  # number of records
    fault: str | None  # what was wrong with the one that was there; None for nothing
    built: bool  # whether it was built now

    def __str__(self) -> str:
        if not self.built:
            return f"{self.path} lists all {self.records} records, and was left as it is"
        kept = f"; the one that was there is now {_put_aside(self.path).name}: {self.fault}" if self.fault else ""
        return f"{self.path}: {self.records} records{kept}"


def build_index(path: str | os.PathLike[str]) -> BuiltIndex:
    """Build an index that is missing or does not list the records of its file, each once.

    Behind a header record, keys are the records' places in the file, as InsightFace's layout has them. Without one they
    are the numbers that the records carry, which several threads of ``im2rec`` write in any order, or else the places.
    An index that was wrong is kept beside the new one, as ``train.idx.wrong``.
    """
    rec = Path(path) if Path(path).suffix == ".rec" else Path(path) / "train.rec"
    idx = rec.with_suffix(".idx")
    offsets, numbers, imageless = array("q"), array("Q"), bytearray()
    try:
        with open_regular(rec) as stream:
            if os.fstat(stream.fileno()).st_size == 0:
                raise DataError(f"{rec} is empty; copy or download it again")
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
                for offset, flag, number, payload in _walk(data, rec):
                    offsets.append(offset)
                    numbers.append(number)
                    imageless.append(flag > 0 and payload == 0)
        fault = _fault(idx, np.array(offsets)) if idx.exists() else None
        if idx.exists() and fault is None:
            return BuiltIndex(idx, len(offsets), None, built=False)
        keys = _keys(np.array(numbers), np.frombuffer(imageless, dtype=bool))
        with atomic_write(idx) as out:
            for key, offset in zip(keys, offsets, strict=True):
                out.write(b"%d\t%d\n" % (key, offset))
            if fault is not None:
                os.replace(idx, _put_aside(idx))
    except OSError as error:
        raise DataError(f"cannot build {idx} from {rec}: {error.strerror}") from None
    return BuiltIndex(idx, len(offsets), fault, built=True)


def _put_aside(idx: Path) -> Path:
    return idx.with_name(f"{idx.name}.wrong")


def _fault(idx: Path, offsets: NDArray[np.int64]) -> str | None:
    """What is wrong with an index of records at these offsets, which ascend."""
    try:
        keys, listed = read_index(idx)
    except DataError as error:
        return str(error)
    if len(np.unique(keys)) < len(keys):
        return "a key occurs twice"
    strange = np.setdiff1d(listed, offsets)
    if len(strange):
        return f"no record begins at byte {strange[0]}, which it lists"
    if not np.array_equal(np.sort(listed), offsets):
        return f"it lists {len(np.unique(listed))} of {len(offsets)} records"
    return None


def _keys(numbers: NDArray[np.int64], imageless: NDArray[Any]) -> NDArray[np.int64]:
    """The numbers that records carry where they can be keys, else the records' places in the file."""
    places = np.arange(len(numbers))
    header_first = imageless[0] and numbers[0] == 0
    if header_first or len(np.unique(numbers)) < len(numbers) or numbers.max() > LARGEST_KEY:
        return places
    return numbers if numbers.min() == 0 or not imageless.any() else places


def _walk(data: mmap.mmap, rec: Path) -> Iterator[tuple[int, int, int, int]]:
    """Byte offset, flag, number and bytes of payload of one record after the other."""
    instead = found_instead(data[:512])
    if instead is not None:
        raise DataError(f"{rec} holds no records: {instead}")
    size, offset = len(data), 0
    while offset < size:
        begin, kind, flag, number, payload = offset, FIRST, 0, 0, 0
        while kind in (FIRST, MIDDLE):
            magic, word = PART.unpack_from(data, offset) if offset + PART.size <= size else (MAGIC, LENGTH_MASK)
            length = word & LENGTH_MASK
            end = offset + PART.size + (length + 3 & ~3)
            if magic != MAGIC:
                raise DataError(f"{rec} is damaged: no record begins at byte {offset}; copy or download it again")
            if end > size:
                raise DataError(
                    f"{rec} is cut short: the record at byte {begin} ends behind the file's {size} bytes; copy or "
                    "download it again"
                )
            if offset == begin and length >= HEADER.size:
                flag, _, number, _ = HEADER.unpack_from(data, offset + PART.size)
                payload = length - HEADER.size - 4 * flag
            kind, offset = word >> LENGTH_BITS, end
        yield begin, flag, number, payload
