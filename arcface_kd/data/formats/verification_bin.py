"""InsightFace verification sets: ``.bin`` files, pickles of ``(images, is_same)``."""

import logging
import mmap
import os
import pickle
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from arcface_kd.data.formats.image import decode_rgb
from arcface_kd.data.formats.verification_pickle import BYTES_PER_IMAGE, FREE_IMAGES, Refused, read_pickle
from arcface_kd.errors import DataError
from arcface_kd.system.console import printable
from arcface_kd.system.downloads import found_instead, is_archive
from arcface_kd.system.files import atomic_write, open_regular

logger = logging.getLogger(__name__)

_HEAD = 512
# What a pickled pair begins with: a tuple's or list's opcode, or the global that makes an array of images.
_BEGINNING = re.compile(rb"(\x80[\x02-\x05](\x95.{8})?)?[(\]c\x8c]", re.DOTALL)


@dataclass(frozen=True, eq=False)
class VerificationSet:
    """Pairs of face images and whether each shows one person."""

    name: str  # the file's name without its ending, such as ``lfw``
    images: list[bytes]  # encoded images, 2P of them; ``images[2i]`` and ``images[2i + 1]`` are pair i
    is_same: NDArray[Any]  # bool (P,)
    path: Path | None = None  # the file that it was read from


def _check(images: Sequence[bytes], is_same: NDArray[np.bool_], name: str) -> None:
    if len(images) != 2 * len(is_same) or not len(images):
        raise DataError(
            f"{name}: {len(images)} images and {len(is_same)} booleans; a verification set has two images a pair, "
            "and one pair at least"
        )


def list_bins(folder: str | os.PathLike[str]) -> list[Path]:
    """List the verification sets of a folder.

    Other files that end in ``.bin`` (macOS's ``._lfw.bin``, weights such as ``pytorch_model.bin``) are passed over with
    a warning. A damaged or empty set, a Git LFS pointer and an HTML page are listed, and refused when they are read.
    """
    found = []
    for path in sorted(Path(folder).glob("*.bin")):
        what = "its name begins with a dot" if path.name.startswith(".") else _other_kind(path)
        if what is None:
            found.append(path)
        else:
            logger.warning("passed over %s, which is no verification set: %s", printable(path), what)
    return found


def _other_kind(path: Path) -> str | None:
    """What a file is that was not meant for a verification set, or None."""
    try:
        with open_regular(path) as stream:
            head = stream.read(_HEAD)
    except OSError:
        return None
    instead = found_instead(head)
    if not head or _BEGINNING.match(head) or (instead is not None and not is_archive(head)):
        return None
    return instead or f"it starts with {head[:8]!r}"


def read_bin(path: str | os.PathLike[str]) -> VerificationSet:
    """Read a verification set; nothing that a hostile file says is run.

    Args:
        path: an InsightFace ``.bin`` file.

    Returns:
        The encoded images and the truth about each pair.

    Raises:
        DataError: no such file, not a verification set, or a pickle that holds anything else, which is named.
    """
    name = Path(path)
    try:
        with open_regular(name) as stream:
            size = os.fstat(stream.fileno()).st_size
            if size == 0:
                raise DataError(f"{name} is empty; copy or download it again")
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
                instead = found_instead(data[:_HEAD])
                if instead is not None:
                    raise DataError(f"{name} is no verification set: {instead}")
                images, is_same = read_pickle(data)
    except OSError as error:
        raise DataError(f"cannot read {name}: {error.strerror}") from None
    except Refused as refusal:
        raise DataError(
            f"{name} is no verification set: it holds {refusal}; wanted a pickled list of images and one of booleans"
        ) from None
    _check(images, is_same, str(name))
    # A pickle may name one image any number of times, for two bytes each, and each is decoded to 38 kB.
    if len(images) > FREE_IMAGES + size // BYTES_PER_IMAGE:
        raise DataError(f"{name} names {len(images)} images in {size} bytes: the same ones again and again")
    return VerificationSet(name.stem, images, is_same, name)


def write_bin(
    path: str | os.PathLike[str], images: Sequence[bytes], is_same: Sequence[bool] | NDArray[np.bool_]
) -> None:
    """Write a verification set that InsightFace's own tools read; the file appears whole or not at all.

    Args:
        path: the ``.bin`` file; its folder must exist.
        images: encoded images, 2P of them; ``images[2i]`` and ``images[2i + 1]`` are pair i.
        is_same: P booleans.

    Raises:
        DataError: the counts do not fit, or an image is not bytes.
        OSError: the file cannot be written.
    """
    truths = np.asarray(is_same, dtype=bool)
    _check(images, truths, os.fspath(path))
    for number, image in enumerate(images):
        if not isinstance(image, bytes) or not image:
            raise DataError(
                f"{os.fspath(path)}: image {number} is {type(image).__name__}, wanted an encoded image as bytes"
            )
    with atomic_write(path) as stream:
        pickle.dump((list(images), truths.tolist()), stream, protocol=4)


def _fit(pixels: NDArray[Any], size: tuple[int, int]) -> NDArray[Any]:
    """Scale the shorter edge to ``size[0]`` where the width is another, as the host's ``load_bin`` does."""
    import cv2

    height, width = pixels.shape[:2]
    if width != size[0]:
        shorter = min(height, width)
        height, width = size[0] * height // shorter, size[0] * width // shorter
    if (height, width) != size:
        raise DataError(f"it is {height}x{width} after scaling, wanted {size[0]}x{size[1]}")
    if pixels.shape[:2] == size:
        return pixels
    return cv2.resize(pixels, size[::-1], interpolation=cv2.INTER_CUBIC)


def decode(verification_set: VerificationSet, size: tuple[int, int] = (112, 112)) -> torch.Tensor:
    """Decode the images of a verification set.

    Images of another size are scaled, bicubic, as the host's ``eval/verification.py`` scales them.

    Args:
        verification_set: the encoded images.
        size: height and width wanted, in pixels.

    Returns:
        uint8 (2P, 3, H, W), RGB, 0..255.

    Raises:
        DataError: an image that cannot be decoded or is not of the wanted shape; the message names it.
    """
    decoded = torch.empty((len(verification_set.images), *size, 3), dtype=torch.uint8)
    rows = decoded.numpy()
    # A set's file may name one image many times; it is one object then.
    places: dict[int, int] = {}
    for number, image in enumerate(verification_set.images):
        place = places.setdefault(id(image), number)
        try:
            rows[number] = rows[place] if place < number else _fit(decode_rgb(image), size)
        except DataError as error:
            raise DataError(f"{verification_set.name}: image {number}: {error}") from None
    return decoded.permute(0, 3, 1, 2).contiguous()
