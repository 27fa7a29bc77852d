"""A whole face data set of synthetic identities, in the trainer's own files."""

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from arcface_kd.data.formats.pair_identities import write_pair_identities
from arcface_kd.data.formats.verification_bin import write_bin
from arcface_kd.data.pack import write_identities
from arcface_kd.data.synthetic_faces.faces import SyntheticFaces

FOLDS = 10
"""Verification is ten-fold over consecutive pairs."""

_PAIR_STREAM = 2


def draw_pairs(pairs: int, identities: int, rng: np.random.Generator) -> tuple[NDArray[Any], NDArray[Any]]:
    """Choose who is compared with whom: in each of ten folds, first pairs of one person, then of two.

    From P, a multiple of 20, to persons (P, 2) and whether a pair is of one, bool (P,).
    """
    is_same = np.tile(np.repeat([True, False], pairs // (2 * FOLDS)), FOLDS)
    first = rng.integers(identities, size=pairs)
    other = (first + rng.integers(1, identities, size=pairs)) % identities
    return np.stack([first, np.where(is_same, first, other)], 1), is_same


# A process draws many identities of one population.
_population = lru_cache(maxsize=1)(SyntheticFaces)


def _draw(task: tuple[int, int, int]) -> list[bytes]:
    """The first images of one person: (seed, identity, number of images)."""
    seed, identity, images = task
    return [_population(seed).jpeg(identity, index) for index in range(images)]


def write_dataset(
    out: str | os.PathLike[str],
    *,
    identities: int = 300,
    images_per_identity: int = 20,
    pairs: int = 1200,
    heldout_identities: int = 100,
    heldout_from: int | None = None,
    seed: int = 0,
    title: str | None = None,
    processes: int = 1,
) -> None:
    """Draw a training set and a verification set; the same seed gives the same files.

    ``train.rec``, ``train.idx`` and ``property`` hold identities 0 .. ``identities`` - 1 of the population in
    InsightFace's layout, labelled by number. ``synthetic.bin`` holds pairs of ``heldout_identities`` others;
    each of its images occurs once, and ``synthetic.identities.txt`` says whom it shows. In each of ten consecutive
    folds, as many pairs are of one person as of two.

    Args:
        out: folder for the files; made when missing. Files of the same names are replaced.
        identities: training identities, the classes; 2 or more.
        images_per_identity: 1 or more.
        pairs: verification pairs, a multiple of 20.
        heldout_identities: verification identities, 2 or more.
        heldout_from: the first of them in the population, at least ``identities``, so that sets of different sizes can
            share them; None takes the one that follows the training identities.
        seed: of the population, not negative.
        title: of the progress bar; None shows none.
        processes: that draw, 1 or more, started by importing the program's main module.

    Raises:
        DataError: ``out`` cannot be written.
    """
    first_heldout = identities if heldout_from is None else heldout_from
    folder = Path(out)
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_PAIR_STREAM,)))
    persons, is_same = draw_pairs(pairs, heldout_identities, rng)
    images_of = np.bincount(persons.ravel(), minlength=heldout_identities)
    # Person by person, so that each is modelled once.
    tasks = [(seed, identity, images_per_identity) for identity in range(identities)]
    tasks += [(seed, first_heldout + person, int(images)) for person, images in enumerate(images_of)]
    with ExitStack() as stack:
        drawn: Iterator[list[bytes]] = map(_draw, tasks)
        if processes > 1:
            pool = stack.enter_context(ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")))
            stack.callback(pool.shutdown, cancel_futures=True)
            drawn = pool.map(_draw, tasks, chunksize=4)
        total = sum(images for _, _, images in tasks)
        # None shows the bar on a terminal only.
        bar = stack.enter_context(tqdm(total=total, desc=title, unit="image", disable=True if title is None else None))

        def training_images() -> Iterator[bytes]:
            for _ in range(identities):
                for image in next(drawn):
                    yield image
                    bar.update()

        write_identities(folder, [images_per_identity] * identities, training_images())
        images = [b""] * persons.size
        for person in range(heldout_identities):
            for place, image in zip(np.flatnonzero(persons.ravel() == person), next(drawn), strict=True):
                images[place] = image
                bar.update()
    write_bin(folder / "synthetic.bin", images, is_same)
    write_pair_identities(
        folder / "synthetic.bin", [str(first_heldout + person) for person in persons.ravel().tolist()]
    )
