"""Pack a folder of face images into RecordIO, with labels in InsightFace's layout."""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from arcface_kd.data.dataset import IMAGE_SIZE
from arcface_kd.data.formats.image import decode_rgb, is_read_by_mxnet
from arcface_kd.data.formats.image_folder import (
    holds_identities,
    list_identities,
    list_images,
    read_image_file,
    tree_of,
)
from arcface_kd.data.formats.record import RecordHeader, pack
from arcface_kd.data.formats.recordio import RecordWriter
from arcface_kd.errors import BadRecordError, DataError, OnBadRecord
from arcface_kd.system.console import printable
from arcface_kd.system.files import atomic_write

logger = logging.getLogger(__name__)

_MAX_IDENTITIES = 1 << 24
_JPEG_QUALITY = 95


class PackCounts(NamedTuple):
    """What was packed."""

    identities: int  # number of identities, the classes of the data set; 0 where nobody is named
    images: int  # number of images
    resized: int  # how many of them were not 112x112 and have been scaled
    skipped: int = 0  # images that could not be read and were left out
    emptied: int = 0  # identities of which no image is left; they keep their labels

    def __str__(self) -> str:
        words = f"num_classes={self.identities} num_image={self.images}"
        if self.resized:
            words += f"; {self.resized} images were not 112x112 and have been scaled"
        if self.skipped:
            words += f"; {self.skipped} images could not be read and were left out"
        if self.emptied:
            words += f"; {self.emptied} identities have no image left and keep their labels"
        return words


def stored_form(data: bytes, where: str) -> tuple[bytes, bool]:
    """What is stored for an image file, and whether it had to be scaled.

    The file itself is stored where it has 112x112 pixels and mxnet reads it.

    Raises:
        BadRecordError: it is no image; the message names it ``where``.
    """
    import cv2

    try:
        pixels = decode_rgb(data)
    except DataError as error:
        raise BadRecordError(f"{where}: {error}") from None
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


def _header(sizes: Sequence[int]) -> bytes:
    """Record 0: where the images end, and where the identities do."""
    end = sum(sizes) + 1
    return pack(RecordHeader(0, np.array([end, end + len(sizes)]), 0, 0), b"")


def _write_records(writer: RecordWriter, sizes: Sequence[int], images: Iterable[bytes | None]) -> None:
    writer.write(0, _header(sizes))
    kept = [0] * len(sizes)
    labels = (label for label, size in enumerate(sizes) for _ in range(size))
    key = 1
    for label, image in zip(labels, images, strict=True):
        if image is not None:
            writer.write(key, pack(RecordHeader(0, float(label), key, 0), image))
            kept[label] += 1
            key += 1
    start = 1
    for size in kept:
        writer.write(key, pack(RecordHeader(0, np.array([start, start + size]), key, 0), b""))
        start += size
        key += 1
    writer.replace_first(_header(kept))


def write_identities(out: str | os.PathLike[str], sizes: Sequence[int], images: Iterable[bytes | None]) -> None:
    """Write encoded images as ``train.rec``, ``train.idx`` and ``property`` in InsightFace's layout.

    Record 0 is a header with the labels [n + 1, n + 1 + identities]; records 1 .. n are the images with their labels;
    one record for each identity follows, with the range [start, end) of its images' keys. Images come identity by
    identity, ``sizes`` of each, None for one to leave out. On an error ``out`` is as it was before.
    """
    if len(sizes) > _MAX_IDENTITIES:
        raise DataError(f"{out}: {len(sizes)} identities; a float32 label tells {_MAX_IDENTITIES} apart")
    _write(out, lambda writer: _write_records(writer, sizes, images), len(sizes))


def _write_unlabelled(out: str | os.PathLike[str], images: Iterable[bytes | None]) -> None:
    """Write encoded images in the plain layout, each with the label -1, in ``train.rec`` and ``train.idx``."""

    def write(writer: RecordWriter) -> None:
        for key, image in enumerate(filter(None, images), start=1):
            writer.write(key, pack(RecordHeader(0, -1.0, key, 0), image))

    _write(out, write, None)


def _write(out: str | os.PathLike[str], write: Callable[[RecordWriter], None], classes: int | None) -> None:
    """Write records, and ``property`` where there are classes; on an error ``out`` is as it was before."""
    target = Path(out)
    made = not target.exists()
    try:
        target.mkdir(parents=True, exist_ok=True)
        with RecordWriter(target / "train.rec", target / "train.idx") as writer:
            write(writer)
            # A full disk shows here, before anything is in place; what appears last is what makes a data set of it.
            writer.sync()
            if classes is not None:
                with atomic_write(target / "property") as stream:
                    stream.write(b"%d,%d,%d\n" % (classes, *IMAGE_SIZE))
    except BaseException as error:
        if made:
            with suppress(OSError):
                target.rmdir()
        if isinstance(error, OSError):
            raise DataError(f"cannot write to {target}: {error.strerror}") from None
        raise


def refuse_records(out: str | os.PathLike[str]) -> None:
    """Refuse to write where records are already, or what a writer that was killed has left of them."""
    records, index = (Path(out) / name for name in ("train.rec", "train.idx"))
    if records.exists() and not index.exists():
        raise DataError(f"{records} exists without its index, as a writer that was killed leaves it: remove it first")
    for path in (records, index):
        if path.exists():
            raise DataError(f"{path} exists; remove it or choose another folder")


def pack_folder(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    on_bad_record: OnBadRecord = "stop",
    follow_links: bool = False,
) -> PackCounts:
    """Pack a folder of face images into ``train.rec``, ``train.idx`` and ``property``.

    The layout is that of :func:`write_identities`. Labels number the identities' folders in the order of their names. A
    folder of images, or ``DIR/**``, becomes records of the label -1, without ``property``.

    An image of 112x112 pixels is stored as it is, byte for byte, except that WebP, TIFF and others that mxnet cannot
    decode become PNG with the same pixels. Any other is scaled to 112x112 (area averaging down, bilinear up; the
    aspect ratio is not kept) and stored as JPEG of quality 95. Faces are expected to be aligned.

    Args:
        folder: one sub-folder of images per identity, or images without labels.
        out: where the three files go; made when missing. It must not hold records already.
        on_bad_record: what to do with images that cannot be read, each of which is logged: ``stop`` looks at all images
            and packs nothing, ``skip`` leaves the bad ones out.
        follow_links: whether symbolic links are followed; they are refused otherwise.

    Returns:
        How much was packed.

    Raises:
        DataError: nothing to pack, images that cannot be read, or ``out`` cannot be written; ``out`` is as it was
            before.
    """
    from tqdm import tqdm

    tree = tree_of(folder)
    labelled = tree is None and holds_identities(folder)
    if labelled:
        groups = [identity.images for identity in list_identities(folder, follow_links=follow_links)]
    else:
        groups = [list_images(tree or folder, follow_links=follow_links)]
    refuse_records(out)
    sizes = [len(paths) for paths in groups]
    bad = np.zeros(len(sizes), dtype=np.int64)
    resized = 0

    def stored() -> Iterator[bytes | None]:
        nonlocal resized
        first = None
        images = [(label, path) for label, paths in enumerate(groups) for path in paths]
        # None shows the bar on a terminal only.
        for label, path in tqdm(images, desc="packing", unit="image", disable=None):
            try:
                payload, scaled = stored_form(read_image_file(path), path)
            except DataError as error:
                logger.warning("cannot be packed: %s", printable(error))
                first = first or error
                bad[label] += 1
                yield None
            else:
                resized += scaled
                yield payload
        if first is not None and (on_bad_record == "stop" or bad.sum() == sum(sizes)):
            raise DataError(
                f"{bad.sum()} of {sum(sizes)} images cannot be packed, the first: {first}; mend or remove them, or "
                "leave them out with --on-bad-record skip"
            )

    if labelled:
        write_identities(out, sizes, stored())
    else:
        _write_unlabelled(out, stored())
    emptied = int((bad == sizes).sum())
    return PackCounts(len(sizes) if labelled else 0, sum(sizes) - int(bad.sum()), resized, int(bad.sum()), emptied)
