"""Small data sets, written record by record, for the tests to read."""

import os
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest

from arcface_kd.data.dataset import open_dataset
from arcface_kd.data.formats.record import RecordHeader, pack
from arcface_kd.data.formats.recordio import RecordWriter
from arcface_kd.errors import DataError

MAGIC = b"\x0a\x23\xd7\xce"
"""What every part of a record begins with."""


def one_line(error: BaseException) -> str:
    """The message of an error, which must be of one line."""
    assert "\n" not in str(error)
    return str(error)


def make_odd(path: Path, kind: str) -> None:
    """Put something there that is no file: a pipe, a folder, an endless device, or a link to nothing."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "device" else "gone")


def refused(root: Path, num_classes: int | None = None) -> str:
    """The message with which a data set is refused."""
    with pytest.raises(DataError) as caught:
        open_dataset(root, num_classes)
    return one_line(caught.value)


def pixels(seed: int, height: int = 112, width: int = 112) -> np.ndarray:
    """A smooth random picture, uint8 (H, W, 3), BGR."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return cv2.GaussianBlur(noise, (9, 9), 3)


def encoded(seed: int, suffix: str = ".jpg", height: int = 112, width: int = 112) -> bytes:
    """The same picture as a file."""
    return cv2.imencode(suffix, pixels(seed, height, width))[1].tobytes()


def record(key: int, label: float | Sequence[float], payload: bytes) -> bytes:
    """A packed record whose id is its key."""
    return pack(RecordHeader(0, np.array(label) if isinstance(label, Sequence) else label, key, 0), payload)


def write_records(folder: Path, records: list[tuple[int, bytes]], prefix: str = "train") -> Path:
    """Write records under their keys, in the given order."""
    folder.mkdir(exist_ok=True)
    with RecordWriter(folder / f"{prefix}.rec", folder / f"{prefix}.idx") as writer:
        for key, packed in records:
            writer.write(key, packed)
    return folder


def insightface_records(counts: list[int], first_key: int = 1) -> list[tuple[int, bytes]]:
    """Identities with that many images each, in InsightFace's layout; images begin at ``first_key``."""
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    images = [(key, record(key, float(label), encoded(key))) for key, label in enumerate(labels, start=first_key)]
    after = first_key + len(labels)
    starts = first_key + np.cumsum([0, *counts])
    identities = [
        (after + place, record(after + place, [float(starts[place]), float(starts[place + 1])], b""))
        for place in range(len(counts))
    ]
    return [(0, record(0, [float(after), float(after + len(counts))], b"")), *images, *identities]


def plain_records(labels: list[int], first_key: int = 0) -> list[tuple[int, bytes]]:
    """Images only, as ``im2rec`` and ``insightface.data.rec_builder`` write them."""
    return [(key, record(key, float(label), encoded(key))) for key, label in enumerate(labels, start=first_key)]
