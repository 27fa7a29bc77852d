"""Which records of a file are images: InsightFace's layout, the plain one, and several sets under one index."""

import logging
from contextlib import suppress
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arcface_kd.data.formats.record import RecordHeader, unpack
from arcface_kd.data.formats.record_scan import read_headers
from arcface_kd.data.formats.recordio import RecordReader
from arcface_kd.errors import BadRecordError, DataError, OnBadRecord

logger = logging.getLogger(__name__)


def find_images(reader: RecordReader, on_bad_record: OnBadRecord) -> NDArray[np.int64] | slice:
    """Find the images among the records: positions in the index, a slice where they stand in a row.

    Two layouts. InsightFace's: record 0 is a header, two labels [n + 1, last + 1] and no image; images are records 1 ..
    n; identity records follow, each with the range of its images' keys and no image. The plain one, of ``im2rec`` and
    ``insightface.data.rec_builder``: every record is an image. What a record is decides, since the header's counts are
    float32 and exact up to 2**24 only.

    Where the index goes on behind the header's last record, all records are looked at: several sets that stand behind
    each other are read whole if no label occurs in two of them. The first and the last record must be good in any case.
    """
    zero = int(reader.find(np.zeros(1, dtype=np.int64))[0])
    header = None if zero < 0 else _imageless(reader, zero)
    if header is None:
        _refuse_identities(reader)
        return slice(0, len(reader))
    if header.flag < 2:
        raise DataError(f"{reader.where(zero)}: it holds neither an image nor the two counts of a header record")
    order = reader.key_order
    keys = reader.keys if order is None else reader.keys[order]
    stated, end = np.asarray(header.label, dtype=np.float32)[:2]
    # Rounding to float32 keeps the order, so this holds at every size.
    if np.float32(keys[-1] + 1) > end:
        return _images_of_all_sets(reader, zero, stated, keys, order)
    low, high = 1, len(reader)
    while low < high:
        middle = (low + high) // 2
        if _is_image(reader, middle if order is None else int(order[middle]), float(stated), on_bad_record):
            low = middle + 1
        else:
            high = middle
    _check_count(reader, zero, stated, keys, low)
    return slice(1, low) if order is None else order[1:low]


def _imageless(reader: RecordReader, position: int) -> RecordHeader | None:
    """The header of a record that carries labels and no image, else None."""
    record = reader.read_at(position)
    try:
        header, payload = unpack(record)
    except DataError as error:
        raise BadRecordError(f"{reader.where(position)}: {error}") from None
    return header if header.flag > 0 and not len(payload) else None


def _refuse_identities(reader: RecordReader) -> None:
    """Refuse InsightFace's identity records where no header precedes them: labels would be taken for images."""
    last = int(reader.offsets.argmax())
    with suppress(BadRecordError):
        if _imageless(reader, last) is not None:
            raise DataError(
                f"{reader.where(last)}: it is an identity record of InsightFace's layout, but no header record has "
                "key 0: it was lost, or sets of two layouts stand behind each other"
            )


def _is_image(reader: RecordReader, position: int, end: float, on_bad_record: OnBadRecord) -> bool:
    """Whether a record is an image; a bad one that is skipped counts as one below the header's end of the images."""
    try:
        return _imageless(reader, position) is None
    except BadRecordError:
        if on_bad_record == "stop":
            raise
        return float(reader.keys[position]) < end


def _check_count(reader: RecordReader, zero: int, stated: np.float32, keys: NDArray[np.int64], boundary: int) -> None:
    """Check the header's count against the images that the index lists; ``keys`` ascend."""
    if boundary == 1:
        raise DataError(f"{reader.rec_path} holds a header record and no image")
    least = keys[boundary - 1] + 1
    most = keys[boundary] if boundary < len(keys) else least
    # NaN fails this.
    if not np.float32(least) <= stated <= np.float32(most):
        raise DataError(
            f"{reader.where(zero)}: the header says that images end before key {stated:.0f}, but the last image in the "
            f"index has key {least - 1}: the files are damaged or do not belong together"
        )


def _images_of_all_sets(
    reader: RecordReader, zero: int, stated: np.float32, keys: NDArray[np.int64], order: NDArray[np.int64] | None
) -> NDArray[Any] | slice:
    """The images of an index that goes on behind the records that its header counts."""
    labels, images = np.zeros(len(reader), dtype=np.float32), np.zeros(len(reader), dtype=bool)
    for headers in read_headers(reader):
        labels[headers.positions] = np.where(headers.odd | (headers.labels < 0), np.nan, headers.labels)
        # A damaged record is taken for an image, and named when its label is read.
        images[headers.positions] = headers.images | headers.odd
    if order is not None:
        labels, images = labels[order], images[order]
    places = np.flatnonzero(images)
    # Where a set's first image stands among the images.
    starts = np.flatnonzero(np.diff(places, prepend=-1) > 1)
    last = 0 if not len(places) else places[-1] if len(starts) == 1 else places[starts[1] - 1]
    _check_count(reader, zero, stated, keys, int(last) + 1)
    positions = places if order is None else order[places]
    if len(starts) > 1:
        _check_labels_of_sets(reader, labels[places], starts, int(positions[starts[1]]))
    elif order is None:
        return slice(int(places[0]), int(last) + 1)
    return positions


def _check_labels_of_sets(reader: RecordReader, labels: NDArray[Any], starts: NDArray[np.int64], second: int) -> None:
    """Refuse sets that share labels: they were numbered apart, and a label would mean several people."""
    every = zip(np.fmin.reduceat(labels, starts), np.fmax.reduceat(labels, starts), strict=True)
    # Sets without any label have NaN for a range.
    ranges = sorted(pair for pair in every if pair[0] <= pair[1])
    if any(largest >= least for (_, largest), (least, _) in pairwise(ranges)):
        shown = ", ".join(f"{least:.0f} to {largest:.0f}" for least, largest in ranges)
        raise DataError(
            f"{reader.where(second)}: here another set begins; {len(starts)} sets under one index have labels that "
            f"overlap ({shown}), so that different people would share a class: shift those of the later sets, or train "
            "on one"
        )
    logger.warning(
        "%s: %d sets stand behind each other under one index; all %d images are read, where arcface_torch reads those "
        "of the first set alone",
        *(reader.rec_path, len(starts), len(labels)),
    )
