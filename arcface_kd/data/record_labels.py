"""The labels of records, each checked: one record at a time, or all in one pass over the file."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arcface_kd.data.formats.record import unpack_label
from arcface_kd.data.formats.record_scan import read_headers
from arcface_kd.data.formats.recordio import RecordReader
from arcface_kd.errors import BadRecordError, DataError, OnBadRecord

# Labels and counts are float32 in a record, which holds every whole number up to here and only some beyond.
FLOAT32_EXACT = 1 << 24


class RecordLabels:
    """Reads records with their labels, which must be below ``num_classes``, where that is not None."""

    def __init__(self, reader: RecordReader, num_classes: int | None) -> None:
        self._reader = reader
        self._num_classes = num_classes
        self._limit = FLOAT32_EXACT if num_classes is None else min(num_classes, FLOAT32_EXACT)

    def read(self, position: int) -> tuple[int, memoryview]:
        """The label, -1 for none, and the encoded image at a position in the index."""
        record = self._reader.read_at(position)
        try:
            value, payload = unpack_label(record)
        except DataError as error:
            raise BadRecordError(f"{self._reader.where(position)}: {error}") from None
        if not len(payload):
            raise BadRecordError(f"{self._reader.where(position)}: it holds no image")
        if -1 <= value < self._limit and value == int(value):
            return int(value), payload
        raise self._fault(position, value)

    def read_all(
        self, images: NDArray[Any] | slice, on_bad_record: OnBadRecord
    ) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
        """Read the labels of all images, in one pass over the file.

        Yields positions in the index, in the order of the file, and their labels, int64 (M,) each; ``skip`` gives bad
        records the label -1.
        """
        wanted = np.zeros(len(self._reader), dtype=bool)
        wanted[images] = True
        first, count, largest = (-1, 0.0), 0, 0.0
        for headers in read_headers(self._reader):
            rows = wanted[headers.positions]
            positions, values = headers.positions[rows], headers.labels[rows]
            sound = ~headers.odd[rows] & headers.images[rows] & (values >= -1) & (np.floor(values) == values)
            above = np.flatnonzero(sound & (values >= self._limit) & np.isfinite(values))
            if len(above):
                # All are counted before the first is named: the largest says what num_classes has to be.
                first = first if count else (int(positions[above[0]]), float(values[above[0]]))
                count, largest = count + len(above), max(largest, float(values[above].max()))
            known = sound & np.isfinite(values)
            labels = np.where(known & (values < FLOAT32_EXACT), values, -1).astype(np.int64)
            for row in np.flatnonzero(~known):
                try:
                    labels[row] = self.read(int(positions[row]))[0]
                except BadRecordError:
                    if on_bad_record == "stop":
                        raise
            yield positions, labels
        if count:
            raise self._fault(*first, largest, count)

    def _fault(self, position: int, value: float, largest: float = 0.0, count: int = 1) -> DataError:
        where = f"{self._reader.where(position)}: its label is"
        if not np.isfinite(value) or value != int(value):
            return BadRecordError(f"{where} {value}, which is no whole number")
        if value < -1:
            return BadRecordError(f"{where} {value:.0f}; wanted 0 or more, or -1 for no identity")
        if value >= FLOAT32_EXACT:
            return DataError(f"{where} {value:.0f}; a float32 tells whole numbers apart up to {FLOAT32_EXACT} only")
        others = f", and {count - 1} more records have too large a label" if count > 1 else ""
        return DataError(
            f"{where} {value:.0f}, but num_classes is {self._num_classes}{others}; set num_classes to "
            f"{max(value, largest) + 1:.0f} or more"
        )
