"""Folders of face images, one sub-folder per identity."""

import os
from typing import NamedTuple

from arcface_kd.errors import DataError
from arcface_kd.system.files import open_regular

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
# The most pixels that are decoded, in four channels of 16 bits without compression.
_LARGEST_FILE = 1 << 29


class Identity(NamedTuple):
    """One person's folder: its name and the paths of its images."""

    name: str
    images: list[str]


def _scan(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise DataError(f"cannot list {folder}: {error.strerror}") from None


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        # A link that leads back to itself, which is refused as any other.
        return True


def _refuse_link(entry: os.DirEntry[str]) -> None:
    # An unpacked archive may hold links to anywhere on this machine.
    if entry.is_symlink():
        raise DataError(f"{entry.path} is a symbolic link; put the file or folder itself there")


def _images(folder: str) -> list[tuple[str, str]]:
    """Folder and name of every image below a folder."""
    found: list[tuple[str, str]] = []
    pending = [folder]
    while pending:
        current = pending.pop()
        for entry in _scan(current):
            if _is_folder(entry):
                _refuse_link(entry)
                pending.append(entry.path)
            elif entry.name.lower().endswith(IMAGE_SUFFIXES):
                _refuse_link(entry)
                found.append((current, entry.name))
    return found


def list_identities(root: str | os.PathLike[str]) -> list[Identity]:
    """List a folder of identities as torchvision's ``ImageFolder`` orders it, so that labels are the host's.

    The label of an identity is its place in the list. Images may lie in sub-folders of an identity's folder. Files
    without an image's suffix, and files directly in ``root``, are passed over.

    Args:
        root: a folder with one sub-folder per identity.

    Returns:
        The identities sorted by name; the images of each sorted by folder, then by name.

    Raises:
        DataError: not a folder, no identity in it, an identity without an image, or a symbolic link.
    """
    identities: list[Identity] = []
    for entry in sorted(_scan(os.fspath(root)), key=lambda entry: entry.name):
        if not _is_folder(entry):
            continue
        _refuse_link(entry)
        images = [os.path.join(folder, name) for folder, name in sorted(_images(entry.path))]
        if not images:
            raise DataError(
                f"the identity folder {entry.path} holds no image ({', '.join(IMAGE_SUFFIXES)}); add one or remove it"
            )
        identities.append(Identity(entry.name, images))
    if not identities:
        raise DataError(f"{root} holds no identity folders; wanted one folder of images per identity")
    return identities


def read_image_file(path: str | os.PathLike[str]) -> bytes:
    """Read an image file's bytes.

    Raises:
        DataError: the file cannot be read, or is larger than any image of a face.
    """
    try:
        with open_regular(path) as stream:
            size = os.fstat(stream.fileno()).st_size
            if size > _LARGEST_FILE:
                raise DataError(f"{path} has {size} bytes; no image of a face has more than {_LARGEST_FILE}")
            return stream.read()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
