"""Who is on the images of verification pairs, as far as it is known.

A ``.bin`` says of each pair only whether it shows one person. Pairs share persons, though, so their scores are not
independent of each other, and a confidence interval has to know. A text file beside the ``.bin`` may name the persons;
elsewhere images that occur in several pairs tie the pairs together.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from arcface_kd.data.formats.verification_bin import VerificationSet
from arcface_kd.errors import DataError
from arcface_kd.system.files import atomic_write

Source = Literal["stated", "shared images", "unknown"]


class PairIdentities(NamedTuple):
    """The persons of a verification set."""

    # (P, 2) int64, a number for each person; equal within a genuine pair. Without a file that states them one person
    # may have several numbers, never two persons one.
    numbers: NDArray[np.int64]
    # ``stated`` in a file; from ``shared images``; ``unknown`` where no image occurs twice.
    source: Source


def identities_file(bin_path: str | os.PathLike[str]) -> Path:
    """Where the persons of a verification set are named: ``lfw.identities.txt`` beside ``lfw.bin``."""
    return Path(bin_path).with_suffix(".identities.txt")


def write_pair_identities(bin_path: str | os.PathLike[str], names: Sequence[str]) -> None:
    """Name the person on each image of a verification set: 2P names in the order of its images."""
    with atomic_write(identities_file(bin_path)) as stream:
        stream.write("".join(f"{name}\n" for name in names).encode())


def pair_identities(bin_path: str | os.PathLike[str], verification_set: VerificationSet) -> PairIdentities:
    """Find the persons of a verification set, and how they are known."""
    path = identities_file(bin_path)
    if path.is_file():
        return PairIdentities(_stated(path, verification_set.is_same), "stated")
    return _from_shared_images(verification_set)


def _stated(path: Path, is_same: NDArray[np.bool_]) -> NDArray[np.int64]:
    try:
        names = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as text: {error}") from None
    if len(names) != 2 * len(is_same):
        raise DataError(f"{path} names {len(names)} persons; wanted one line for each of {2 * len(is_same)} images")
    numbers = np.unique(np.array(names), return_inverse=True)[1].reshape(-1, 2).astype(np.int64)
    wrong = np.flatnonzero((numbers[:, 0] == numbers[:, 1]) != is_same)
    if len(wrong):
        pair = int(wrong[0])
        kind = "one person" if is_same[pair] else "two persons"
        raise DataError(
            f"{path}: pair {pair} is of {kind} in the .bin file, but its lines are {names[2 * pair]!r} and "
            f"{names[2 * pair + 1]!r}; it belongs to other pairs"
        )
    return cast("NDArray[np.int64]", numbers)


def _from_shared_images(verification_set: VerificationSet) -> PairIdentities:
    """Number the persons after the images: one image has one person, and so have the two of a genuine pair."""
    numbers: dict[bytes, int] = {}
    images = np.array([numbers.setdefault(image, len(numbers)) for image in verification_set.images], dtype=np.int64)
    parent = list(range(len(numbers)))

    def root(image: int) -> int:
        while parent[image] != image:
            parent[image] = parent[parent[image]]
            image = parent[image]
        return image

    pairs = images.reshape(-1, 2)
    for one, other in pairs[verification_set.is_same].tolist():
        parent[root(one)] = root(other)
    roots = np.array([root(image) for image in range(len(numbers))], dtype=np.int64)
    return PairIdentities(roots[pairs], "unknown" if len(numbers) == len(images) else "shared images")
