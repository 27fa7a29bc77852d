"""Face data sets: records, image folders and the synthetic one, all as labelled 112x112 images."""

import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from arcface_kd.data.bad_records import BadRecord
from arcface_kd.data.formats.image import decode_rgb
from arcface_kd.data.formats.image_folder import list_identities, read_image_file
from arcface_kd.data.formats.recordio import RecordHeader, RecordReader, unpack, unpack_label
from arcface_kd.errors import BadRecordError, DataError, OnBadRecord
from arcface_kd.system.files import open_regular

IMAGE_SIZE = (112, 112)


# A damaged disk block takes some hundred records with it; more than this in a row is no accident to pass over.
MOST_BAD_IN_A_ROW = 1000

# Labels and counts are float32 in a record, which holds every whole number up to here and only some beyond.
_FLOAT32_EXACT = 1 << 24
# Up to here, reading every label at the start takes a fraction of a second.
_FEW_RECORDS = 1 << 16


class View(NamedTuple):
    """One way to see a record: which one, and whether it is mirrored."""

    index: int  # type: ignore[assignment]
    flipped: bool


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
        on_bad_record: what becomes of a record or image that cannot be read. ``stop`` raises ``BadRecordError``.
            ``skip`` shows the next good one in the order of the data set in its place, which depends on nothing but the
            data: not on ranks, workers or batches. A wrong label is not a bad record but a wrong ``num_classes``.
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
        """The label of an image.

        Args:
            index: 0 .. ``len(self) - 1``.

        Returns:
            The identity, 0 .. classes - 1, or -1 for none; -1 as well where a bad record is skipped.

        Raises:
            BadRecordError: the record is damaged.
            DataError: its label is out of range.
        """
        try:
            return self._load(self._in_range(index))[0]
        except BadRecordError:
            if self.on_bad_record == "stop":
                raise
            return -1

    def labels(self) -> np.ndarray:
        """The labels of all images; takes a while where every record has to be looked at.

        Returns:
            int64 (N,), -1 for no identity and where a bad record is skipped.

        Raises:
            BadRecordError: a record is damaged.
            DataError: a label is out of range.
        """
        return np.fromiter((self.label(index) for index in range(len(self))), np.int64, len(self))

    def image_bytes(self, index: int) -> bytes:
        """The encoded image, as it is stored.

        Args:
            index: 0 .. ``len(self) - 1``.

        Returns:
            A JPEG or PNG file as a rule.

        Raises:
            BadRecordError: the record is damaged.
        """
        return bytes(self._load(self._in_range(index))[1])

    def _in_range(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is out of range: the data set has {len(self)} images")
        return int(index)

    def _decode(self, index: int) -> tuple[int, np.ndarray]:
        """Label and uint8 pixels (112, 112, 3) of the plain image."""
        label, payload = self._load(index)
        try:
            return label, decode_rgb(payload, IMAGE_SIZE)
        except DataError as error:
            raise BadRecordError(f"{self.where(index)}: {error}") from None

    def pixels(self, view: View) -> tuple[int, np.ndarray]:
        """Decode an image without making a tensor of it.

        Args:
            view: which image, and whether mirrored.

        Returns:
            The label, and uint8 pixels (112, 112, 3), RGB.

        Raises:
            BadRecordError: a damaged record or image, or another size than 112x112; the message names the record and
                its place.
            DataError: a label out of range.
            IndexError: no such index.
        """
        label, pixels = self._decode(self._in_range(view.index))
        if view.flipped:
            import cv2

            pixels = cv2.flip(pixels, 1)
        return label, pixels

    def shown(self, view: View, bad: list[BadRecord]) -> tuple[View, int, np.ndarray]:
        """Decode an image or, where bad records are skipped, the next good one in the order of the data set.

        Args:
            view: which image, and whether mirrored.
            bad: takes the records that were passed over.

        Returns:
            The view that is shown, mirrored or not as asked; its label; its pixels, as ``pixels`` gives them.

        Raises:
            BadRecordError: see ``pixels``; where bad records are skipped, too many in a row.
            DataError: a label out of range.
            IndexError: no such index.
        """
        if self.on_bad_record == "stop":
            return view, *self.pixels(view)
        most = min(len(self), MOST_BAD_IN_A_ROW)
        for step in range(most):
            candidate = View((view.index + step) % len(self), view.flipped)
            try:
                return candidate, *self.pixels(candidate)
            except BadRecordError as error:
                bad.append(BadRecord(candidate.index, str(error)))
        raise BadRecordError(f"{bad[-most].message}; nor can the {most - 1} images after it be read: mend the data")

    def __getitem__(self, item: int | View) -> Sample:
        """Decode an image.

        Args:
            item: an index for the plain image, or a ``View``.

        Returns:
            The image with its label; where bad records are skipped, ``index`` says which image it is.

        Raises:
            DataError: see ``shown``.
            IndexError: no such index.
        """
        view = item if isinstance(item, View) else View(self._in_range(int(item)), False)
        view, label, pixels = self.shown(view, [])
        return Sample(torch.from_numpy(pixels.transpose(2, 0, 1)), label, view.index, view.flipped)


class RecordDataset(FaceDataset):
    """Images in MXNet RecordIO: ``train.rec``, ``train.idx`` and, where it exists, ``property``.

    Two layouts. InsightFace's: record 0 is a header, two labels [n + 1, last + 1] and no image; images are records
    1 .. n; identity records follow, each with the range of its images' keys and no image. The plain one, of ``im2rec``
    and ``insightface.data.rec_builder``: every record is an image. The list of images comes from the index and from the
    kind of the records, since the header's count is a float32 and exact up to 2**24 only.

    Args:
        root: the folder.
        num_classes: labels must be below it; None for no limit.
        on_bad_record: what becomes of a bad record; the first one, which tells the layout, and the last one, which
            tells whether the file is whole, must be good in any case.

    Raises:
        DataError: files are missing, damaged or do not belong together, or a label that is cheap to see at the start is
            not below ``num_classes``.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        num_classes: int | None = None,
        on_bad_record: OnBadRecord = "stop",
    ) -> None:
        folder = Path(root)
        self.num_classes = num_classes
        self.on_bad_record = on_bad_record
        self._label_limit = _FLOAT32_EXACT if num_classes is None else min(num_classes, _FLOAT32_EXACT)
        self.property = _read_property(folder / "property")
        self._reader = RecordReader(folder / "train.rec", folder / "train.idx")
        self._images, self._identities = self._split_records()
        if num_classes is not None:
            self._check_labels()

    @property
    def reader(self) -> RecordReader:
        """The records behind the images."""
        return self._reader

    @property
    def keys(self) -> np.ndarray:
        """The record keys of the images, int64 (N,), in the order of the data set."""
        return self._reader.keys[self._images]

    def _split_records(self) -> tuple[np.ndarray | slice, np.ndarray | slice]:
        """Positions in the index of the images and of the identity records."""
        reader = self._reader
        zero = int(reader.find(np.zeros(1, dtype=np.int64))[0])
        header = None if zero < 0 else self._imageless(zero)
        if header is None:
            return slice(0, len(reader)), slice(0, 0)
        if header.flag < 2:
            raise DataError(f"{reader.where(zero)}: it holds neither an image nor the two counts of a header record")
        order = reader.key_order
        low, high = 1, len(reader)
        while low < high:
            middle = (low + high) // 2
            if self._is_image(middle if order is None else int(order[middle]), _first_label(header)):
                low = middle + 1
            else:
                high = middle
        self._check_count(zero, header, reader.keys[:] if order is None else reader.keys[order], low)
        if order is None:
            return slice(1, low), slice(low, len(reader))
        return order[1:low], order[low:]

    def _imageless(self, position: int) -> RecordHeader | None:
        """The header of a record that carries labels and no image, else None."""
        header, payload = self._unpack(position)
        return header if header.flag > 0 and not len(payload) else None

    def _is_image(self, position: int, end: float) -> bool:
        """Whether a record is an image; of a bad one that is skipped, the header's end of the images has to tell."""
        try:
            return self._imageless(position) is None
        except BadRecordError:
            if self.on_bad_record == "stop":
                raise
            return float(self._reader.keys[position]) < end

    def _check_count(self, zero: int, header: RecordHeader, keys: np.ndarray, boundary: int) -> None:
        """Hold the header's count against the images that the index lists; ``keys`` ascend."""
        if boundary == 1:
            raise DataError(f"{self._reader.rec_path} holds a header record and no image")
        stated = float(_first_label(header))
        least = keys[boundary - 1] + 1
        most = keys[boundary] if boundary < len(keys) else least
        # Rounding to float32 keeps the order, so this holds at every size; NaN fails it.
        if not np.float32(least) <= stated <= np.float32(most):
            raise DataError(
                f"{self._reader.where(zero)}: the header says that images end before key {stated:.0f}, but the last "
                f"image in the index has key {least - 1}: the files are damaged or do not belong together"
            )

    def _check_labels(self) -> None:
        """Check the labels that are cheap to see: all of a small set, else the last and those of surplus identities."""
        if len(self) <= _FEW_RECORDS:
            for index in range(len(self)):
                self.label(index)
            return
        self.label(len(self) - 1)
        identities = np.arange(len(self._reader))[self._identities]
        if self.num_classes is not None and len(identities) > self.num_classes:
            # Identities are in the order of their labels as a rule, so the first step of this walk finds the offender.
            for identity in identities[::-1]:
                try:
                    self._check_identity(int(identity))
                except BadRecordError:
                    if self.on_bad_record == "stop":
                        raise

    def _check_identity(self, identity: int) -> None:
        """Check the label of an identity record's first image."""
        first_image = _first_label(self._unpack(identity)[0])
        key = int(first_image) if 0 < first_image < 2**53 else -1
        position = int(self._reader.find(np.array([key]))[0])
        if position >= 0 and self._imageless(position) is None:
            self._parse(position)

    def _unpack(self, position: int) -> tuple[RecordHeader, memoryview]:
        try:
            record = self._reader.read_at(position)
        except DataError as error:
            raise BadRecordError(str(error)) from None
        try:
            return unpack(record)
        except DataError as error:
            raise BadRecordError(f"{self._reader.where(position)}: {error}") from None

    def _parse(self, position: int) -> tuple[int, memoryview]:
        try:
            record = self._reader.read_at(position)
        except DataError as error:
            raise BadRecordError(str(error)) from None
        try:
            value, payload = unpack_label(record)
        except DataError as error:
            raise BadRecordError(f"{self._reader.where(position)}: {error}") from None
        if not len(payload):
            raise BadRecordError(f"{self._reader.where(position)}: it holds no image")
        if -1 <= value < self._label_limit and value == int(value):
            return int(value), payload
        raise self._label_fault(position, value)

    def _label_fault(self, position: int, value: float) -> DataError:
        where = f"{self._reader.where(position)}: its label is"
        if value != value or value in (float("inf"), float("-inf")) or value != int(value):
            return BadRecordError(f"{where} {value}, which is no whole number")
        if value < -1:
            return BadRecordError(f"{where} {value:.0f}; wanted 0 or more, or -1 for no identity")
        if value >= _FLOAT32_EXACT:
            return DataError(f"{where} {value:.0f}; a float32 tells whole numbers apart up to {_FLOAT32_EXACT} only")
        classes = int(value) + 1
        return DataError(
            f"{where} {value:.0f}, but num_classes is {self.num_classes}; set num_classes to {classes} or more"
        )

    def _position(self, index: int) -> int:
        if isinstance(self._images, slice):
            return self._images.start + index
        return int(self._images[index])

    def __len__(self) -> int:
        if isinstance(self._images, slice):
            return self._images.stop - self._images.start
        return len(self._images)

    def labels(self) -> np.ndarray:
        """The labels of all images.

        Identity records say which keys an identity has; the label is taken from its first image and held against its
        last. Where that does not work out (no identity records, gaps, an identity of two labels) each record is read.

        Returns:
            int64 (N,), -1 for no identity and where a bad record is skipped.

        Raises:
            BadRecordError: a record is damaged.
            DataError: a label is out of range.
        """
        spans = self._identity_spans()
        if spans is None:
            return super().labels()
        labels = np.empty(len(self), dtype=np.int64)
        for images in spans:
            label = self.label(int(images[0]))
            if label < 0 or self.label(int(images[-1])) != label:
                return super().labels()
            labels[images] = label
        return labels

    def _identity_spans(self) -> list[np.ndarray] | None:
        """The images of each identity by their places in the data set, in the order of their keys; None if unsure."""
        identities = np.arange(len(self._reader))[self._identities]
        if not len(identities):
            return None
        keys = self.keys
        order = np.argsort(keys, kind="stable")
        spans, at = [], 0
        for identity in identities.tolist():
            try:
                header, _ = self._unpack(identity)
            except BadRecordError:
                if self.on_bad_record == "stop":
                    raise
                return None
            span = header.label
            if not isinstance(span, np.ndarray) or len(span) != 2:
                return None
            if span[0] == span[1]:
                continue
            if at == len(keys) or span[0] != keys[order[at]]:
                return None
            end = int(np.searchsorted(keys, span[1], sorter=order))
            if end <= at:
                return None
            spans.append(order[at:end])
            at = end
        return spans if at == len(keys) else None

    def where(self, index: int) -> str:
        """Say which record an image is: file, key and byte offset."""
        return self._reader.where(self._position(index))

    def _load(self, index: int) -> tuple[int, memoryview]:
        return self._parse(self._position(index))


def _first_label(header: RecordHeader) -> float:
    return float(header.label[0]) if isinstance(header.label, np.ndarray) else header.label


def _read_property(path: Path) -> tuple[int, int, int] | None:
    """Number of classes, height and width of a ``property`` file; None where there is none."""
    try:
        with open_regular(path) as stream:
            line = stream.readline(200)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    fields = line.strip().split(b",")
    if len(fields) != 3 or not all(field.strip().isdigit() and len(field) < 19 for field in fields):
        raise DataError(f"{path} starts with {line[:40]!r}, wanted 'num_classes,height,width'")
    classes, height, width = map(int, fields)
    if classes > _FLOAT32_EXACT:
        raise DataError(f"{path} names {classes} classes; labels, which are float32, tell {_FLOAT32_EXACT} apart")
    return classes, height, width


class FolderDataset(FaceDataset):
    """Images in folders, one folder per identity; labels number the folders in the order of their names.

    Args:
        root: the folder with the identities' folders.
        num_classes: there must be no more identities than this; None for no limit.
        on_bad_record: what becomes of an image that cannot be read.

    Raises:
        DataError: see ``list_identities``; or more identities than ``num_classes``.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        num_classes: int | None = None,
        on_bad_record: OnBadRecord = "stop",
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

    def labels(self) -> np.ndarray:
        """The labels of all images, int64 (N,)."""
        return self._labels.astype(np.int64)

    def _load(self, index: int) -> tuple[int, bytes]:
        try:
            return int(self._labels[index]), read_image_file(self._paths[index])
        except DataError as error:
            raise BadRecordError(str(error)) from None


class SyntheticDataset(FaceDataset):
    """The host's ``rec = "synthetic"``: one random image a million times, label 1, for measuring speed.

    Args:
        num_classes: must be above the label; None for no limit.

    Raises:
        DataError: ``num_classes`` leaves no room for label 1.
    """

    def __init__(self, *, num_classes: int | None = None) -> None:
        if num_classes is not None and num_classes < 2:
            raise DataError(
                f"the synthetic data set has label 1, but num_classes is {num_classes}; set it to 2 or more"
            )
        self._image = np.random.default_rng(0).integers(0, 255, (*IMAGE_SIZE, 3), dtype=np.uint8)

    def __len__(self) -> int:
        return 1_000_000

    def where(self, index: int) -> str:
        """The name of the data set and the index."""
        return f"synthetic image {index}"

    def _load(self, index: int) -> tuple[int, bytes]:
        import cv2

        return 1, cv2.imencode(".png", self._image[..., ::-1])[1].tobytes()

    def _decode(self, index: int) -> tuple[int, np.ndarray]:
        return 1, self._image.copy()


def open_dataset(
    root: str | os.PathLike[str], num_classes: int | None = None, on_bad_record: OnBadRecord = "stop"
) -> FaceDataset:
    """Open whatever a config's ``rec`` names, choosing as the host's ``get_dataloader`` does.

    Args:
        root: ``synthetic``; a folder with ``train.rec`` and ``train.idx``; or a folder with one folder of images for
            each identity.
        num_classes: labels must be below it; None for no limit.
        on_bad_record: what becomes of a record or image that cannot be read, see ``FaceDataset``.

    Returns:
        A ``SyntheticDataset``, a ``RecordDataset`` or a ``FolderDataset``.

    Raises:
        DataError: none of these is there, or it cannot be read.
    """
    if root == "synthetic":
        return SyntheticDataset(num_classes=num_classes)
    folder = Path(root)
    here = {name: (folder / name).exists() for name in ("train.rec", "train.idx")}
    if all(here.values()):
        return RecordDataset(folder, num_classes=num_classes, on_bad_record=on_bad_record)
    if any(here.values()):
        found, missing = sorted(here, key=here.__getitem__, reverse=True)
        raise DataError(f"{folder} holds {found} but no {missing}; both are needed")
    wanted = "wanted train.rec and train.idx, or one folder of images per identity"
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}; {wanted}")
    try:
        has_folders = any(entry.is_dir() for entry in folder.iterdir())
    except OSError as error:
        raise DataError(f"cannot list {folder}: {error.strerror}") from None
    if not has_folders:
        raise DataError(f"no data set in {folder}; {wanted}")
    return FolderDataset(folder, num_classes=num_classes, on_bad_record=on_bad_record)
