"""Batches of faces for training: which views in which order, decoded by workers, normalised on the device."""

import warnings
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, get_worker_info

from arcface_kd.config.augmentation import Augmentation
from arcface_kd.data.bad_records import BadRecord, SkippedRecords
from arcface_kd.data.dataset import IMAGE_SIZE, FaceDataset, View
from arcface_kd.data.joined import Rec, open_rec
from arcface_kd.data.sampler import ViewSampler
from arcface_kd.distributed.ranks import RankGroup
from arcface_kd.errors import ConfigError, DataError, OnBadRecord
from arcface_kd.system.device import default_device


class BatchViews(NamedTuple):
    """Which records a batch shows, and how.

    Attributes:
        index: int64 (B,), on the CPU: indices in the data set; where a bad record is skipped, that of the one shown in
            its place.
        flipped: bool (B,), on the CPU: whether each is mirrored.
        clean: uint8 (B, 112, 112, 3), on the CPU: the images before they were degraded, where the loader keeps them.
        embeddings: float32 (B, D), on the CPU: what was looked up of each view, NaN where nothing is known; where the
            loader looks up.
    """

    index: torch.Tensor  # type: ignore[assignment]
    flipped: torch.Tensor
    clean: torch.Tensor | None = None
    embeddings: torch.Tensor | None = None

    def clean_images(self, device: torch.device) -> torch.Tensor:
        """The images before they were degraded, on a device: float32 (B, 3, 112, 112), RGB, -1 .. 1."""
        assert self.clean is not None
        return _normalise(self.clean.to(device, non_blocking=True))


LookUp = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""From index and flipped (B,) to embeddings (B, D), NaN where nothing is known, and which are known, (B,)."""


class _Batch(NamedTuple):
    pixels: torch.Tensor
    labels: torch.Tensor
    views: BatchViews
    bad: list[BadRecord]


class _BatchReader(Dataset[Any]):
    """A data set's samples by the batch, as workers read them.

    A bad record is returned, not raised: a worker's exception would come out wrapped in its traceback.
    """

    def __init__(self, dataset: FaceDataset) -> None:
        self.dataset = dataset
        self.augmentation: Augmentation | None = None
        self.keeps_clean = False
        self.look_up: LookUp | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, view: View) -> _Batch | DataError:
        return self.__getitems__([view])

    def __getitems__(self, views: list[View]) -> _Batch | DataError:
        pixels = _room(len(views))
        clean = _room(len(views)) if self.keeps_clean else None
        rows, clean_rows = pixels.numpy(), None if clean is None else clean.numpy()
        labels, shown = [0] * len(views), list(views)
        bad: list[BadRecord] = []
        try:
            # Each image is copied while it is hot in the cache; keeping them all to stack them costs a fifth more.
            for place, view in enumerate(views):
                shown[place], labels[place], image = self.dataset.shown(view, bad)
                if clean_rows is not None:
                    clean_rows[place] = image
                rows[place] = image
            self._degrade(rows, labels, views, bad)
        except DataError as error:
            return error
        index, flipped, _ = zip(*shown, strict=True)
        shown_views = BatchViews(torch.tensor(index), torch.tensor(flipped), clean)
        if self.look_up is not None:
            shown_views = shown_views._replace(embeddings=self.look_up(*shown_views[:2])[0])
        return _Batch(pixels, torch.tensor(labels), shown_views, bad)

    def _degrade(self, rows: NDArray[np.uint8], labels: list[int], views: list[View], bad: list[BadRecord]) -> None:
        """Put degraded views in the images' places; a mixture of faces has no label."""
        if self.augmentation is None:
            return
        from arcface_kd.data.views import are_degraded, draws_of, view_of

        def other(share: float) -> NDArray[np.uint8]:
            return self.dataset.shown(View(int(share * len(self)), False), bad)[2]

        seeds = [view.seed for view in views if view.seed is not None]
        if len(seeds) < len(views):
            raise DataError(
                "the sampler gives views without a seed, and student.augment would degrade all images alike: give "
                "View(index, flipped, seed), or take ViewSampler"
            )
        draws = draws_of(seeds)
        for place in np.flatnonzero(are_degraded(draws, self.augmentation)).tolist():
            rows[place], mixed = view_of(rows[place], draws[place], self.augmentation, other)
            labels[place] = -1 if mixed else labels[place]


def _room(images: int) -> torch.Tensor:
    pixels = torch.empty((images, *IMAGE_SIZE, 3), dtype=torch.uint8)
    # Shared before it is filled, the batch need not be copied on its way to the training process.
    return pixels if get_worker_info() is None else pixels.share_memory_()


def _as_it_is(batch: Any) -> Any:
    return batch


def _start_worker(worker: int) -> None:
    import cv2

    # One thread a worker; OpenCV's own pool does not survive a fork.
    cv2.setNumThreads(0)


def _read_ahead(batches: Iterator[_Batch | DataError]) -> Generator[_Batch | DataError, None, None]:
    """Let a thread fetch the next batch while the present one is in use."""
    thread = ThreadPoolExecutor(1, thread_name_prefix="face-loader")
    try:
        pending = thread.submit(next, batches, None)
        while (batch := pending.result()) is not None:
            pending = thread.submit(next, batches, None)
            yield batch
    finally:
        # An iteration that was given up may be collected in this very thread, which cannot wait for itself.
        with suppress(RuntimeError):
            thread.shutdown()


class FaceLoader(DataLoader[Any]):
    """Batches of ``(images, labels)`` on the training device.

    ``images`` is float32 (B, 3, 112, 112), RGB, -1 .. 1; ``labels`` is int64 (B,). The next batch is read while the
    present one is in use: by worker processes, or by a thread when there are none; on a GPU its copy overlaps as well.
    The loader can be iterated any number of times, one iteration at a time; ``loader.sampler.set_epoch`` takes effect
    at the next one.

    Attributes:
        on_batch: called with the ``BatchViews`` of a batch just before that batch is handed out, or None.
        device: where the batches are.
        even: whether every rank gets equally many batches, each of as many records, where all have one batch size.
        skipped: the bad records that were passed over, where the data set passes over them.

    Args:
        dataset: the faces.
        batch_size: records a batch.
        sampler: yields ``View`` objects; all records in order, plain, when None.
        num_workers: worker processes; 0 reads in this one.
        device: where batches go; the CPU when None.
        drop_last: whether to leave out a last batch that is not full.
        skipped: logs the bad records that were skipped; None takes one for this rank alone.

    Raises:
        ConfigError: a batch size or a number of workers that cannot be, or not one full batch when ``drop_last``.
    """

    sampler: ViewSampler
    on_batch: Callable[[BatchViews], None] | None

    def __init__(
        self,
        dataset: FaceDataset,
        *,
        batch_size: int,
        sampler: ViewSampler | None = None,
        num_workers: int = 2,
        device: torch.device | None = None,
        drop_last: bool = True,
        skipped: SkippedRecords | None = None,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}, wanted 1 or more")
        if num_workers < 0:
            raise ConfigError(f"num_workers is {num_workers}, wanted 0 or more")
        if sampler is None:
            sampler = ViewSampler(len(dataset), shuffle=False, flip=False)
        if drop_last and len(sampler) < batch_size:
            raise ConfigError(
                f"batch_size {batch_size} is above the {len(sampler)} records of a rank, and no batch would be full; "
                "lower it"
            )
        self.device = device if device is not None else torch.device("cpu")
        self.on_batch = None
        self._has_workers = False
        self.even = type(sampler) is ViewSampler
        self.skipped = skipped if skipped is not None else SkippedRecords()
        super().__init__(
            _BatchReader(dataset),
            batch_size=batch_size,
            sampler=sampler,
            num_workers=num_workers,
            collate_fn=_as_it_is,
            pin_memory=self.device.type == "cuda",
            drop_last=drop_last,
            worker_init_fn=_start_worker,
            persistent_workers=num_workers > 0,
            # Starting an iteration draws a number for the workers; a generator of its own leaves the run's alone.
            generator=torch.Generator(),
        )

    @property
    def faces(self) -> FaceDataset:
        """The data set behind the batches."""
        return self._reader.dataset

    @property
    def _reader(self) -> _BatchReader:
        assert isinstance(self.dataset, _BatchReader)
        return self.dataset

    def degrade(self, augmentation: Augmentation, *, keep_clean: bool = False) -> None:
        """Show degraded views from the first iteration on, see :mod:`arcface_kd.data.views`.

        Args:
            augmentation: how often each; a mixture of faces has the label -1.
            keep_clean: whether ``BatchViews.clean`` holds the images before they were degraded.

        Raises:
            ConfigError: the workers have begun to read otherwise.
        """
        reader, keeps = self._reader, keep_clean and bool(augmentation)
        if self._has_workers and (reader.augmentation or Augmentation(), reader.keeps_clean) != (augmentation, keeps):
            raise ConfigError("this loader's workers read for a run with another student.augment: make a new loader")
        reader.augmentation, reader.keeps_clean = augmentation or None, keeps

    def look_up(self, look_up: LookUp | None) -> bool:
        """Have the embeddings of each batch looked up where its images are read, ahead of the step that wants them.

        Args:
            look_up: of this machine's memory or files, and picklable; None looks nothing up.

        Returns:
            Whether ``BatchViews.embeddings`` come from it; not if workers have begun to read with another one.
        """
        if not self._has_workers:
            self._reader.look_up = look_up
        return self._reader.look_up == look_up

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:  # type: ignore[override]
        """Start an epoch of ``(images, labels)``; a bad record raises a ``DataError`` that names it."""
        self._has_workers = self.num_workers > 0
        with warnings.catch_warnings():
            # Python 3.12 warns of every fork beside threads; the workers touch none of the parent's.
            warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
            batches: Iterator[_Batch | DataError] = super().__iter__()
        if self.num_workers == 0:
            batches = _read_ahead(batches)
        if self.device.type == "cuda":
            return self._through_stream(batches, torch.cuda.Stream(self.device))
        return self._through_memory(batches)

    def _hand_out(self, batch: _Batch) -> None:
        self.skipped.note(batch.bad)
        if self.on_batch is not None:
            self.on_batch(batch.views)

    def _through_memory(self, batches: Iterator[_Batch | DataError]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for batch in batches:
            good = _good(batch)
            images = _normalise(good.pixels.to(self.device))
            self._hand_out(good)
            yield images, good.labels.to(self.device)
        self._end_epoch()

    def _end_epoch(self) -> None:
        if self.faces.on_bad_record == "skip":
            self.skipped.end_epoch()

    def _through_stream(
        self, batches: Iterator[_Batch | DataError], stream: torch.cuda.Stream
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Copy each batch to the GPU while the one before it is in use."""

        def send() -> tuple[_Batch, torch.Tensor, torch.Tensor] | None:
            batch = next(batches, None)
            if batch is None:
                return None
            good = _good(batch)
            with torch.cuda.stream(stream):
                pixels = good.pixels.to(self.device, non_blocking=True)
                return good, _normalise(pixels), good.labels.to(self.device, non_blocking=True)

        sent = send()
        while sent is not None:
            good, images, labels = sent
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(stream)
            for tensor in (images, labels):
                # The memory was taken on the side stream and must not return to it while this one still reads.
                tensor.record_stream(current)
            sent = send()
            self._hand_out(good)
            yield images, labels
        self._end_epoch()


def _good(batch: _Batch | DataError) -> _Batch:
    if isinstance(batch, DataError):
        raise batch
    return batch


def _normalise(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 (B, H, W, 3) to float32 (B, 3, H, W) in -1 .. 1, the bits of the host's ToTensor and Normalize."""
    images = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    # On a GPU, dividing by a Python number multiplies by its reciprocal, which rounds differently.
    images.div_(torch.full((1,), 255.0, device=images.device))
    return images.sub_(0.5).div_(0.5)


def read_images(faces: FaceDataset, views: BatchViews, places: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Read images of a batch anew, not degraded, as the loader hands out its batches.

    Args:
        faces: the records.
        views: the batch.
        places: (N,) int64, which of the batch.
        device: where they are wanted.

    Returns:
        float32 (N, 3, 112, 112), RGB, -1 .. 1.

    Raises:
        BadRecordError: a record that cannot be read.
    """
    wanted = zip(views.index[places].tolist(), views.flipped[places].tolist(), strict=True)
    pixels = np.stack([faces.pixels(View(index, flipped))[1] for index, flipped in wanted])
    return _normalise(torch.from_numpy(pixels).to(device))


def get_dataloader(
    root_dir: Rec,
    local_rank: int,
    batch_size: int,
    dali: bool = False,
    dali_aug: bool = False,
    seed: int | None = 2048,
    num_workers: int = 2,
    *,
    num_classes: int | None = None,
    drop_last: bool = True,
    on_bad_record: OnBadRecord = "stop",
    identities: str | None = None,
) -> FaceLoader:
    """Open the training data: a drop-in for the host's function of this name.

    Rank and world size are those of the default process group, or 0 and 1 without one.

    Args:
        root_dir: one data set or several, see ``open_rec``.
        local_rank: the rank's number on its machine; chooses the GPU, where there is one.
        batch_size: records a batch on this rank.
        dali: NVIDIA's loader, which this function does not offer.
        dali_aug: has no meaning without ``dali``, as in the host.
        seed: decides order and flips; rank 0's counts. None draws one.
        num_workers: worker processes a rank.
        num_classes: labels must be below it; None for no limit.
        drop_last: whether to leave out a last batch that is not full.
        on_bad_record: what to do with a record or image that cannot be read: ``stop`` ends the run and names it;
            ``skip`` shows the next good one instead, and logs at the end of each epoch what all ranks have skipped.
        identities: a table of the people who occur in several data sets, see ``read_identities``.

    Returns:
        The loader.

    Raises:
        ConfigError: ``dali``, or sizes that cannot be.
        DataError: the data cannot be read.
    """
    if dali and root_dir != "synthetic":
        raise ConfigError("dali = True needs the host's own loader; set dali = False to read with arcface_kd's")
    ranks = RankGroup()
    dataset = open_rec(root_dir, num_classes, on_bad_record, identities, rank=ranks.rank)
    # Rank 0's counts, as in the host's ``sync_random_seed``.
    seed = ranks.gather_objects(int(torch.randint(1 << 31, ())) if seed is None else seed)[0]
    sampler = ViewSampler(len(dataset), rank=ranks.rank, world_size=ranks.world_size, seed=seed)
    return FaceLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=num_workers,
        device=default_device(local_rank),
        drop_last=drop_last,
        skipped=SkippedRecords(of_all_ranks=True),
    )
