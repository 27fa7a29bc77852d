"""TinyFace's test set in the folders of the public toolboxes (Cheng et al., "Low-Resolution Face Recognition", 2018).

::

    Probe/17_3.jpg                  faces to search for; the person is the name up to the first _
    Gallery_Match/17_1.jpg          enrolled faces of the same persons, one or several of each
    Gallery_Distractor/9041.jpg     enrolled faces of nobody who is searched for

The faces are aligned, 112 x 112 pixels, as those that are handed round for AdaFace and CVLface (a folder
``aligned_pad_0.1_pad_high``); TinyFace's own crops are not.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arcface_kd.data.formats.image import decode_rgb
from arcface_kd.data.formats.image_folder import list_images, read_image_file
from arcface_kd.errors import DataError

_PROBE, _MATCH, _DISTRACTOR = "Probe", "Gallery_Match", "Gallery_Distractor"
_SIZE = 112


@dataclass(frozen=True, eq=False)
class TinyFaceSet:
    """Faces to search for, and those to search among."""

    name: str  # the folder's
    folder: Path  # where the images are
    files: list[str]  # N names of images: the probes, then the gallery
    probes: int  # the number of probes Q
    persons: NDArray[Any]  # int64 (N,), a number for each person; -1 for distractors

    def face(self, number: int) -> NDArray[Any]:
        """Read and decode a face: uint8 (3, 112, 112), RGB, contiguous."""
        path = self.folder / self.files[number]
        try:
            pixels = decode_rgb(read_image_file(path), (_SIZE, _SIZE))
        except DataError as error:
            raise DataError(str(error) if str(path) in str(error) else f"{path}: {error}; give aligned faces") from None
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def is_tinyface(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder looks like TinyFace's."""
    return (Path(folder) / _PROBE).is_dir() and (Path(folder) / _MATCH).is_dir()


def read_tinyface(folder: str | os.PathLike[str]) -> TinyFaceSet:
    """List a TinyFace folder; images are read as they are asked for."""
    root = Path(folder)
    probes, match, distractors = (_images(root, part) for part in (_PROBE, _MATCH, _DISTRACTOR))
    people = [Path(file).stem.partition("_")[0] for file in [*probes, *match]]
    _, numbers = np.unique(people, return_inverse=True)
    stranger = np.flatnonzero(~np.isin(numbers[: len(probes)], numbers[len(probes) :]))
    if len(stranger):
        raise DataError(
            f"{root / probes[stranger[0]]}: {root / _MATCH} has no {people[stranger[0]]}_*; wanted a face of each "
            "person who is searched for"
        )
    persons = np.append(numbers, np.full(len(distractors), -1))
    return TinyFaceSet(root.resolve().name, root, [*probes, *match, *distractors], len(probes), persons)


def _images(root: Path, part: str) -> list[str]:
    """The images below one of the folders, by name, relative to the set's."""
    if not (root / part).is_dir():
        raise DataError(f"{root} has no folder {part}; wanted {_PROBE}, {_MATCH} and {_DISTRACTOR}, as in TinyFace")
    return [os.path.relpath(path, root) for path in list_images(root / part)]
