"""Small data sets for runs that last seconds: drawn ones, and a corner of the real ones."""

from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from arcface_kd.data.formats.record import unpack
from arcface_kd.data.formats.recordio import RecordReader
from arcface_kd.data.formats.verification_bin import read_bin, write_bin
from arcface_kd.data.pack import write_identities

SIZE = 112


class Faces(NamedTuple):
    """A folder with ``train.rec``, ``train.idx``, ``property`` and ``pairs.bin``, and what a config says of it."""

    folder: Path
    num_classes: int
    num_image: int


def _jpeg(pixels: np.ndarray) -> bytes:
    return cv2.imencode(".jpg", np.clip(pixels, 0, 255).astype(np.uint8))[1].tobytes()


def _write(folder: Path, people: list[list[bytes]]) -> Faces:
    write_identities(folder, [len(person) for person in people], chain.from_iterable(people))
    return Faces(folder, len(people), sum(map(len, people)))


def draw_faces(folder: Path, identities: int, images: int, seed: int = 0) -> Faces:
    """Identities as coarse colour patterns under noise: no faces, but a student can tell them apart."""
    people, pairs = _drawn(identities, images, seed)
    write_bin(folder / "pairs.bin", pairs, [at % 2 == 0 for at in range(len(pairs) // 2)])
    return _write(folder, people)


@lru_cache(maxsize=16)
def _drawn(identities: int, images: int, seed: int) -> tuple[list[list[bytes]], list[bytes]]:
    """Each person's images, and the two of each pair one after the other."""
    random = np.random.default_rng(seed)

    def view(pattern: np.ndarray) -> bytes:
        large = cv2.resize(pattern, (SIZE, SIZE), interpolation=cv2.INTER_CUBIC)
        return _jpeg(large + random.normal(0, 25, large.shape))

    # Mirror images of one identity are the same identity, as with faces.
    halves = random.uniform(0, 255, (identities + 4, 6, 3, 3))
    patterns = np.concatenate([halves, halves[:, :, ::-1]], axis=2)
    images_of = [[view(pattern) for _ in range(images)] for pattern in patterns[:identities]]
    pairs = [(view(patterns[at % 4 + identities]), view(patterns[(at + at % 2) % 4 + identities])) for at in range(40)]
    return images_of, [image for pair in pairs for image in pair]


def cut_faces(real: Path, folder: Path, identities: int, images: int) -> Faces:
    """The first identities of the real records that have enough images, and some of the real pairs."""
    found: dict[int, list[bytes]] = {}
    with RecordReader(real / "train.rec", real / "train.idx") as reader:
        for key in reader.keys:
            header, payload = unpack(reader.read(int(key)))
            if header.flag == 0:
                found.setdefault(int(header.label), []).append(bytes(payload))
    chosen = [person[:images] for person in found.values() if len(person) >= images][:identities]
    pairs = read_bin(real / "lfw_dev.bin")
    same, other = np.flatnonzero(pairs.is_same)[:20], np.flatnonzero(~pairs.is_same)[:20]
    kept = np.stack([same, other], axis=1).reshape(-1)
    write_bin(
        folder / "pairs.bin",
        [pairs.images[2 * pair + side] for pair in kept for side in (0, 1)],
        [bool(pairs.is_same[pair]) for pair in kept],
    )
    return _write(folder, chosen)
