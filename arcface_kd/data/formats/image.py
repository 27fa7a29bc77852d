"""One image file in memory: its size from the header, and its pixels as mxnet and Pillow read them."""

import io
import struct
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from arcface_kd.errors import DataError
from arcface_kd.system.downloads import found_instead

if TYPE_CHECKING:
    from PIL import Image

    Buffer = bytes | bytearray | memoryview

# Far above any aligned face, far below what exhausts a machine: 64 M pixels are 192 MB decoded.
MAX_PIXELS = 1 << 26

# What faces come in. Each format is named, so that a file cannot choose one of Pillow's rarer readers.
_FORMATS = ("JPEG", "PNG", "BMP", "DIB", "WEBP", "TIFF", "PPM", "GIF", "JPEG2000")
_READ_BY_OPENCV = (b"\xff\xd8", b"\x89PNG\r\n\x1a\n", b"BM", b"RIFF")
# mxnet decodes these and no others on every machine.
_READ_BY_MXNET = _READ_BY_OPENCV[:3]

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


def _open(data: bytes) -> "Image.Image":
    """The file as Pillow opens it: header read, no pixel decoded."""
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(io.BytesIO(data), formats=_FORMATS)
    except UnidentifiedImageError:
        if data.startswith(_READ_BY_OPENCV):
            raise DataError("the image header is damaged or cut short") from None
        what = found_instead(data) or (f"it starts with {data[:8]!r}" if data else "it holds no bytes")
        raise DataError(f"no image that can be read: {what}") from None
    except Image.DecompressionBombError:
        raise DataError(f"the image claims more than {MAX_PIXELS} pixels") from None
    # Pillow's readers throw whatever their parsing of a damaged header runs into.
    except Exception as error:
        raise DataError(f"the image header is damaged: {error}") from None


def is_read_by_mxnet(data: bytes) -> bool:
    """Whether mxnet, and so the host, decodes a file of this format from a record."""
    return data.startswith(_READ_BY_MXNET)


def image_size(data: "Buffer") -> tuple[int, int]:
    """Height and width of an image from its header, as stored (an EXIF rotation is not applied)."""
    head = bytes(data)
    if not head.startswith(b"\xff\xd8"):
        width, height = _open(head).size
        return height, width
    # Every training image comes this way: Pillow takes forty times as long, nearly as long as decoding.
    try:
        size = _jpeg_size(head)
    except struct.error:
        size = None
    if size is None:
        raise DataError("the image header is damaged or cut short")
    return size


def decode_rgb(data: "Buffer", size: tuple[int, int] | None = None, *, upright: bool = False) -> NDArray[np.uint8]:
    """Decode an image file.

    Grey and transparent images come out with three channels, 16-bit ones with eight bits. Where EXIF says how the
    camera was held, the host's readers of training and verification images, mxnet and Pillow, do not look at it.

    Args:
        data: an image file: JPEG, PNG, BMP, WebP, TIFF, PPM, GIF (its first picture) or JPEG 2000.
        size: the only height and width that are accepted; any size up to ``MAX_PIXELS`` when None.
        upright: turn the image as EXIF says, as the host's reader of IJB, ``cv2.imread``, does.

    Returns:
        uint8 array (H, W, 3), RGB, 0..255, contiguous and writable.

    Raises:
        DataError: not an image, a damaged one, or one of another size; the message says which and names no file, since
            only the caller knows it.
    """
    height, width = image_size(data)
    if size is not None and (height, width) != size:
        raise DataError(f"the image is {height}x{width} pixels, wanted {size[0]}x{size[1]}")
    if not 0 < height * width <= MAX_PIXELS:
        raise DataError(f"the image claims {height}x{width} pixels, more than {MAX_PIXELS} or none")
    if not bytes(data[:8]).startswith(_READ_BY_OPENCV):
        return _decode_with_pillow(bytes(data))
    pixels = _decode_with_opencv(np.frombuffer(data, dtype=np.uint8), upright)
    if pixels is None or pixels.shape not in ((height, width, 3), (width, height, 3) if upright else None):
        raise DataError("OpenCV cannot decode the image: it is damaged or cut short")
    return pixels


def _decode_with_opencv(encoded: NDArray[np.uint8], upright: bool) -> NDArray[Any] | None:
    import cv2

    # OpenCV before 4.10 cannot decode to RGB at once.
    flag = getattr(cv2, "IMREAD_COLOR_RGB", None)
    orientation = 0 if upright else cv2.IMREAD_IGNORE_ORIENTATION
    try:
        pixels = cv2.imdecode(encoded, (cv2.IMREAD_COLOR if flag is None else flag) | orientation)
    except cv2.error as error:
        reason = " ".join(str(error).split())
        raise DataError(f"OpenCV cannot decode the image: {reason}") from None
    return pixels if pixels is None or flag is not None else cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)


def _decode_with_pillow(data: bytes) -> NDArray[np.uint8]:
    image = _open(data)
    try:
        if image.mode.startswith("I"):
            # Grey in 16 bits, which Pillow would cut off at 255.
            return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[..., None], 3, axis=2)
        return np.array(image.convert("RGB"))
    except Exception as error:
        raise DataError(f"Pillow cannot decode the image: {' '.join(str(error).split())}") from None
