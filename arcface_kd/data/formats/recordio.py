"""MXNet RecordIO (``.rec`` and ``.idx``) read through a memory map and written, without mxnet.

A ``.rec`` file is a row of parts: the magic number ``0xced7230a``, a word whose upper 3 bits are the continuation flag
and lower 29 the length, the bytes, zeros up to a multiple of 4. Flag 0 is a whole record. Where a record holds the
magic number at a multiple of 4, the writer cuts it there and leaves the number out: the parts are flagged 1, 2, ..., 3
and the reader puts the number back between them. Format: dmlc-core ``recordio.h``.
"""

import mmap
import os
import struct
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from functools import cached_property
from multiprocessing.context import get_spawning_popen
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

# Patched trainers import them from here.
from arcface_kd.data.formats.record import RecordHeader as RecordHeader
from arcface_kd.data.formats.record import pack as pack
from arcface_kd.data.formats.record import unpack as unpack
from arcface_kd.data.formats.record_index import BUILD_ANEW, ascending, check_index, read_index
from arcface_kd.errors import BadRecordError, DataError
from arcface_kd.system.downloads import found_instead
from arcface_kd.system.files import atomic_write, open_regular

if TYPE_CHECKING:
    from typing_extensions import Self

MAGIC = 0xCED7230A
PART = struct.Struct("<II")
LENGTH_BITS = 29
LENGTH_MASK = (1 << LENGTH_BITS) - 1
WHOLE, FIRST, MIDDLE, LAST = range(4)
_HEAD = 512
_MAGIC_BYTES = struct.pack("<I", MAGIC)


class RecordReader:
    """Random access to a ``.rec`` file through its ``.idx``.

    The file is mapped, not read: a record costs a slice of the map, and all processes on a machine share the pages. The
    index is one int64 array of 16 bytes a record. Workers made by fork share it as it is; when a reader is sent to a
    worker made by spawn or forkserver, the index moves to shared memory once and every worker maps it.

    Opening checks all but the records: the index is well formed, no key or offset occurs twice, every offset lies in
    the file, the first record begins where the file does and the last one ends where it ends. Reading checks the rest:
    no record reaches into the next, so that records put together of many parts are never longer in all than the file.

    Args:
        rec_path: the ``.rec`` file.
        idx_path: its index.

    Raises:
        DataError: a file is missing, empty, cut short, damaged, or the two do not belong together.
    """

    def __init__(self, rec_path: str | os.PathLike[str], idx_path: str | os.PathLike[str]) -> None:
        self.rec_path = Path(rec_path)
        self.idx_path = Path(idx_path)
        self._open_map()
        try:
            self._hold(torch.from_numpy(self._read_index()))
            self._check_index()
        except DataError:
            self.close()
            raise

    def _read_index(self) -> NDArray[np.int64]:
        try:
            return read_index(self.idx_path)
        except FileNotFoundError:
            raise DataError(
                f"{self.rec_path} has lost its index, {self.idx_path.name}: build it with `arcface-kd data index "
                f"{self.rec_path.parent}`"
            ) from None
        except OSError as error:
            raise DataError(f"cannot read {self.idx_path}: {error.strerror}") from None

    def _hold(self, index: torch.Tensor) -> None:
        self._index = index
        self._keys, self._offsets = index.numpy()

    def _open_map(self) -> None:
        try:
            with open_regular(self.rec_path) as stream:
                size = os.fstat(stream.fileno()).st_size
                if size == 0:
                    raise DataError(f"{self.rec_path} is empty; copy or download it again")
                self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
                instead = found_instead(self._map[:_HEAD])
                if instead is not None:
                    raise DataError(f"{self.rec_path} holds no records: {instead}")
        except OSError as error:
            raise DataError(f"cannot read {self.rec_path}: {error.strerror}") from None
        self._view = memoryview(self._map)
        self._size = len(self._view)

    def _check_index(self) -> None:
        check_index(self._keys, self._offsets, self._size, self.rec_path, self.idx_path)
        _, end = self._record(int(self._offsets.argmax()))
        if end < self._size:
            raise DataError(
                f"{self.idx_path} lists records up to byte {end}, but {self.rec_path} goes on to byte {self._size}: "
                f"the index is cut short or belongs to another file; {BUILD_ANEW}"
            )

    @property
    def keys(self) -> NDArray[np.int64]:
        """The record keys, int64 (N,), in the order of the ``.idx`` file."""
        return cast("NDArray[np.int64]", self._keys)

    @property
    def offsets(self) -> NDArray[np.int64]:
        """The records' byte offsets in the ``.rec`` file, int64 (N,), in the order of the ``.idx`` file."""
        return cast("NDArray[np.int64]", self._offsets)

    @cached_property
    def key_order(self) -> NDArray[np.int64] | None:
        """The positions in the order of their keys, int64 (N,); None where the index has that order already."""
        return None if ascending(self.keys) else np.argsort(self.keys, kind="stable")

    @cached_property
    def _rising_offsets(self) -> NDArray[np.int64] | None:
        """The offsets in their order, int64 (N,); None where the index has that order already."""
        return None if ascending(self.offsets) else np.sort(self.offsets)

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

    def find(self, keys: NDArray[np.int64]) -> NDArray[np.int64]:
        """Positions for ``read_at`` of keys, -1 where the index has no such key."""
        order = self.key_order
        places = np.minimum(np.searchsorted(self.keys, keys, sorter=order), len(self) - 1)
        positions = places if order is None else order[places]
        return np.where(self.keys[positions] == keys, positions, -1)

    def read(self, key: int) -> bytes | memoryview:
        """Read the record with a key: a view of the map, or bytes where several parts had to be put together.

        Raises:
            DataError: no such key.
            BadRecordError: a damaged record; the message names key, byte offset and reason.
        """
        position = int(self.find(np.array([key], dtype=np.int64))[0])
        if position < 0:
            raise DataError(f"{self.idx_path} has no key {key}")
        return self.read_at(position)

    def read_at(self, position: int) -> bytes | memoryview:
        """Read the record at a position of the index, 0 .. ``len(self) - 1``; see ``read``."""
        return self._record(position)[0]

    def where(self, position: int) -> str:
        """Say which record stands at a position of the index: file, key and byte offset, for messages."""
        return f"{self.rec_path}: record with key {self.keys[position]} at byte {self.offsets[position]}"

    def _record(self, position: int) -> tuple[bytes | memoryview, int]:
        """The record at a position and the byte after its padding."""
        limit = self._next_listed(position)
        flag, part, end = self._part(position, int(self._offsets[position]), limit)
        record: bytes | memoryview = part
        if flag == FIRST:
            parts = [part]
            while flag != LAST:
                flag, part, end = self._part(position, end, limit)
                if flag not in (MIDDLE, LAST):
                    raise self._damaged(position, f"a part flagged {flag} follows where 2 or 3 was due")
                parts.append(part)
            record = _MAGIC_BYTES.join(parts)
        elif flag != WHOLE:
            raise self._damaged(position, f"it starts with a part flagged {flag}, wanted 0 or 1")
        # The next record's magic number shows a wrong length, which would otherwise hand on half an image.
        if end < self._size and self._view[end : end + 4] != _MAGIC_BYTES:
            raise self._damaged(position, f"no record follows at byte {end}, so that its length is wrong")
        return record, end

    def _part(self, position: int, offset: int, limit: int) -> tuple[int, memoryview, int]:
        """Continuation flag and bytes of the part at ``offset``, and the byte after its padding, at most ``limit``."""
        start = offset + PART.size
        if start > self._size:
            raise self._damaged(position, f"the file ends at byte {self._size} inside it: it is cut short")
        magic, word = PART.unpack_from(self._view, offset)
        if magic != MAGIC:
            reason = f"no record starts at byte {offset} (found {magic:#010x}, wanted {MAGIC:#x})"
            raise self._damaged(position, f"{reason}: the file is damaged or {self.idx_path.name} is not its index")
        length = word & LENGTH_MASK
        end = start + (length + 3 & ~3)
        if end > self._size:
            raise self._damaged(position, f"it ends at byte {end}, but the file has {self._size}: it is cut short")
        if end > limit:
            reason = f"it goes on to byte {end}, into the record that {self.idx_path.name} lists at byte {limit}"
            raise self._damaged(position, reason)
        return word >> LENGTH_BITS, self._view[start : start + length], end

    def _damaged(self, position: int, reason: str) -> BadRecordError:
        return BadRecordError(f"{self.where(position)}: {reason}")

    def close(self) -> None:
        """Close the file; the map itself goes when the last record that views it is gone."""
        self._view.release()
        with suppress(BufferError):
            self._map.close()

    def __enter__(self) -> "Self":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> tuple[Path, Path, int, object]:
        if get_spawning_popen() is not None and not self._index.is_shared():
            # Without room in /dev/shm every worker gets a copy of its own, which costs memory but is right.
            with suppress(RuntimeError):
                self._hold(self._index.clone().share_memory_())
        index = self._index if self._index.is_shared() else self._index.numpy()
        return self.rec_path, self.idx_path, self._size, index

    def __setstate__(self, state: tuple[Path, Path, int, Any]) -> None:
        self.rec_path, self.idx_path, size, index = state
        self._hold(torch.as_tensor(index))
        self._open_map()
        if self._size != size:
            self.close()
            raise DataError(f"{self.rec_path} had {size} bytes when it was opened and has {self._size} now")


class RecordWriter:
    """Write a ``.rec`` file and its ``.idx``, byte for byte as mxnet's ``MXIndexedRecordIO`` does.

    A context manager: both files appear when the block ends, and neither does when it raises. Their folder must exist.
    """

    def __init__(self, rec_path: str | os.PathLike[str], idx_path: str | os.PathLike[str]) -> None:
        self.rec_path = Path(rec_path)
        self.idx_path = Path(idx_path)

    def __enter__(self) -> "Self":
        with ExitStack() as files:
            # Left in reverse: records without an index are no data set, so the index is the last to appear.
            self._idx = files.enter_context(atomic_write(self.idx_path))
            self._rec = files.enter_context(atomic_write(self.rec_path))
            self._files = files.pop_all()
        self._offset = 0
        return self

    def __exit__(self, *raised: Any) -> None:
        if raised[1] is not None:
            self._files.__exit__(*raised)
            return
        with self._files:
            self.sync()

    def sync(self) -> None:
        """Bring what was written to the disk: a full one shows here, before either file is in place."""
        for stream in (self._idx, self._rec):
            stream.flush()
            os.fsync(stream.fileno())

    def write(self, key: int, record: bytes) -> None:
        """Append a record of less than 2**29 bytes, as ``pack`` returns them, under a key of its own, 0 or more.

        Raises:
            DataError: the record is too long or the key is negative.
        """
        if len(record) > LENGTH_MASK:
            raise DataError(f"the record with key {key} has {len(record)} bytes; RecordIO holds less than {1 << 29}")
        if key < 0:
            raise DataError(f"a record's key must not be negative, got {key}")
        self._idx.write(b"%d\t%d\n" % (key, self._offset))
        start = 0
        for cut in _aligned_magic(record):
            self._write_part(MIDDLE if start else FIRST, record[start:cut])
            start = cut + len(_MAGIC_BYTES)
        self._write_part(LAST if start else WHOLE, record[start:])

    def replace_first(self, record: bytes) -> None:
        """Put another record of the same length in the place of the first one, which must be whole."""
        self._rec.seek(PART.size)
        self._rec.write(record)
        self._rec.seek(0, os.SEEK_END)

    def _write_part(self, flag: int, part: bytes) -> None:
        padding = b"\0" * (-len(part) % 4)
        self._rec.write(PART.pack(MAGIC, flag << LENGTH_BITS | len(part)))
        self._rec.write(part)
        self._rec.write(padding)
        self._offset += PART.size + len(part) + len(padding)


def _aligned_magic(record: bytes) -> Iterator[int]:
    """Where the magic number stands at a multiple of 4."""
    found = record.find(_MAGIC_BYTES)
    while found >= 0:
        if found % 4 == 0:
            yield found
        # The number's four bytes differ, so that two occurrences cannot overlap.
        found = record.find(_MAGIC_BYTES, found + 4)
