"""Several data sets as one: their labels behind each other, or shared where a table says who is the same person."""

import csv
import logging
import os
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from arcface_kd.data.dataset import FaceDataset, FolderDataset, open_dataset
from arcface_kd.data.formats.image_folder import tree_of
from arcface_kd.errors import ConfigError, DataError, OnBadRecord
from arcface_kd.system.console import errors_only

logger = logging.getLogger(__name__)

_COLUMNS = ["set", "label", "identity"]

# One data set, or several.
Rec = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


class JoinedDataset(FaceDataset):
    """Data sets behind each other: the images of the first, then those of the second, and so on.

    Labels of the first set stay as they are, those of a later one follow the labels before it. People whom ``same``
    gives one identity share the label of the first of them, and no number is left out. -1 stays -1.

    Attributes:
        sets: the data sets.
        label_maps: for each set int64 (classes + 1,), from its labels to those of this one; the last is -1, for -1.

    Args:
        sets: at least one, all with one ``on_bad_record``.
        same: identities by set and label, where they occur more than once.

    Raises:
        BadRecordError: a record is damaged, and bad ones are not skipped.
        DataError: a label is out of range.
    """

    def __init__(self, sets: Sequence[FaceDataset], same: Mapping[tuple[int, int], str] | None = None) -> None:
        self.sets = list(sets)
        self.on_bad_record = self.sets[0].on_bad_record
        self.label_maps = _number([faces.found_classes for faces in self.sets], same or {})
        self._starts = [0, *accumulate(len(faces) for faces in self.sets)]

    @cached_property
    def found_classes(self) -> int:
        """The number of classes that the labels make."""
        return 1 + max(int(labels.max()) for labels in self.label_maps)

    def __len__(self) -> int:
        return self._starts[-1]

    def _find(self, index: int) -> tuple[int, int]:
        """The set that an image is of, and its index there."""
        place = bisect_right(self._starts, index) - 1
        return place, index - self._starts[place]

    def where(self, index: int) -> str:
        """Say where an image comes from, as its own set does."""
        place, own = self._find(index)
        return self.sets[place].where(own)

    def labels(self) -> NDArray[np.int64]:
        """The labels of all images; see the sets' own ``labels``."""
        found = np.empty(len(self), dtype=np.int64)
        for (start, stop), faces, labels in zip(pairwise(self._starts), self.sets, self.label_maps, strict=True):
            found[start:stop] = labels[faces.labels()]
        return found

    def _load(self, index: int) -> tuple[int, bytes | memoryview]:
        place, own = self._find(index)
        label, payload = self.sets[place]._load(own)
        return int(self.label_maps[place][label]), payload

    def _decode(self, index: int) -> tuple[int, NDArray[np.uint8]]:
        place, own = self._find(index)
        label, pixels = self.sets[place]._decode(own)
        return int(self.label_maps[place][label]), pixels


def _number(sizes: Sequence[int], same: Mapping[tuple[int, int], str]) -> list[NDArray[np.int64]]:
    """The label maps of sets with so many classes each."""
    maps: list[NDArray[np.int64]] = []
    numbers: dict[str, int] = {}
    classes = 0
    for place, size in enumerate(sizes):
        named = {label: identity for (own, label), identity in sorted(same.items()) if own == place}
        met, repeated = set(numbers), np.zeros(size, dtype=bool)
        for label, identity in named.items():
            repeated[label] = identity in met
            met.add(identity)
        labels = np.append(classes + np.cumsum(~repeated) - 1, -1)
        for label, identity in named.items():
            labels[label] = numbers.setdefault(identity, int(labels[label]))
        maps.append(labels)
        classes += int((~repeated).sum())
    return maps


def read_identities(path: str | os.PathLike[str], sets: Sequence[FaceDataset]) -> dict[tuple[int, int], str]:
    """Read a table of the people who occur more than once in some data sets.

    A CSV file with the header ``set,label,identity``: the set by its place, from 0; the label as a number, or the
    folder's name where the set is a folder; any text for the identity. People whom it does not name occur once.

    Args:
        path: the table.
        sets: the data sets that it speaks of.

    Returns:
        The identities by set and label.

    Raises:
        DataError: no such file, another header, a set or label that does not exist or that is named twice.
    """
    found: dict[tuple[int, int], str] = {}
    numbers = [
        {name: label for label, name in enumerate(faces.names)} if isinstance(faces, FolderDataset) else None
        for faces in sets
    ]
    try:
        with open(path, newline="", encoding="utf-8-sig") as stream:
            rows = csv.reader(stream, skipinitialspace=True)
            if (header := next(rows, [])) != _COLUMNS:
                raise DataError(f"{path}: line 1 is {','.join(header)!r}, wanted {','.join(_COLUMNS)!r}")
            for row in filter(None, rows):
                where = f"{path}: line {rows.line_num}"
                if len(row) != len(_COLUMNS) or not row[2]:
                    raise DataError(f"{where} is {','.join(row)!r}, wanted a set, a label and an identity")
                place = int(row[0]) if row[0].isdecimal() else -1
                if not 0 <= place < len(sets):
                    raise DataError(f"{where}: there is no set {row[0]!r}; they are 0 .. {len(sets) - 1}")
                own = numbers[place]
                label = own.get(row[1], -1) if own is not None else int(row[1]) if row[1].isdecimal() else -1
                if not 0 <= label < sets[place].found_classes:
                    raise DataError(f"{where}: set {place} has no label {row[1]!r}")
                if found.setdefault((place, label), row[2]) != row[2]:
                    raise DataError(f"{where}: label {row[1]} of set {place} has another identity above")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read {path}: {error}") from None
    return found


def folders_of(rec: Rec) -> list[str]:
    """The data sets that ``rec`` names."""
    return [os.fspath(rec)] if isinstance(rec, str | os.PathLike) else [os.fspath(folder) for folder in rec]


def verification_folder(rec: Rec) -> str:
    """The folder that verification sets are looked for in: that of the first data set."""
    first = folders_of(rec)[0]
    return str(tree_of(first) or Path(first))


def open_rec(
    rec: Rec,
    num_classes: int | None = None,
    on_bad_record: OnBadRecord = "stop",
    identities: str | os.PathLike[str] | None = None,
    *,
    rank: int = 0,
) -> FaceDataset:
    """Open what a config's ``rec`` names, one data set or several, which make a :class:`JoinedDataset`.

    Of all ranks that open it, the first one tells what is odd about the data.
    """
    with nullcontext() if rank == 0 else errors_only("arcface_kd.data"):
        return _open(rec, num_classes, on_bad_record, identities)


def _open(
    rec: Rec, num_classes: int | None, on_bad_record: OnBadRecord, identities: str | os.PathLike[str] | None
) -> FaceDataset:
    if isinstance(rec, str | os.PathLike) and identities is None:
        return open_dataset(rec, num_classes, on_bad_record)
    folders = folders_of(rec)
    if not folders:
        raise ConfigError("rec is an empty list; wanted at least one folder")
    places = [os.path.normpath(folder) for folder in folders]
    twice = [folder for number, folder in enumerate(folders) if places[number] in places[:number]]
    if twice:
        raise ConfigError(f"rec names {twice[0]} twice, and its people would be two classes each; name it once")
    # Without classes, folders of folders are no people.
    sets = [open_dataset(folder, num_classes and None, on_bad_record) for folder in folders]
    joined = JoinedDataset(sets, None if identities is None else read_identities(identities, sets))
    told = f"{' + '.join(str(faces.found_classes) for faces in sets)} classes of {', '.join(folders)} make "
    if num_classes is not None and joined.found_classes > num_classes:
        raise DataError(
            f"{told}{joined.found_classes}, but num_classes is {num_classes}; set num_classes={joined.found_classes}"
        )
    logger.info("%s%d, %d images", told, joined.found_classes, len(joined))
    return joined
