"""Verification pairs out of a data set: as many of one person as of two, in ten folds of different people."""

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from arcface_kd.data.dataset import open_dataset
from arcface_kd.data.formats.pair_identities import write_pair_identities
from arcface_kd.data.formats.verification_bin import write_bin
from arcface_kd.data.pack import stored_form
from arcface_kd.errors import ConfigError, DataError

T = TypeVar("T")

FOLDS = 10


class PairCounts(NamedTuple):
    """Counts of drawn pairs, half of them of one person."""

    pairs: int
    people: int
    images: int

    def __str__(self) -> str:
        return (
            f"{self.pairs} pairs of {self.people} people on {self.images} images, in {FOLDS} folds of other people each"
        )


def _ring(items: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Every two items once: neighbours on a ring, then those two steps apart, and so on."""
    count = len(items)
    for step in range(1, count // 2 + 1):
        for place in range(count if 2 * step < count else step):
            yield items[place], items[(place + step) % count]


def _in_turn(rows: Iterable[Iterable[T]]) -> Iterator[T]:
    """The first of each row, then the second of each, and so on."""
    pending = [iter(row) for row in rows]
    while pending:
        left = []
        for row in pending:
            for item in islice(row, 1):
                left.append(row)
                yield item
        pending = left


def choose_pairs(labels: NDArray[np.int64], most: int, seed: int = 0) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Choose pairs of images, no pair twice: indices (P, 2), and whether they are of one person, (P,).

    People are dealt to ten folds, those with many images first, so that no one is in two folds: a threshold that nine
    folds choose is judged on people it has not seen, as in LFW's protocol. Within a fold people take turns, so that
    those with many images do not outweigh the others. Kinds come in turn, fold by fold; fewer than ``most`` where the
    people do not give as many.
    """
    if most < 2 * FOLDS:
        raise ConfigError(f"{most} pairs are fewer than two for each of {FOLDS} folds; ask for {2 * FOLDS} or more")
    # RandomState's numbers are promised never to change, those of numpy's newer generators are not.
    random = np.random.RandomState(seed)
    order = random.permutation(len(labels))
    people: dict[int, list[int]] = {}
    for image, label in zip(order.tolist(), labels[order].tolist(), strict=True):
        if label >= 0:
            people.setdefault(label, []).append(image)
    rows = sorted(people.values(), key=len, reverse=True)
    several = sum(len(row) > 1 for row in rows)
    if len(rows) < 2 * FOLDS or several < FOLDS:
        raise DataError(
            f"{len(rows)} people, {several} of them with two images or more; wanted at least {2 * FOLDS} and {FOLDS}, "
            "so that each of ten folds has people of its own"
        )
    folds: list[list[list[int]]] = [[] for _ in range(FOLDS)]
    for place, row in enumerate(rows):
        turn, fold = divmod(place, FOLDS)
        # There and back, so that the first fold does not always get the larger share.
        folds[fold if turn % 2 == 0 else FOLDS - 1 - fold].append(row)
    wanted = most // (2 * FOLDS)
    for people_of_fold in folds:
        random.shuffle(people_of_fold)
    # Two begin at the other end, so that both kinds together show as many people as they can.
    kinds = [(list(islice(_in_turn(map(_ring, fold)), wanted)), _of_two(fold[::-1], labels, wanted)) for fold in folds]
    count = min(len(pairs) for both in kinds for pairs in both)
    chosen = [
        pair for same, different in kinds for both in zip(same[:count], different[:count], strict=True) for pair in both
    ]
    return np.array(chosen), np.tile([True, False], FOLDS * count)


def _of_two(people: list[list[int]], labels: NDArray[np.int64], wanted: int) -> list[tuple[int, int]]:
    pairs = _ring(list(_in_turn(people)))
    return list(islice(((one, two) for one, two in pairs if labels[one] != labels[two]), wanted))


def write_pairs(
    folder: str | os.PathLike[str], out: str | os.PathLike[str], *, pairs: int = 6000, seed: int = 0
) -> PairCounts:
    """Write a verification set of people that no network is trained on and, beside it, who is on its images.

    Images are stored as :func:`~arcface_kd.data.pack.pack_folder` stores them.

    Raises:
        ConfigError: a seed out of range, or a name that does not end in ``.bin``, as those of such sets do.
        DataError: the file exists, or too few people or images.
    """
    if Path(out).suffix != ".bin":
        raise ConfigError(f"{out}: the name of a verification set ends in .bin")
    if Path(out).exists():
        raise DataError(f"{out} exists; remove it or choose another name")
    if not 0 <= seed < 1 << 32:
        raise ConfigError(f"seed is {seed}; it must be in 0 .. {(1 << 32) - 1}")
    faces = open_dataset(folder)
    labels = faces.labels()
    try:
        chosen, same = choose_pairs(labels, pairs, seed)
    except DataError as error:
        raise DataError(f"{folder}: {error}") from None
    images = [stored_form(faces.image_bytes(index), faces.where(index))[0] for index in chosen.ravel().tolist()]
    write_bin(out, images, same)
    write_pair_identities(out, [str(label) for label in labels[chosen].ravel()])
    return PairCounts(len(same), len(np.unique(labels[chosen])), len(np.unique(chosen)))
