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

_TAB, _NEWLINE, _RETURN, _ZERO = b"\t\n\r0"
_INDEX_LINE = re.compile(rb"[0-9]{1,18}\t[0-9]{1,18}\r?")
_MAX_DIGITS = 18
# Large enough to amortise numpy's calls, small enough that the working arrays stay in the processor's cache.
_INDEX_CHUNK = 1 << 20
_COMPARED_AT_ONCE = 1 << 16
BUILD_ANEW = "build it anew with `arcface-kd data index`"


def _column(digits: NDArray[Any], stops: NDArray[np.int64], widths: NDArray[np.int64]) -> NDArray[Any]:
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


def _parse_even_lines(text: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]] | None:
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


def _parse_index_chunk(chunk: bytes) -> tuple[NDArray[Any], NDArray[Any]] | None:
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
            index[:, lines : lines + len(parsed[0])] = parsed
            lines += len(parsed[0])
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
    """Check what can be told without reading a record: keys and offsets occur once, and offsets fit the file."""
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
