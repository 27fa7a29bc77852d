"""What a data set is, in one number: whether a cache of its images' embeddings still belongs to it."""

import hashlib
from pathlib import Path

import numpy as np

from arcface_kd.data.dataset import FaceDataset, FolderDataset, RecordDataset
from arcface_kd.errors import DataError

_SAMPLES = 256


def fingerprint(dataset: FaceDataset) -> str:
    """SHA-256 over the number of images and what tells them apart, in hexadecimal.

    Records: every key, and the bytes of 256 images spread over the set. Folders: every identity's name and label, and
    256 files. Reading all of a set would take as long as an epoch; a set that was packed again differs in its images
    or in their order, which the sample sees.

    Args:
        dataset: records or a folder.

    Returns:
        64 characters.

    Raises:
        DataError: a kind of data set whose images are not kept anywhere.
    """
    digest = hashlib.sha256(f"{type(dataset).__name__} {len(dataset)}".encode())
    if isinstance(dataset, RecordDataset):
        digest.update(np.ascontiguousarray(dataset.keys).tobytes())
    elif isinstance(dataset, FolderDataset):
        digest.update("\0".join(Path(name).name for name in dataset.names).encode())
    else:
        raise DataError(f"{type(dataset).__name__} has no images of its own that could be cached: leave kd_cache unset")
    for index in np.unique(np.linspace(0, len(dataset) - 1, _SAMPLES, dtype=np.int64)).tolist():
        digest.update(f"{dataset.label(index)} ".encode())
        digest.update(dataset.image_bytes(index))
    return digest.hexdigest()
