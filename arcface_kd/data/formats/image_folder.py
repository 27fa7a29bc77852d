"""Folders of face images, one sub-folder per identity."""

import logging
import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from arcface_kd.errors import BadRecordError, DataError
from arcface_kd.system.console import printable
from arcface_kd.system.files import open_regular

logger = logging.getLogger(__name__)

_JPEG = (".jpg", ".jpeg", ".jpe", ".jfif")
IMAGE_SUFFIXES = (*_JPEG, ".png", ".bmp", ".dib", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".gif", ".jp2")
# Put there by Synology, macOS, Windows and fsck; names that begin with a dot are passed over besides.
_NO_IDENTITIES = frozenset(
    ("@eaDir", "#recycle", "#snapshot", "__MACOSX", "$RECYCLE.BIN", "System Volume Information", "lost+found")
)
_NO_FACES = frozenset(("thumbs.db", "desktop.ini"))
# The most pixels that are decoded, in four channels of 16 bits without compression.
_LARGEST_FILE = 1 << 29
_SHOWN = 5


class Identity(NamedTuple):
    """One person's folder: its name and the paths of its images."""

    name: str
    images: list[str]


class _Listing:
    """Goes through the folders of one data set, and counts what it passes over.

    Links are refused unless they are to be followed: an unpacked archive may hold links to anywhere on this machine.
    """

    def __init__(self, follow_links: bool) -> None:
        self.follow_links = follow_links
        self.hidden: list[str] = []
        self.suffixes: Counter[str] = Counter()

    def entries(self, folder: str) -> list[os.DirEntry[str]]:
        """What lies in a folder, without what systems and tools have put there."""
        try:
            with os.scandir(folder) as scanned:
                found = list(scanned)
        except OSError as error:
            raise DataError(f"cannot list {folder}: {error.strerror}") from None
        kept = []
        for entry in found:
            if entry.name.startswith(".") or entry.name in _NO_IDENTITIES or entry.name.lower() in _NO_FACES:
                self.hidden.append(entry.path)
            else:
                kept.append(entry)
        return kept

    def is_folder(self, entry: os.DirEntry[str]) -> bool:
        try:
            return entry.is_dir()
        except OSError:
            # A link that leads back to itself, which is refused as any other.
            return True

    def check_link(self, entry: os.DirEntry[str]) -> None:
        if entry.is_symlink() and not self.follow_links:
            raise DataError(
                f"{entry.path} is a symbolic link; put the file or folder itself there, or let `arcface-kd data pack` "
                "follow it with --follow-links"
            )

    def images(self, folder: str) -> list[tuple[str, str]]:
        """Folder and name of every image below a folder."""
        found: list[tuple[str, str]] = []
        pending, visited = [folder], set[str]()
        while pending:
            current = pending.pop()
            if self.follow_links:
                real = os.path.realpath(current)
                if real in visited:
                    # A link back to where it comes from.
                    continue
                visited.add(real)
            for entry in self.entries(current):
                if self.is_folder(entry):
                    self.check_link(entry)
                    pending.append(entry.path)
                elif entry.name.lower().endswith(IMAGE_SUFFIXES):
                    self.check_link(entry)
                    found.append((current, entry.name))
                else:
                    self.suffixes[Path(entry.name).suffix.lower() or "no suffix"] += 1
        return found


def tree_of(root: str | os.PathLike[str]) -> Path | None:
    """The folder DIR of ``DIR/**``, the images at any depth without labels; None for any other name."""
    path = Path(root)
    return path.parent if path.name == "**" else None


def holds_identities(root: str | os.PathLike[str]) -> bool:
    """Whether a folder holds other folders than hidden ones and those of systems."""
    listing = _Listing(follow_links=False)
    return any(listing.is_folder(entry) for entry in listing.entries(os.fspath(root)))


def list_identities(root: str | os.PathLike[str], *, follow_links: bool = False) -> list[Identity]:
    """List a folder of identities as torchvision's ``ImageFolder`` orders it, so that labels are the host's.

    The label of an identity is its place in the list. Images may lie in sub-folders of an identity's folder. Hidden
    files and folders, those of systems (``@eaDir``, ``__MACOSX``, ...) and files that are no images are skipped and
    counted in a warning. Identities whose images all lie in sub-folders are named in another: the folder may be one
    level too high. Symbolic links are refused unless they are to be followed.
    """
    listing = _Listing(follow_links)
    identities, nested, empty, outside = [], [], [], 0
    for entry in sorted(listing.entries(os.fspath(root)), key=lambda entry: entry.name):
        if not listing.is_folder(entry):
            outside += entry.name.lower().endswith(IMAGE_SUFFIXES)
            continue
        listing.check_link(entry)
        images = sorted(listing.images(entry.path))
        if not images:
            empty.append(entry.path)
        elif all(folder != entry.path for folder, _ in images):
            nested.append(images[0][0])
        identities.append(Identity(entry.name, [os.path.join(folder, name) for folder, name in images]))
    if not identities:
        raise DataError(f"{root} holds no identity folders; wanted one folder of images per identity")
    _warn(root, listing, outside, nested, len(identities))
    if empty:
        unlabelled = f", or name {Path(root) / '**'} for all images without labels" if outside else ""
        raise DataError(
            f"identity folders without an image ({', '.join(IMAGE_SUFFIXES)}): {_some(empty)}; add one or remove them"
            f"{unlabelled}"
        )
    return identities


def list_images(root: str | os.PathLike[str], *, follow_links: bool = True) -> list[str]:
    """List the images below a folder, at any depth.

    Args:
        root: the folder.
        follow_links: whether symbolic links are followed; they are refused otherwise.

    Returns:
        Their paths, by folder and name; hidden and system files are passed over, and a warning counts what was.

    Raises:
        DataError: no such folder, no image in it, or a symbolic link.
    """
    listing = _Listing(follow_links)
    found = [os.path.join(folder, name) for folder, name in sorted(listing.images(os.fspath(root)))]
    _warn(root, listing, 0, [], 0)
    if not found:
        raise DataError(f"{root} holds no image ({', '.join(IMAGE_SUFFIXES)})")
    return found


def _some(paths: list[str]) -> str:
    more = f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
    return ", ".join(paths[:_SHOWN]) + more


def _warn(root: str | os.PathLike[str], listing: _Listing, outside: int, nested: list[str], identities: int) -> None:
    passed_over = []
    if listing.suffixes:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in listing.suffixes.most_common())
        passed_over.append(f"{listing.suffixes.total()} files that are no images ({kinds})")
    if outside:
        passed_over.append(f"{outside} images beside the identities' folders")
    if listing.hidden:
        passed_over.append(f"hidden files and folders: {_some(listing.hidden)}")
    if passed_over:
        logger.warning("%s: passed over %s", printable(root), printable("; ".join(passed_over)))
    if nested:
        logger.warning(
            "%s: the images of %d of %d identities lie in sub-folders only, such as %s, and each folder directly in %s "
            "is taken for one person; where the sub-folders are the people, give the folder that holds them",
            *(printable(root), len(nested), identities, printable(nested[0]), printable(root)),
        )


def read_image_file(path: str | os.PathLike[str]) -> bytes:
    """Read an image file's bytes.

    Raises:
        BadRecordError: it cannot be read, or is larger than any image of a face.
    """
    try:
        with open_regular(path) as stream:
            size = os.fstat(stream.fileno()).st_size
            if size > _LARGEST_FILE:
                raise BadRecordError(f"{path} has {size} bytes; no image of a face has more than {_LARGEST_FILE}")
            return stream.read()
    except OSError as error:
        raise BadRecordError(f"cannot read {path}: {error.strerror}") from None
