"""``arcface-kd cache``: fill a cache of the teacher's embeddings before a run, on any number of ranks.

Each image is decoded once; its mirror image is made from the pixels that training would see.
"""

import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from arcface_kd.config.kd import KDConfig
from arcface_kd.data.bad_records import SkippedRecords
from arcface_kd.data.dataset import View
from arcface_kd.data.fingerprint import fingerprint
from arcface_kd.data.joined import open_rec
from arcface_kd.data.loader import BatchViews, FaceLoader
from arcface_kd.data.sampler import ViewSampler
from arcface_kd.distributed.process_group import process_group
from arcface_kd.distributed.ranks import RankGroup, on_first_rank_first
from arcface_kd.errors import ConfigError, TeacherError
from arcface_kd.system.device import default_device
from arcface_kd.system.memory import named_shortages
from arcface_kd.teachers.base import Teacher, load_teacher
from arcface_kd.teachers.cache.embedding_cache import EmbeddingCache, identity_of, in_cached_precision, readable_size
from arcface_kd.teachers.collapse import warn_of_collapse

# A bar that nobody watches goes into a log: a line now and then is enough.
_SECONDS_BETWEEN_LINES = 30.0


@dataclass(frozen=True)
class CacheReport:
    """Result of filling.

    ``missing`` counts rows that were missing before, on all ranks, ``unreadable`` those among them whose records cannot
    be read and were skipped. The speed counts images, each in both views; 0 where nothing was missing.
    """

    path: Path
    images: int
    embedding_size: int
    size: int
    missing: int
    images_per_second: float
    unreadable: int = 0

    def __str__(self) -> str:
        what = (
            f"{self.path}: {readable_size(self.size)}, {self.images} images, two views, {self.embedding_size} numbers"
        )
        if self.missing == 0:
            return f"{what}; nothing was missing"
        done = f"{self.missing - self.unreadable} of {2 * self.images} rows were missing and are there now"
        bad = f"; {self.unreadable} rows of bad records are still missing" if self.unreadable else ""
        return f"{what}; {done} ({self.images_per_second:.0f} images/s){bad}"


class _PlainViews(ViewSampler):
    """The plain views of some records, in their order."""

    def __init__(self, records: NDArray[np.int64]) -> None:
        super().__init__(len(records), shuffle=False, flip=False)
        self.records = records

    def __iter__(self) -> Iterator[View]:
        for view in super().__iter__():
            yield View(int(self.records[view.index]), False)


def fill_cache(config: Mapping[str, Any], *, teacher: Teacher | None = None) -> CacheReport:
    """Write the teacher's embeddings of every training image, plain and mirrored, into ``kd_cache``.

    Only missing rows are computed, shared out evenly among the ranks. Where ``kd_on_bad_record`` is ``skip``, the rows
    of records that cannot be read stay missing; a run that skips them too never asks for them.
    """
    kd = KDConfig.from_config(config)
    if kd.cache is None:
        raise ConfigError("no file for the cache: name it with --out FILE, or kd_cache in the config")
    if config.get("rec") is None:
        raise ConfigError("the config sets no rec, the folder with the training images")
    if config.get("dali"):
        raise ConfigError("dali=True: DALI does not say which records a batch holds, as a cache needs; set dali=False")
    place = f"filling {kd.cache}"
    with process_group() as (rank, local_rank, _), named_shortages(lambda: place, "lower batch_size"):
        if torch.cuda.is_available():
            torch.cuda.set_device(local_rank)
        teacher = teacher if teacher is not None else load_run_teacher(kd)
        keys = (config.get("num_classes"), kd.on_bad_record, config.get("rec_identities"))
        faces = open_rec(config["rec"], *keys, rank=rank)
        identity = identity_of(teacher, fingerprint(faces), len(faces))
        cache = on_first_rank_first(lambda: EmbeddingCache(str(kd.cache), identity))
        device = default_device(local_rank)
        missing = ~_known(cache, RankGroup(), device)
        records = np.flatnonzero(missing.any(1))
        own = _share(records, RankGroup())
        warn_of_collapse(teacher, faces, cache, device)
        skipped = SkippedRecords()
        began = time.perf_counter()
        if len(own):
            loader = FaceLoader(
                faces,
                batch_size=int(config.get("batch_size", 128)),
                sampler=_PlainViews(own),
                num_workers=int(config.get("num_workers", 2)),
                device=device,
                drop_last=False,
                skipped=skipped,
            )
            with tqdm(
                total=len(own),
                desc=f"{cache.path.name}, {readable_size(cache.size)}",
                unit="image",
                mininterval=0.1 if sys.stderr.isatty() else _SECONDS_BETWEEN_LINES,
                disable=rank != 0,
                dynamic_ncols=True,
            ) as bar:
                _fill(cache, teacher, loader, missing, bar)
        # The slowest rank's time is the run's; nobody leaves before all rows are there.
        seconds = float(RankGroup().max_(torch.tensor(time.perf_counter() - began, device=device)))
        bad = np.intersect1d(own, np.array(list(skipped.found), dtype=np.int64))
        unreadable = int(RankGroup().sum_(torch.tensor(int(missing[bad].sum()), device=device)))
        return CacheReport(
            path=cache.path,
            images=cache.images,
            embedding_size=cache.embedding_size,
            size=cache.size,
            missing=int(missing.sum()),
            images_per_second=len(records) / seconds if len(records) else 0.0,
            unreadable=unreadable,
        )


def load_run_teacher(kd: KDConfig) -> Teacher:
    """Load the teacher that a run's keys name, in its cache's precision where they name no precision.

    Raises:
        TeacherError: the keys name no teacher, or see :func:`arcface_kd.teachers.base.load_teacher`.
    """
    if kd.teacher is None:
        raise TeacherError("a cache keeps a teacher's embeddings: give a teacher with --kd-teacher FILE")
    options: Any = kd.options.get("teacher")
    if kd.cache is not None:
        options = in_cached_precision(options, kd.cache, len(kd.teacher) if isinstance(kd.teacher, tuple) else 1)
    return load_teacher(kd.teacher, options)


def _share(records: NDArray[np.int64], ranks: RankGroup) -> NDArray[np.int64]:
    """This rank's contiguous share: neighbours in the file are read and written together."""
    own: NDArray[Any] = np.array_split(records, ranks.world_size)[ranks.rank]
    return own


def _known(cache: EmbeddingCache, ranks: RankGroup, device: torch.device) -> NDArray[Any]:
    """(images, 2) bool, which rows are there; each rank reads its share of the file."""
    known = np.zeros((cache.images, 2), dtype=np.uint8)
    own = _share(np.arange(cache.images), ranks)
    if len(own):
        known[own[0] : own[-1] + 1] = cache.known(int(own[0]), int(own[-1]) + 1)
    return ranks.max_(torch.from_numpy(known).to(device)).cpu().numpy().astype(bool)


def _fill(
    cache: EmbeddingCache, teacher: Teacher, loader: FaceLoader, missing: NDArray[np.bool_], bar: "tqdm[Any]"
) -> None:
    shown: list[BatchViews] = []
    loader.on_batch = shown.append
    for images, _ in loader:
        index = shown.pop().index
        for flipped in (False, True):
            wanted = torch.from_numpy(missing[index.numpy(), int(flipped)])
            if wanted.any():
                chosen = images[wanted.to(images.device)]
                embeddings = teacher(chosen.flip(3) if flipped else chosen)
                cache.store(index[wanted], torch.full((len(chosen),), flipped), embeddings)
        bar.update(len(images))
