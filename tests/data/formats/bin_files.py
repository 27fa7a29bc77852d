"""Files that are, or might be, verification sets."""

import struct
from pathlib import Path

import pytest

from arcface_kd.data.formats.verification_bin import read_bin
from arcface_kd.errors import DataError

IMAGES = [b"", b"\x00", b"\xff\xd8'\"\\\n\r\t\x00\x80\xff", bytes(range(256)) * 3]
SAME = [True, False]


def stored(folder: Path, content: bytes) -> Path:
    path = folder / "set.bin"
    path.write_bytes(content)
    return path


def refused(folder: Path, content: bytes) -> str:
    """The message with which a file is refused."""
    path = stored(folder, content)
    with pytest.raises(DataError) as caught:
        read_bin(path)
    message = str(caught.value)
    assert message.isprintable()
    assert message.startswith(str(path))
    assert len(message) < 400 + len(str(path))
    return message


def python_2_repr(text: bytes) -> bytes:
    """Python 2's repr of a str."""
    quote = b'"' if b"'" in text and b'"' not in text else b"'"
    out = b""
    for code in text:
        char = bytes([code])
        if char in (quote, b"\\"):
            out += b"\\" + char
        elif char in b"\n\r\t":
            out += {b"\n": b"\\n", b"\r": b"\\r", b"\t": b"\\t"}[char]
        else:
            out += char if 32 <= code < 127 else b"\\x%02x" % code
    return quote + out + quote


def python_2_pickle(images: list[bytes], same: list[bool], protocol: int) -> bytes:
    """What Python 2's pickle writes for ``(images, same)``, opcode by opcode."""
    memo = 0

    def put() -> bytes:
        nonlocal memo
        memo += 1
        if protocol == 0:
            return b"p%d\n" % (memo - 1)
        return b"q" + bytes([memo - 1]) if memo <= 256 else b"r" + struct.pack("<I", memo - 1)

    def text(value: bytes) -> bytes:
        if protocol == 0:
            return b"S" + python_2_repr(value) + b"\n" + put()
        head = b"U" + bytes([len(value)]) if len(value) < 256 else b"T" + struct.pack("<i", len(value))
        return head + value + put()

    def truth(value: bool) -> bytes:
        if protocol == 2:
            return b"\x88" if value else b"\x89"
        return b"I01\n" if value else b"I00\n"

    def listed(items: list[bytes]) -> bytes:
        if protocol == 0:
            return b"".join(item + b"a" for item in items)
        return b"(" + b"".join(items) + b"e"

    empty = b"(l" if protocol == 0 else b"]"
    out = b"\x80\x02" if protocol == 2 else b""
    out += b"" if protocol == 2 else b"("
    out += empty + put() + listed([text(image) for image in images])
    out += empty + put() + listed([truth(value) for value in same])
    return out + (b"\x86" if protocol == 2 else b"t") + put() + b"."
