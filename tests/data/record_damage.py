"""Ways to damage one record of a file."""

import struct
from pathlib import Path

import numpy as np

from arcface_kd.data.formats.recordio import RecordReader


def offset_of(folder: Path, key: int) -> int:
    with RecordReader(folder / "train.rec", folder / "train.idx") as reader:
        return int(reader.offsets[reader.find(np.array([key]))[0]])


def overwrite(folder: Path, place: int, data: bytes) -> None:
    with open(folder / "train.rec", "r+b") as stream:
        stream.seek(place)
        stream.write(data)


def no_magic(folder: Path, key: int) -> None:
    """Also makes the record before it one whose length nothing confirms."""
    overwrite(folder, offset_of(folder, key), b"\0\0\0\0")


def no_image(folder: Path, key: int) -> None:
    overwrite(folder, offset_of(folder, key) + 8 + 24, b"\0" * 64)


def no_number(folder: Path, key: int) -> None:
    overwrite(folder, offset_of(folder, key) + 8 + 4, struct.pack("<f", float("nan")))


def too_many_labels(folder: Path, key: int) -> None:
    overwrite(folder, offset_of(folder, key) + 8, struct.pack("<I", 1 << 30))
