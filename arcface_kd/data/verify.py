"""Look at every image of a data set before a network is trained on it."""

import hashlib
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from arcface_kd.data.dataset import IMAGE_SIZE, FaceDataset
from arcface_kd.data.formats.image import decode_rgb
from arcface_kd.data.joined import Rec, folders_of, open_rec
from arcface_kd.errors import DataError

_AT_ONCE = 4096
_SHOWN = 20
_UNREADABLE = (0, 0)
_NO_LABEL = -2


class _Seen(NamedTuple):
    label: int
    digest: int
    size: tuple[int, int]
    fault: str | None


@dataclass(frozen=True)
class DataReport:
    """What a data set holds."""

    title: str  # the folders
    images: int  # number of images
    people: int  # identities with an image
    per_person: tuple[int, float, int]  # fewest, median and most images of one of them
    single: int  # identities with one image
    empty: list[int]  # labels below the largest that no image has
    nobody: int  # images with the label -1
    sizes: Counter[tuple[int, int]]  # images by height and width; of those that can be decoded
    repeated: int  # images whose file occurred before
    shared: list[tuple[str, str]]  # of these, pairs of images under different labels, each with its place
    faults: list[str]  # what a run would stop at: images that cannot be read or are not 112x112, labels that cannot be

    def __str__(self) -> str:
        least, median, most = self.per_person
        classes = self.people + len(self.empty)
        lines = [f"{self.title}: num_classes={classes} num_image={self.images}"]
        if self.people:
            lines.append(
                f"people: {self.people}, with {least} to {most} images, median {median:g}; {self.single} have one"
            )
        sizes = ", ".join(f"{height}x{width} {count}" for (height, width), count in self.sizes.most_common())
        lines.append(f"sizes: {sizes}")
        if self.empty:
            lines.append(f"labels without an image: {len(self.empty)} of {classes}: {_some(self.empty)}")
        if self.nobody:
            lines.append(f"images of nobody (label -1): {self.nobody}")
        if self.repeated:
            lines.append(f"files that occur again: {self.repeated}, {len(self.shared)} of them under another label")
            lines += _listed([f"{one} and {other}" for one, other in self.shared])
        if self.faults:
            lines.append(f"images that a run would stop at: {len(self.faults)}")
            lines += _listed(self.faults)
        return "\n".join(lines)


def _some(labels: list[int]) -> str:
    return ", ".join(map(str, labels[:_SHOWN])) + (", ..." if len(labels) > _SHOWN else "")


def _listed(lines: list[str]) -> list[str]:
    more = [f"  and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    return [f"  {line}" for line in lines[:_SHOWN]] + more


def verify(rec: Rec, *, num_classes: int | None = None) -> DataReport:
    """Decode every image of one data set or several, and count what may be wrong with it.

    Args:
        rec: see :func:`~arcface_kd.data.joined.open_rec`.
        num_classes: labels must be below it; 0 for none, as in a run; None for no limit.

    Raises:
        DataError: the set cannot be opened.
    """
    from tqdm import tqdm

    # Several sets read all labels when they are opened: what is wrong with one must not be the end.
    faces = open_rec(rec, 0 if num_classes == 0 else None, on_bad_record="skip")
    labels, digests = np.empty(len(faces), dtype=np.int64), np.empty(len(faces), dtype=np.uint64)
    sizes: Counter[tuple[int, int]] = Counter()
    faults = []

    # OpenCV and hashlib let other threads run.
    with ThreadPoolExecutor(os.cpu_count()) as pool, tqdm(total=len(faces), unit="image", disable=None) as bar:
        for start in range(0, len(faces), _AT_ONCE):
            batch = range(start, min(start + _AT_ONCE, len(faces)))
            for index, seen in zip(batch, pool.map(partial(_look, faces, num_classes), batch), strict=True):
                labels[index], digests[index] = seen.label, seen.digest
                sizes[seen.size] += 1
                if seen.fault is not None:
                    faults.append(seen.fault)
            bar.update(len(batch))
    del sizes[_UNREADABLE]
    counts = np.bincount(labels[labels >= 0])
    there = counts[counts > 0] if counts.any() else np.zeros(1, dtype=np.int64)
    repeated, shared = _repeated(faces, labels, digests)
    return DataReport(
        title=", ".join(folders_of(rec)),
        images=len(faces),
        people=int((counts > 0).sum()),
        per_person=(int(there.min()), float(np.median(there)), int(there.max())),
        single=int((counts == 1).sum()),
        empty=np.flatnonzero(counts == 0).tolist(),
        nobody=int((labels == -1).sum()),
        sizes=sizes,
        repeated=repeated,
        shared=shared,
        faults=faults,
    )


def _look(faces: FaceDataset, num_classes: int | None, index: int) -> _Seen:
    try:
        data, label = faces.image_bytes(index), faces.label(index)
        digest = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
    except DataError as error:
        return _Seen(_NO_LABEL, index, _UNREADABLE, str(error))
    try:
        height, width = decode_rgb(data).shape[:2]
    except DataError as error:
        return _Seen(label, digest, _UNREADABLE, f"{faces.where(index)}: {error}")
    fault = None
    if (height, width) != IMAGE_SIZE:
        fault = f"{faces.where(index)}: the image is {height}x{width} pixels, wanted 112x112"
    elif num_classes is not None and label >= num_classes:
        fault = f"{faces.where(index)}: its label is {label}, but num_classes is {num_classes}"
    return _Seen(label, digest, (height, width), fault)


def _repeated(
    faces: FaceDataset, labels: NDArray[np.int64], digests: NDArray[np.uint64]
) -> tuple[int, list[tuple[str, str]]]:
    """How many files occurred before, and where those under another label than at first are."""
    order = np.argsort(digests, kind="stable")
    again = np.flatnonzero(digests[order][1:] == digests[order][:-1]) + 1
    first = np.arange(len(order))
    first[again] = 0
    first = np.maximum.accumulate(first)[again]
    pairs = zip(order[first].tolist(), order[again].tolist(), strict=True)
    shared = sorted((one, other) for one, other in pairs if labels[one] != labels[other])
    return len(again), [(faces.where(one), faces.where(other)) for one, other in shared]
