"""Files that are, or might be, verification sets."""

import io
import pickle
import struct
from pathlib import Path
from typing import Any, ClassVar

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


class _Python2(pickle._Pickler):
    """Writes byte strings as Python 2 wrote its texts; for all else, old protocols are what they were."""

    dispatch: ClassVar[dict[type, Any]] = dict(pickle._Pickler.dispatch)

    def save_text(self: Any, text: bytes) -> None:
        if self.proto == 0:
            self.write(b"S" + repr(text)[1:].encode() + b"\n")
        elif len(text) < 256:
            self.write(b"U" + bytes([len(text)]) + text)
        else:
            self.write(b"T" + struct.pack("<i", len(text)) + text)
        self.memoize(text)

    dispatch[bytes] = save_text


def python_2_pickle(images: list[bytes], same: list[bool], protocol: int) -> bytes:
    """What Python 2's pickle writes for ``(images, same)``."""
    stream = io.BytesIO()
    _Python2(stream, protocol).dump((images, same))
    return stream.getvalue()
