"""Fingerprints of data sets, which tell whether a cache of embeddings still belongs to the images."""

import hashlib
import os

import numpy as np

from arcface_kd.data.dataset import FaceDataset, FolderDataset, RecordDataset, UnlabelledFolder
from arcface_kd.data.joined import JoinedDataset
from arcface_kd.errors import BadRecordError, DataError

_SAMPLES = 256


def shows_two_views(dataset: FaceDataset) -> bool:
    """Whether a data set shows each image plain or mirrored and in no other way.

    A subclass may augment, so it is not taken at its parent's word.
    """
    if isinstance(dataset, JoinedDataset):
        return all(map(shows_two_views, dataset.sets))
    return type(dataset) in (RecordDataset, FolderDataset, UnlabelledFolder)


def fingerprint(dataset: FaceDataset) -> str:
    """SHA-256 of a data set's images and their order, in hexadecimal.

    Records: every key, every byte offset and with it every record's length, and the bytes of 256 images spread over the
    set. Folders: every file's place and length, and the bytes of 256. Reading all of a set would take as long as an
    epoch; an image that was exchanged for another one of exactly its length, none of the 256, is not noticed. Of
    several sets each one's. Labels do not count, since embeddings do not depend on them.
    """
    if not shows_two_views(dataset):
        raise DataError(
            f"{type(dataset).__name__} does not keep images that are shown plain or mirrored and in no other way, so "
            "embeddings of them cannot be cached: leave kd_cache unset"
        )
    if isinstance(dataset, JoinedDataset):
        return hashlib.sha256(" ".join(map(fingerprint, dataset.sets)).encode()).hexdigest()
    digest = _outlined(dataset)
    if isinstance(dataset, FolderDataset):
        _add_files(digest, dataset)
    for index in np.unique(np.linspace(0, len(dataset) - 1, _SAMPLES, dtype=np.int64)).tolist():
        try:
            image = dataset.image_bytes(index)
        except BadRecordError:
            if dataset.on_bad_record == "stop":
                raise
            image = b""
        digest.update(f" {len(image)} ".encode())
        digest.update(image)
    return digest.hexdigest()


def outline(dataset: FaceDataset) -> str:
    """A digest of a data set's images and their order, found without reading any of them.

    Records count by key and place, folders by the identities' names, several sets also by the people's numbers, others
    by the number of images.
    """
    return _outlined(dataset).hexdigest()


def _outlined(dataset: FaceDataset) -> "hashlib._Hash":
    digest = hashlib.sha256(f"{type(dataset).__name__} {len(dataset)}".encode())
    if isinstance(dataset, RecordDataset):
        digest.update(dataset.keys.tobytes())
        digest.update(dataset.reader.offsets[dataset.reader.find(dataset.keys)].tobytes())
    elif isinstance(dataset, FolderDataset):
        digest.update("\0".join(dataset.names).encode(errors="surrogateescape"))
    elif isinstance(dataset, JoinedDataset):
        for faces, labels in zip(dataset.sets, dataset.label_maps, strict=True):
            digest.update(outline(faces).encode() + labels.tobytes())
    return digest


def _add_files(digest: "hashlib._Hash", dataset: FolderDataset) -> None:
    # Relative to what the first and the last have in common: a folder may be moved.
    top = os.path.commonpath([os.path.dirname(dataset.where(index)) for index in (0, len(dataset) - 1)])
    for index in range(len(dataset)):
        path = dataset.where(index)
        try:
            size = os.stat(path).st_size
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from None
        digest.update(f"\0{path[len(top) :]}\0{size}".encode(errors="surrogateescape"))
