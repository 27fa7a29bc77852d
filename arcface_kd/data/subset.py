"""A smaller data set out of a larger one: a few images of each identity, for few-shot runs."""

import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from arcface_kd.data.dataset import RecordDataset
from arcface_kd.data.formats.verification_bin import list_bins
from arcface_kd.data.pack import refuse_records, write_identities
from arcface_kd.errors import ConfigError, DataError
from arcface_kd.system.files import atomic_write, open_regular


class SubsetCounts(NamedTuple):
    """Result of a subset; ``fewer`` identities had not as many images as asked for, and kept all."""

    identities: int
    images: int
    fewer: int

    def __str__(self) -> str:
        few = f"; {self.fewer} identities had no more to give" if self.fewer else ""
        return f"num_classes={self.identities} num_image={self.images}{few}"


def choose_images(labels: NDArray[np.int64], per_identity: int, seed: int = 0) -> NDArray[np.int64]:
    """Choose up to so many images of each identity: places in ``labels``, by identity, in their order.

    With one seed, a smaller choice is part of every larger one, so that runs on 1, 2 and 5 images an identity differ in
    how much they saw and in nothing else. Images of negative labels are not chosen.
    """
    # RandomState's numbers are promised never to change, those of numpy's newer generators are not.
    order = np.random.RandomState(seed).permutation(len(labels))
    order = order[labels[order] >= 0]
    order = order[np.argsort(labels[order], kind="stable")]
    _, first = np.unique(labels[order], return_index=True)
    place = np.arange(len(order)) - np.repeat(first, np.diff([*first, len(order)]))
    chosen = order[place < per_identity]
    return cast("NDArray[np.int64]", chosen[np.lexsort((chosen, labels[chosen]))])


def write_subset(
    folder: str | os.PathLike[str], out: str | os.PathLike[str], *, images_per_identity: int, seed: int = 0
) -> SubsetCounts:
    """Write records with a few images of each identity; labels stay as they are, and images byte for byte.

    Verification sets (``*.bin``) come along, as hard links where the file system has them. On an error ``out`` is as it
    was.
    """
    if images_per_identity < 1:
        raise ConfigError(f"images_per_identity is {images_per_identity}; it must be at least 1")
    if not 0 <= seed < 1 << 32:
        raise ConfigError(f"seed is {seed}; it must be in 0 .. {(1 << 32) - 1}")
    source, target = Path(folder), Path(out)
    refuse_records(target)
    verification_sets = list_bins(source)
    odd = next((path for path in verification_sets if not path.is_file()), None)
    if odd is not None:
        raise DataError(f"{odd} is no file, or a link to none; remove it, or put the verification set there")
    faces = RecordDataset(source)
    labels = faces.labels()
    chosen = choose_images(labels, images_per_identity, seed)
    if not len(chosen):
        raise DataError(f"no image in {source} has an identity: there is nothing to choose from")
    classes = max(int(labels.max()) + 1, faces.stated_classes or 0)
    sizes = np.bincount(labels[chosen], minlength=classes)

    write_identities(target, sizes.tolist(), map(faces.image_bytes, chosen.tolist()))
    for verification_set in verification_sets:
        _bring_along(verification_set, target / verification_set.name)
    there = np.bincount(labels[labels >= 0], minlength=classes)
    return SubsetCounts(classes, len(chosen), int((there < images_per_identity).sum()))


def _bring_along(file: Path, to: Path) -> None:
    if to.exists():
        return
    try:
        with suppress(OSError):
            # A relative link would lead elsewhere from there.
            os.link(file.resolve(), to)
        if not to.exists():
            with open_regular(file) as stored, atomic_write(to) as stream:
                shutil.copyfileobj(stored, stream)
    except OSError as error:
        raise DataError(f"cannot copy {file} to {to}: {error.strerror}") from None
