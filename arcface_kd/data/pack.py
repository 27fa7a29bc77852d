"""Pack a folder of face images into RecordIO in InsightFace's layout."""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from arcface_kd.data.dataset import IMAGE_SIZE
from arcface_kd.data.formats.image import decode_rgb, is_read_by_mxnet
from arcface_kd.data.formats.image_folder import list_identities, read_image_file
from arcface_kd.data.formats.recordio import RecordHeader, RecordWriter, pack
from arcface_kd.errors import DataError
from arcface_kd.system.files import atomic_write

_MAX_IDENTITIES = 1 << 24
_JPEG_QUALITY = 95


class PackCounts(NamedTuple):
    """What was packed.

    Attributes:
        identities: number of identities, the classes of the data set.
        images: number of images.
        resized: how many of them were not 112x112 and have been scaled.
    """

    identities: int
    images: int
    resized: int

    def __str__(self) -> str:
        scaled = f"; {self.resized} images were not 112x112 and have been scaled" if self.resized else ""
        return f"num_classes={self.identities} num_image={self.images}{scaled}"


def _as_stored(path: str) -> tuple[bytes, bool]:
    """The bytes to store for an image file, and whether it had to be scaled."""
    import cv2

    data = read_image_file(path)
    try:
        pixels = decode_rgb(data)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    height, width = pixels.shape[:2]
    bgr = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    if (height, width) != IMAGE_SIZE:
        # Averaging keeps a shrunk image free of aliasing; there is nothing to average when it grows.
        way = cv2.INTER_AREA if height * width > IMAGE_SIZE[0] * IMAGE_SIZE[1] else cv2.INTER_LINEAR
        scaled = cv2.resize(bgr, IMAGE_SIZE[::-1], interpolation=way)
        return cv2.imencode(".jpg", scaled, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])[1].tobytes(), True
    if not is_read_by_mxnet(data):
        return cv2.imencode(".png", bgr)[1].tobytes(), False
    return data, False


def _write_records(writer: RecordWriter, sizes: Sequence[int], images: Iterable[bytes]) -> None:
    first_identity = sum(sizes) + 1

    def write(key: int, label: float | np.ndarray, payload: bytes) -> None:
        writer.write(key, pack(RecordHeader(0, label, key, 0), payload))

    write(0, np.array([first_identity, first_identity + len(sizes)]), b"")
    labels = (label for label, size in enumerate(sizes) for _ in range(size))
    for key, (label, payload) in enumerate(zip(labels, images, strict=True), start=1):
        write(key, float(label), payload)
    start = 1
    for key, size in enumerate(sizes, start=first_identity):
        write(key, np.array([start, start + size]), b"")
        start += size


def write_identities(out: str | os.PathLike[str], sizes: Sequence[int], images: Iterable[bytes]) -> None:
    """Write encoded images as ``train.rec``, ``train.idx`` and ``property`` in InsightFace's layout.

    Record 0 is a header with the labels [n + 1, n + 1 + identities]; records 1 .. n are the images with their labels;
    one record for each identity follows, with the range [start, end) of its images' keys.

    Args:
        out: where the three files go; made when missing. Files of these names are replaced.
        sizes: number of images of each identity; its place is its label.
        images: encoded 112x112 images, ``sum(sizes)`` of them, identity by identity.

    Raises:
        DataError: more identities than labels can tell apart, or ``out`` cannot be written; it is as it was before.
        ValueError: the number of images is not ``sum(sizes)``; ``out`` is as it was before.
    """
    if len(sizes) > _MAX_IDENTITIES:
        raise DataError(f"{out}: {len(sizes)} identities; a float32 label tells {_MAX_IDENTITIES} apart")
    target = Path(out)
    made = not target.exists()
    try:
        target.mkdir(parents=True, exist_ok=True)
        with RecordWriter(target / "train.rec", target / "train.idx") as writer:
            _write_records(writer, sizes, images)
            # A full disk shows here, before anything is in place; what appears last is what makes a data set of it.
            writer.sync()
            with atomic_write(target / "property") as stream:
                stream.write(b"%d,%d,%d\n" % (len(sizes), *IMAGE_SIZE))
    except BaseException as error:
        if made:
            with suppress(OSError):
                target.rmdir()
        if isinstance(error, OSError):
            raise DataError(f"cannot write to {target}: {error.strerror}") from None
        raise


def refuse_records(out: str | os.PathLike[str]) -> None:
    """Refuse to write where records are already.

    Args:
        out: a folder, which may be missing.

    Raises:
        DataError: there are records, or what a writer that was killed has left of them.
    """
    records, index = (Path(out) / name for name in ("train.rec", "train.idx"))
    if records.exists() and not index.exists():
        raise DataError(f"{records} exists without its index, as a writer that was killed leaves it: remove it first")
    for path in (records, index):
        if path.exists():
            raise DataError(f"{path} exists; remove it or choose another folder")


def pack_folder(folder: str | os.PathLike[str], out: str | os.PathLike[str]) -> PackCounts:
    """Pack a folder of face images into ``train.rec``, ``train.idx`` and ``property``.

    The layout is that of :func:`write_identities`. Labels number the identities' folders in the order of their names.

    An image of 112x112 pixels is stored as it is, byte for byte, except that WebP, TIFF and others that mxnet cannot
    decode become PNG with the same pixels. Any other is scaled to 112x112 (area averaging down, bilinear up; the
    aspect ratio is not kept) and stored as JPEG of quality 95. Faces are expected to be aligned.

    Args:
        folder: one sub-folder of images per identity.
        out: where the three files go; made when missing. It must not hold records already.

    Returns:
        How much was packed.

    Raises:
        DataError: nothing to pack, an image that cannot be decoded, or ``out`` cannot be written; ``out`` is as it was
            before.
    """
    from tqdm import tqdm

    identities = list_identities(folder)
    refuse_records(out)
    sizes = [len(identity.images) for identity in identities]
    resized = 0
    # None shows the bar on a terminal only.
    with tqdm(total=sum(sizes), desc="packing", unit="image", disable=None) as progress:

        def stored() -> Iterator[bytes]:
            nonlocal resized
            for identity in identities:
                for path in identity.images:
                    payload, scaled = _as_stored(path)
                    resized += scaled
                    yield payload
                    progress.update()

        write_identities(out, sizes, stored())
    return PackCounts(len(identities), sum(sizes), resized)
