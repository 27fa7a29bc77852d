"""One record: a header with its label, and an encoded image behind it.

Format: mxnet 1.9.1 ``recordio.py``.
"""

import numbers
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arcface_kd.errors import DataError

HEADER = struct.Struct("<IfQQ")
_LABEL = struct.Struct("<If")


@dataclass(frozen=True, eq=False)
class RecordHeader:
    """What stands before the image in a record."""

    flag: int  # number of labels in the vector; 0 when ``label`` is a single number
    # A number, or a float32 vector (flag,) when ``flag`` > 0. Stored as float32, exact up to 2**24.
    label: float | NDArray[Any]
    id: int  # the record's number, 0 .. 2**64 - 1; usually its key.
    id2: int  # upper part of the number; 0 in face data sets


def pack(header: RecordHeader, payload: bytes) -> bytes:
    """Put a header before a payload, byte for byte as mxnet does; the flag follows from the label, as there."""
    try:
        if isinstance(header.label, numbers.Number):
            return HEADER.pack(0, header.label, header.id, header.id2) + payload
        labels = np.asarray(header.label, dtype="<f4")
        return HEADER.pack(labels.size, 0.0, header.id, header.id2) + labels.tobytes() + payload
    except (struct.error, OverflowError, TypeError, ValueError) as error:
        raise DataError(
            f"a record header cannot hold label {header.label!r}, id {header.id!r}, id2 {header.id2!r}: {error}"
        ) from None


def unpack(record: bytes | memoryview) -> tuple[RecordHeader, memoryview]:
    """Take a record apart; the payload and a label vector are views of ``record``, not copies."""
    view = memoryview(record)
    if len(view) < HEADER.size:
        raise DataError(f"a record of {len(view)} bytes is too short for its header of {HEADER.size}")
    flag, label, number, number2 = HEADER.unpack_from(view)
    if flag == 0:
        return RecordHeader(0, label, number, number2), view[HEADER.size :]
    end = HEADER.size + 4 * flag
    if end > len(view):
        raise DataError(f"a record of {len(view)} bytes is too short for the {flag} labels that its header announces")
    labels = np.frombuffer(view, dtype="<f4", count=flag, offset=HEADER.size)
    return RecordHeader(flag, labels, number, number2), view[end:]


def unpack_label(record: bytes | memoryview) -> tuple[float, memoryview]:
    """The first label, as stored, and the payload, a view of ``record``."""
    if len(record) >= HEADER.size:
        flag, label = _LABEL.unpack_from(record)
        if flag == 0:
            return label, memoryview(record)[HEADER.size :]
    header, payload = unpack(record)
    return float(np.asarray(header.label)[0]), payload
