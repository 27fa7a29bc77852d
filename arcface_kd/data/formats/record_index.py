"""The index of a record file: ``.idx``, text, one ``key<TAB>byte offset`` a record."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from arcface_kd.errors import DataError
from arcface_kd.system.downloads import found_instead
from arcface_kd.system.files import open_regular

LARGEST_KEY = 10**18 - 1
_INDEX_LINE = re.compile(rb"[0-9]{1,18}\t[0-9]{1,18}\r?")
# Large enough to amortise numpy's calls, small enough that the working arrays stay in the processor's cache.
_INDEX_CHUNK = 1 << 20
_COMPARED_AT_ONCE = 1 << 16
BUILD_ANEW = "build it anew with `arcface-kd data index`"


def _parse_index_chunk(chunk: bytes) -> NDArray[np.int64] | None:
    """Keys and offsets of whole lines, int64 (2, N), or None where a line is not ``digits<TAB>digits``."""
    lines = chunk.count(b"\n")
    if chunk.replace(b"\r\n", b"\n").translate(None, b"0123456789") != b"\t\n" * lines:
        return None
    # Numbers that int64 cannot hold become its largest.
    numbers = np.fromstring(chunk, dtype=np.int64, sep=" ")
    if len(numbers) != 2 * lines or numbers.max() > LARGEST_KEY:
        return None
    return numbers.reshape(-1, 2).T


def _bad_index_line(path: Path, lines_before: int, chunk: bytes) -> DataError:
    instead = None if lines_before else found_instead(chunk)
    if instead is not None:
        return DataError(f"{path} is no index: {instead}")
    lines = chunk.split(b"\n")
    bad = next(place for place, line in enumerate(lines) if not _INDEX_LINE.fullmatch(line))
    number = lines_before + bad + 1
    return DataError(f"{path}: line {number} is {lines[bad][:40]!r}, wanted 'key<TAB>offset'; {BUILD_ANEW}")


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


def read_index(path: Path) -> NDArray[np.int64]:
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
            index[:, lines : lines + parsed.shape[1]] = parsed
            lines += parsed.shape[1]
    if not lines:
        raise DataError(f"{path} is empty; {BUILD_ANEW}")
    return index


def ascending(values: NDArray[Any]) -> bool:
    """Whether each value is above the one before it."""
    # In pieces: the process would keep the memory of a comparison of all.
    pieces = (values[start : start + _COMPARED_AT_ONCE + 1] for start in range(0, len(values), _COMPARED_AT_ONCE))
    return all(bool(np.all(piece[1:] > piece[:-1])) for piece in pieces)


def _repeated(values: NDArray[Any]) -> int | None:
    """A value that occurs more than once, or None."""
    if ascending(values):
        return None
    ordered = np.sort(values)
    repeated = np.flatnonzero(ordered[1:] == ordered[:-1])
    return int(ordered[repeated[0]]) if len(repeated) else None


def check_index(keys: NDArray[np.int64], offsets: NDArray[np.int64], size: int, rec_path: Path, idx_path: Path) -> None:
    """Check without reading a record: keys and offsets occur once, and offsets fit the file."""
    last = int(offsets.argmax())
    if int(offsets[last]) >= size:
        raise DataError(
            f"{idx_path}: key {keys[last]} points to byte {offsets[last]}, but {rec_path} has {size} bytes: it is cut "
            "short or the index belongs to another file"
        )
    crooked = np.flatnonzero(offsets & 3)
    if len(crooked):
        where = int(crooked[0])
        raise DataError(
            f"{idx_path}: key {keys[where]} points to byte {offsets[where]}, which is no multiple of 4: {BUILD_ANEW}"
        )
    for what, values in (("key", keys), ("byte offset", offsets)):
        twice = _repeated(values)
        if twice is not None:
            raise DataError(
                f"{idx_path}: the {what} {twice} occurs twice, as where two indexes are joined: {BUILD_ANEW}"
            )
    first = int(offsets.min())
    if first > 0:
        raise DataError(
            f"{idx_path} lists records from byte {first} on, but {rec_path} begins at byte 0: the index has lost its "
            f"beginning or belongs to another file; {BUILD_ANEW}"
        )
