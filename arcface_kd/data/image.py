"""One image file in memory: its size from the header, its pixels through OpenCV."""

import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from arcface_kd.errors import DataError

if TYPE_CHECKING:
    Buffer = bytes | bytearray | memoryview

# Far above any aligned face, far below what exhausts a machine: 64 M pixels are 192 MB decoded.
MAX_PIXELS = 1 << 26

# A progressive JPEG goes over all of its pixels once a scan: ten times as a rule, and this often at the largest size.
_MAX_SCANNED = 16 * MAX_PIXELS
_START_OF_JPEG, _START_OF_SCAN = b"\xff\xd8", b"\xff\xda"

# Enough for every camera's metadata; a file that has more is built to be slow.
_MAX_JPEG_SEGMENTS = 512
_SEGMENT = struct.Struct(">BBH")
_FRAME = struct.Struct(">HH")
_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_WITHOUT_LENGTH = frozenset(range(0xD0, 0xD8)) | {0x01}


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    position = 2
    for _ in range(_MAX_JPEG_SEGMENTS):
        prefix, marker, length = _SEGMENT.unpack_from(data, position)
        if prefix != 0xFF or marker == 0xFF:
            # Decoders step over stray and fill bytes before a marker, so this does too.
            position = data.find(b"\xff", position + 1)
            if position < 0:
                return None
        elif marker in _START_OF_FRAME:
            return _FRAME.unpack_from(data, position + 5)
        else:
            position += 2 if marker in _WITHOUT_LENGTH else 2 + length
    return None


def _png_size(data: bytes) -> tuple[int, int]:
    width, height = struct.unpack_from(">II", data, 16)
    return height, width


def _bmp_size(data: bytes) -> tuple[int, int]:
    if struct.unpack_from("<I", data, 14)[0] == 12:
        width, height = struct.unpack_from("<HH", data, 18)
    else:
        width, height = struct.unpack_from("<ii", data, 18)
    # A negative height says that the rows run downwards.
    return abs(height), abs(width)


def _webp_size(data: bytes) -> tuple[int, int] | None:
    kind = data[12:16]
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return height & 0x3FFF, width & 0x3FFF
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
    if kind == b"VP8X":
        return int.from_bytes(data[27:30], "little") + 1, int.from_bytes(data[24:27], "little") + 1
    return None


def is_webp(data: bytes) -> bool:
    """Whether a file is WebP, which OpenCV decodes and mxnet does not."""
    return data[:4] == b"RIFF" and data[8:12] == b"WEBP"


def _size_reader(head: bytes) -> Callable[[bytes], tuple[int, int] | None] | None:
    if head.startswith(_START_OF_JPEG):
        return _jpeg_size
    if head[:8] == b"\x89PNG\r\n\x1a\n":
        return _png_size
    if head[:2] == b"BM":
        return _bmp_size
    if is_webp(head):
        return _webp_size
    return None


def image_size(data: "Buffer") -> tuple[int, int]:
    """Read the size of an image from its header, without decoding it.

    Only these four formats are let through to OpenCV: they are what face data sets hold, and their size is known
    before a byte of pixels is allocated.

    Args:
        data: a JPEG, PNG, BMP or WebP file.

    Returns:
        Height and width in pixels, as they are stored (an EXIF rotation is not applied).

    Raises:
        DataError: the bytes are none of these formats, or the header is cut short.
    """
    head = bytes(data)
    reader = _size_reader(head)
    if reader is None:
        what = f"starts with {head[:8]!r}" if head else "holds no bytes"
        raise DataError(f"not a JPEG, PNG, BMP or WebP image ({what})")
    try:
        size = reader(head)
    except (struct.error, IndexError):
        size = None
    if size is None:
        raise DataError("the image header is damaged or cut short")
    return size


def decode_rgb(data: "Buffer", size: tuple[int, int] | None = None) -> np.ndarray:
    """Decode an image file.

    Grey and transparent images come out with three channels, 16-bit ones with eight bits.

    Args:
        data: a JPEG, PNG, BMP or WebP file.
        size: the only height and width that are accepted; any size up to ``MAX_PIXELS`` when None.

    Returns:
        uint8 array (H, W, 3), RGB, 0..255, contiguous and writable.

    Raises:
        DataError: not an image, a damaged one, or one of another size; the message says which and names no file, since
            only the caller knows it.
    """
    import cv2

    height, width = image_size(data)
    if size is not None and (height, width) != size:
        raise DataError(f"the image is {height}x{width} pixels, wanted {size[0]}x{size[1]}")
    if not 0 < height * width <= MAX_PIXELS:
        raise DataError(f"the image claims {height}x{width} pixels, more than {MAX_PIXELS} or none")
    encoded = np.frombuffer(data, dtype=np.uint8)
    # In other formats these two bytes are pixels like any others; an aligned face's file has no room for so many.
    if encoded.size // len(_START_OF_SCAN) * height * width > _MAX_SCANNED and encoded[:2].tobytes() == _START_OF_JPEG:
        scans = encoded.tobytes().count(_START_OF_SCAN)
        if scans * height * width > _MAX_SCANNED:
            raise DataError(f"the image of {height}x{width} pixels is drawn in {scans} scans, built to be slow")
    # OpenCV before 4.10 cannot decode to RGB at once.
    flag = getattr(cv2, "IMREAD_COLOR_RGB", None)
    try:
        pixels = cv2.imdecode(encoded, cv2.IMREAD_COLOR if flag is None else flag)
    except cv2.error as error:
        reason = " ".join(str(error).split())
        raise DataError(f"OpenCV cannot decode the image: {reason}") from None
    if pixels is None or pixels.ndim != 3 or pixels.size != height * width * 3:
        raise DataError("OpenCV cannot decode the image: it is damaged or cut short")
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB) if flag is None else pixels
