"""Face data sets: records, image folders and the synthetic one, all as labelled 112x112 images."""

import os
from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from arcface_kd.data.bad_records import BadRecord
from arcface_kd.data.formats.image import decode_rgb
from arcface_kd.data.formats.image_folder import (
    holds_identities,
    list_identities,
    list_images,
    read_image_file,
    tree_of,
)
from arcface_kd.data.formats.property_file import read_property
from arcface_kd.data.formats.recordio import RecordReader
from arcface_kd.data.record_labels import RecordLabels
from arcface_kd.data.record_layout import find_images
from arcface_kd.errors import BadRecordError, DataError, OnBadRecord

IMAGE_SIZE = (112, 112)

# A damaged disk block takes some hundred records with it; more than this in a row is no accident to pass over.
MOST_BAD_IN_A_ROW = 1000


class View(NamedTuple):
    """One way to see a record: which one, whether it is mirrored, and the seed of what a loader degrades it by."""

    index: int  # type: ignore[assignment]
    flipped: bool
    seed: int | None = None


class Sample(NamedTuple):
    """One labelled image.

    Attributes:
        image: uint8 (3, 112, 112), RGB, mirrored left to right when ``flipped``; a transposed view of pixel rows.
        label: the identity, 0 .. classes - 1, or -1 for none.
        index: the image's index in its data set.
        flipped: whether ``image`` is mirrored.
    """

    image: torch.Tensor
    label: int
    index: int  # type: ignore[assignment]
    flipped: bool


class FaceDataset(Dataset[Sample], ABC):
    """Labelled face images that can be asked for plain or mirrored.

    ``dataset[i]`` and ``dataset[View(i, flipped)]`` give a ``Sample``.

    Attributes:
        on_bad_record: what to do with a record or image that cannot be read. ``stop`` raises ``BadRecordError``.
            ``skip`` shows the next good one of the data set instead, whatever the ranks, workers and batches. A wrong
            label is not a bad record but a wrong ``num_classes``.
    """

    on_bad_record: OnBadRecord = "stop"

    @abstractmethod
    def __len__(self) -> int:
        """Number of images."""

    @abstractmethod
    def where(self, index: int) -> str:
        """Say where an image comes from, for messages."""

    @abstractmethod
    def _load(self, index: int) -> tuple[int, bytes | memoryview]:
        """Label and encoded image; ``index`` is in range."""

    def label(self, index: int) -> int:
        """The label of an image: 0 .. classes - 1, or -1 for none, or where a bad record is skipped."""
        try:
            return self._load(self._in_range(index))[0]
        except BadRecordError:
            if self.on_bad_record == "stop":
                raise
            return -1

    def labels(self) -> NDArray[np.int64]:
        """The labels of all images, int64 (N,); takes a while where every record has to be looked at."""
        return np.fromiter((self.label(index) for index in range(len(self))), np.int64, len(self))

    @cached_property
    def found_classes(self) -> int:
        """The largest label and one: the number of classes that the labels make."""
        return 1 + int(self.labels().max(initial=-1))

    def image_bytes(self, index: int) -> bytes:
        """The encoded image, as it is stored: a JPEG or PNG file as a rule."""
        return bytes(self._load(self._in_range(index))[1])

    def _in_range(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is out of range: the data set has {len(self)} images")
        return int(index)

    def _decode(self, index: int) -> tuple[int, NDArray[Any]]:
        """Label and uint8 pixels (112, 112, 3) of the plain image."""
        label, payload = self._load(index)
        try:
            return label, decode_rgb(payload, IMAGE_SIZE)
        except DataError as error:
            raise BadRecordError(f"{self.where(index)}: {error}") from None

    def pixels(self, view: View) -> tuple[int, NDArray[Any]]:
        """Decode an image: its label, and uint8 pixels (112, 112, 3), RGB.

        The message about a bad one names the record and its place.
        """
        label, pixels = self._decode(self._in_range(view.index))
        if view.flipped:
            import cv2

            pixels = cv2.flip(pixels, 1)
        return label, pixels

    def shown(self, view: View, bad: list[BadRecord]) -> tuple[View, int, NDArray[Any]]:
        """Decode an image or, where bad records are skipped, the next good one in the order of the data set.

        The view that is shown, mirrored or not as asked, its label and its pixels; ``bad`` takes the records that were
        passed over.
        """
        if self.on_bad_record == "stop":
            return view, *self.pixels(view)
        most = min(len(self), MOST_BAD_IN_A_ROW)
        for step in range(most):
            candidate = view._replace(index=(view.index + step) % len(self))
            try:
                return candidate, *self.pixels(candidate)
            except BadRecordError as error:
                bad.append(BadRecord(candidate.index, str(error)))
        raise BadRecordError(f"{bad[-most].message}; nor can the {most - 1} images after it be read: mend the data")

    def __getitem__(self, item: int | View) -> Sample:
        """Decode an image, plain or as the view says; ``index`` says which one is shown."""
        view = item if isinstance(item, View) else View(self._in_range(int(item)), False)
        view, label, pixels = self.shown(view, [])
        return Sample(torch.from_numpy(pixels.transpose(2, 0, 1)), label, view.index, view.flipped)


class RecordDataset(FaceDataset):
    """Images in MXNet RecordIO: ``train.rec``, ``train.idx`` and, where it exists, ``property``.

    See ``find_images`` for the layouts. With ``num_classes``, all labels are read at the start, so that a wrong one
    shows before the first step; this takes at most the time of reading the file once.

    Attributes:
        stated_classes: the number of classes that the file ``property`` states, or None.

    Args:
        root: the folder.
        num_classes: labels must be below it; None for no limit.
        on_bad_record: what to do with a bad record. The first one, which shows the layout, and the last one, which
            shows whether the file is whole, must be good in any case.

    Raises:
        BadRecordError: a bad record is met at the start, and they are not skipped.
        DataError: files are missing, damaged or do not belong together, or a label is not below ``num_classes``.
    """

    def __init__(
        self, root: str | os.PathLike[str], *, num_classes: int | None = None, on_bad_record: OnBadRecord = "stop"
    ) -> None:
        folder = Path(root)
        self.num_classes = num_classes
        self.on_bad_record = on_bad_record
        self.stated_classes = read_property(folder / "property")
        self._reader = RecordReader(folder / "train.rec", folder / "train.idx")
        self._records = RecordLabels(self._reader, num_classes)
        self._images = find_images(self._reader, on_bad_record)
        if num_classes is not None:
            _ = self.found_classes

    @cached_property
    def found_classes(self) -> int:
        """The largest label and one, found in one pass over the file."""
        labels = self._records.read_all(self._images, self.on_bad_record)
        return 1 + max((int(found.max(initial=-1)) for _, found in labels), default=-1)

    @property
    def reader(self) -> RecordReader:
        """The records behind the images."""
        return self._reader

    @property
    def keys(self) -> NDArray[np.int64]:
        """The record keys of the images, int64 (N,), in the order of the data set."""
        return self._reader.keys[self._images]

    def _position(self, index: int) -> int:
        return int(self._images.start + index if isinstance(self._images, slice) else self._images[index])

    def __len__(self) -> int:
        images = self._images
        return int(images.stop - images.start) if isinstance(images, slice) else len(images)

    def labels(self) -> NDArray[np.int64]:
        """The labels of all images, read in one pass over the file."""
        labels = np.full(len(self._reader), -1, dtype=np.int32)
        for positions, found in self._records.read_all(self._images, self.on_bad_record):
            labels[positions] = found
        return labels[self._images].astype(np.int64)

    def where(self, index: int) -> str:
        """Say which record an image is: file, key and byte offset."""
        return self._reader.where(self._position(index))

    def _load(self, index: int) -> tuple[int, memoryview]:
        return self._records.read(self._position(index))


class FolderDataset(FaceDataset):
    """Images in folders, one folder per identity; labels number the folders in the order of their names.

    Raises:
        DataError: see ``list_identities``; or more identities than ``num_classes``.
    """

    def __init__(
        self, root: str | os.PathLike[str], *, num_classes: int | None = None, on_bad_record: OnBadRecord = "stop"
    ) -> None:
        self.on_bad_record = on_bad_record
        identities = list_identities(root)
        if num_classes is not None and len(identities) > num_classes:
            raise DataError(
                f"{os.path.join(root, identities[num_classes].name)}: its label is {num_classes}, but num_classes is "
                f"{num_classes}; set num_classes to {len(identities)}"
            )
        self.num_classes = num_classes
        self.names = [identity.name for identity in identities]
        self._paths = [path for identity in identities for path in identity.images]
        self._labels = np.repeat(np.arange(len(identities)), [len(identity.images) for identity in identities])

    def __len__(self) -> int:
        return len(self._paths)

    def where(self, index: int) -> str:
        """The path of an image."""
        return self._paths[index]

    def labels(self) -> NDArray[np.int64]:
        """The labels of all images, int64 (N,)."""
        return self._labels.astype(np.int64)

    def _load(self, index: int) -> tuple[int, bytes]:
        return int(self._labels[index]), read_image_file(self._paths[index])


class UnlabelledFolder(FolderDataset):
    """Images in a folder, at any depth, without labels; see ``list_images`` for what is refused."""

    def __init__(self, root: str | os.PathLike[str], *, on_bad_record: OnBadRecord = "stop") -> None:
        self.on_bad_record = on_bad_record
        self.num_classes = 0
        self.names = []
        self._paths = list_images(root, follow_links=False)
        self._labels = np.full(len(self._paths), -1)


class SyntheticDataset(FaceDataset):
    """The host's ``rec = "synthetic"``: one random image a million times, label 1, for measuring speed."""

    def __init__(self, *, num_classes: int | None = None) -> None:
        if num_classes is not None and num_classes < 2:
            raise DataError(f"the synthetic data have label 1, but num_classes is {num_classes}; set it to 2 or more")
        self._image = np.random.default_rng(0).integers(0, 255, (*IMAGE_SIZE, 3), dtype=np.uint8)

    def __len__(self) -> int:
        return 1_000_000

    def where(self, index: int) -> str:
        """The name of the data set and the index."""
        return f"synthetic image {index}"

    def labels(self) -> NDArray[np.int64]:
        """The labels of all images, int64 (N,)."""
        return np.ones(len(self), dtype=np.int64)

    def _load(self, index: int) -> tuple[int, bytes]:
        import cv2

        return 1, cv2.imencode(".png", self._image[..., ::-1])[1].tobytes()

    def _decode(self, index: int) -> tuple[int, NDArray[Any]]:
        return 1, self._image.copy()


def open_dataset(
    root: str | os.PathLike[str], num_classes: int | None = None, on_bad_record: OnBadRecord = "stop"
) -> FaceDataset:
    """Open whatever a config's ``rec`` names, choosing as the host's ``get_dataloader`` does.

    Args:
        root: ``synthetic``; a folder with ``train.rec`` and ``train.idx``; a folder with one folder of images for each
            identity; a folder of images, which have no labels then, nor have those of ``FOLDER/**``, at any depth.
        num_classes: labels must be below it; 0 takes all images of a folder, at any depth, without labels; None for no
            limit.
        on_bad_record: see ``FaceDataset``.

    Returns:
        A ``SyntheticDataset``, a ``RecordDataset``, a ``FolderDataset`` or an ``UnlabelledFolder``.

    Raises:
        DataError: none of these is there, or it cannot be read.
    """
    if root == "synthetic":
        return SyntheticDataset(num_classes=num_classes)
    tree = tree_of(root)
    folder = tree or Path(root)
    if tree is None and (folder / "train.rec").exists():
        return RecordDataset(folder, num_classes=num_classes, on_bad_record=on_bad_record)
    if tree is None and (folder / "train.idx").exists():
        raise DataError(f"{folder} holds train.idx but no train.rec; both are needed")
    if not folder.is_dir():
        raise DataError(
            f"there is no folder {folder}; wanted train.rec and train.idx, one folder of images per identity, or images"
        )
    if tree is None and num_classes != 0 and holds_identities(folder):
        return FolderDataset(folder, num_classes=num_classes, on_bad_record=on_bad_record)
    return UnlabelledFolder(folder, on_bad_record=on_bad_record)
