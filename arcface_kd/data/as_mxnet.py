"""What arcface_torch's ``dataset.py`` and ``eval/verification.py`` call of mxnet, without mxnet.

For data sets of users' own: ``arcface-kd patch`` writes ``from arcface_kd.data import as_mxnet as mx`` into trainers
whose lines it does not know. Another name of mxnet's than these is an AttributeError.
"""

import os
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from arcface_kd.data.formats.image import decode_rgb
from arcface_kd.data.formats.record import unpack as unpack_record
from arcface_kd.data.formats.recordio import RecordReader
from arcface_kd.errors import ConfigError


class IRHeader(NamedTuple):
    """What stands before the image in a record, under mxnet's names."""

    flag: int
    label: float | NDArray[Any]
    id: int
    id2: int


class MXIndexedRecordIO:
    """A ``.rec`` file that is read through its ``.idx``."""

    def __init__(self, idx_path: str | os.PathLike[str], uri: str | os.PathLike[str], flag: str) -> None:
        if flag != "r":
            raise ConfigError(f"MXIndexedRecordIO has flag={flag!r}; without mxnet it only reads: see RecordWriter")
        self._reader = RecordReader(uri, idx_path)
        self.keys: list[int] = self._reader.keys.tolist()

    def read_idx(self, idx: int) -> bytes:
        """The record with a key."""
        return bytes(self._reader.read(int(idx)))

    def close(self) -> None:
        """Close the file."""
        self._reader.close()


def _unpack(s: bytes) -> tuple[IRHeader, bytes]:
    header, payload = unpack_record(s)
    return IRHeader(header.flag, header.label, header.id, header.id2), bytes(payload)


class _Pixels(np.ndarray):  # type: ignore[type-arg]
    """Pixels as mxnet's arrays hand them out."""

    def asnumpy(self) -> NDArray[Any]:
        return np.asarray(self)


def _imdecode(buf: bytes | bytearray | NDArray[np.uint8], to_rgb: bool = True) -> _Pixels:
    pixels = decode_rgb(bytes(buf))
    return (pixels if to_rgb else pixels[..., ::-1].copy()).view(_Pixels)


def _resize_short(src: NDArray[np.uint8], size: int, interp: int = 2) -> _Pixels:
    import cv2

    height, width = src.shape[:2]
    wanted = size * width // min(height, width), size * height // min(height, width)
    return np.asarray(cv2.resize(np.asarray(src), wanted, interpolation=interp)).view(_Pixels)


def _transpose(data: NDArray[Any], axes: Sequence[int]) -> _Pixels:
    return np.ascontiguousarray(np.transpose(np.asarray(data), axes)).view(_Pixels)


def _flip(data: NDArray[Any], axis: int) -> _Pixels:
    return np.ascontiguousarray(np.flip(np.asarray(data), axis)).view(_Pixels)


recordio = SimpleNamespace(IRHeader=IRHeader, MXIndexedRecordIO=MXIndexedRecordIO, unpack=_unpack)
image = SimpleNamespace(imdecode=_imdecode, resize_short=_resize_short)
nd = ndarray = SimpleNamespace(transpose=_transpose, flip=_flip)
