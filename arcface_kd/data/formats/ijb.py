"""IJB-B and IJB-C as InsightFace lays them out: loose crops with five landmarks each, templates, pairs and galleries.

::

    IJBC/loose_crop/1.jpg ...                   one face each, with its surroundings
    IJBC/meta/ijbc_name_5pts_score.txt          file, x and y of five landmarks, the detector's score
    IJBC/meta/ijbc_face_tid_mid.txt             file, template, medium; line by line the same files
    IJBC/meta/ijbc_template_pair_label.txt      1:1: two templates, 1 for one person and 0 for two
    IJBC/meta/ijbc_1N_gallery_G1.csv, ..._G2    1:N: template and person of each enrolled image, under a header line
    IJBC/meta/ijbc_1N_probe_mixed.csv           1:N: the same of the searches

A template is what is known of a person at one time: images and frames of videos. A medium is where a face was found;
frames of one video are one medium.
"""

import io
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arcface_kd.data.formats.face_alignment import align, fit_similarity
from arcface_kd.data.formats.image import decode_rgb
from arcface_kd.data.formats.image_folder import read_image_file
from arcface_kd.errors import DataError
from arcface_kd.system.files import open_regular

_LANDMARKS = 5


@dataclass(frozen=True, eq=False)
class Enrolment:
    """Templates whose persons are known; each number once, rising."""

    templates: NDArray[Any]
    subjects: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class IJBSet:
    """Faces, their grouping into templates, and the pairs and searches to judge."""

    name: str  # ``ijbb``, ``ijbc`` or what else the files' names begin with
    folder: Path  # where the images are
    files: list[str]  # N names of images
    similarities: NDArray[Any]  # float64 (N, 2, 3), what aligns each face
    detector_scores: NDArray[Any]  # float64 (N,), how sure the detector was of a face; a weight in the template
    templates: NDArray[Any]  # int64 (N,), the template of each face
    media: NDArray[np.int64]  # int64 (N,), the medium of each face
    pairs: NDArray[Any]  # int64 (P, 2), templates to compare 1:1; P is 0 where the set has no such list
    is_same: NDArray[np.bool_]  # bool (P,)
    # By name (``G1``, ``G2``), the persons to search among; empty where the set has no 1:N lists.
    galleries: Mapping[str, Enrolment] = field(default_factory=dict)
    probes: Enrolment | None = None  # the searches, in each of the galleries; None without galleries

    def face(self, number: int) -> NDArray[np.uint8]:
        """Read, decode and align a face: uint8 (3, 112, 112), RGB, contiguous."""
        path = self.folder / self.files[number]
        try:
            pixels = decode_rgb(read_image_file(path), upright=True)
        except DataError as error:
            raise DataError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
        return np.ascontiguousarray(align(pixels, self.similarities[number]).transpose(2, 0, 1))


def is_ijb(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder looks like one of IJB's, by the list of faces in its ``meta``."""
    return any((Path(folder) / "meta").glob("*_face_tid_mid.txt"))


def read_ijb(folder: str | os.PathLike[str]) -> IJBSet:
    """Read the lists of an IJB folder; images are read as they are asked for."""
    root = Path(folder)
    meta = root / "meta"
    lists = sorted(meta.glob("*_face_tid_mid.txt"))
    if len(lists) != 1:
        met = ", ".join(path.name for path in lists) or "none"
        raise DataError(f"{meta} holds {met} of *_face_tid_mid.txt; wanted the one list of an IJB set's faces")
    name = lists[0].name.removesuffix("_face_tid_mid.txt")
    files, landmarks, scores = _read_faces(meta / f"{name}_name_5pts_score.txt")
    templates, media = _read_grouping(lists[0], files)
    similarities = fit_similarity(landmarks)
    bad = np.flatnonzero(~np.isfinite(similarities).all(axis=(1, 2)) | ~np.isfinite(scores))
    if len(bad):
        raise DataError(
            f"{meta / f'{name}_name_5pts_score.txt'}: line {bad[0] + 1}: landmarks on one point, or a number that is "
            "not finite"
        )
    known = np.unique(templates)
    pairs, is_same = _read_pairs(meta / f"{name}_template_pair_label.txt", known)
    galleries = {
        path.stem.removeprefix(f"{name}_1N_gallery_"): _read_gallery(path, known)
        for path in sorted(meta.glob(f"{name}_1N_gallery_*.csv"))
    }
    probes = _read_enrolment(meta / f"{name}_1N_probe_mixed.csv", known) if galleries else None
    if not len(pairs) and not galleries:
        raise DataError(
            f"{meta} holds neither {name}_template_pair_label.txt (1:1) nor {name}_1N_gallery_*.csv (1:N); wanted one "
            "of them at least"
        )
    _require_images(root / "loose_crop", files)
    return IJBSet(
        name=name,
        folder=root / "loose_crop",
        files=files,
        similarities=similarities,
        detector_scores=scores,
        templates=templates,
        media=media,
        pairs=pairs,
        is_same=is_same,
        galleries=galleries,
        probes=probes,
    )


def _require_images(folder: Path, files: list[str]) -> None:
    """Refuse lists whose images are not all there, before hours of embedding."""
    there: dict[str, set[str]] = {}
    missing = []
    for file in files:
        place, _, name = file.rpartition("/")
        if place not in there:
            try:
                there[place] = set(os.listdir(folder / place))
            except OSError:
                there[place] = set()
        if name not in there[place]:
            missing.append(file)
    if missing:
        if not folder.is_dir():
            raise DataError(f"{folder} is no folder; wanted the {len(files)} images that the lists in meta name")
        raise DataError(
            f"{folder} lacks {len(missing)} of {len(files)} images that the lists in meta name, such as "
            f"{', '.join(missing[:3])}; copy or unpack it again"
        )


def _lines(path: Path) -> list[list[str]]:
    try:
        with io.TextIOWrapper(open_regular(path), encoding="utf-8") as stream:
            return [line.split() for line in stream]
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DataError(f"{path} is no text file") from None


def _read_faces(path: Path) -> tuple[list[str], NDArray[Any], NDArray[Any]]:
    """Names, landmarks (N, 5, 2) and detector scores (N,)."""
    lines = _lines(path)
    if not lines:
        raise DataError(f"{path} is empty")
    numbers = np.empty((len(lines), 2 * _LANDMARKS + 1))
    for row, words in enumerate(lines):
        try:
            # Reshaped, since numpy would fill a row with a single number.
            numbers[row] = np.reshape([float(word) for word in words[1:]], numbers.shape[1])
        except ValueError:
            raise DataError(
                f"{path}: line {row + 1} is {' '.join(words)[:80]!r}; wanted a file, x and y of five landmarks and the "
                "detector's score"
            ) from None
        if os.path.isabs(words[0]) or ".." in words[0].replace("\\", "/").split("/"):
            raise DataError(f"{path}: line {row + 1} names {words[0][:80]!r}, outside loose_crop; wanted a file in it")
    return [words[0] for words in lines], numbers[:, :-1].reshape(-1, _LANDMARKS, 2), numbers[:, -1]


def _read_grouping(path: Path, files: list[str]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Template and medium of each of the files."""
    lines = _lines(path)
    if len(lines) != len(files):
        raise DataError(f"{path} lists {len(lines)} faces, the list of landmarks {len(files)}; they must be the same")
    numbers = np.empty((len(lines), 2), dtype=np.int64)
    for row, (words, file) in enumerate(zip(lines, files, strict=True)):
        try:
            numbers[row] = np.reshape([int(word) for word in words[1:]], 2)
        except (ValueError, OverflowError):
            raise DataError(
                f"{path}: line {row + 1} is {' '.join(words)[:80]!r}; wanted a file, its template and its medium"
            ) from None
        if words[0] != file:
            raise DataError(f"{path}: line {row + 1} is of {words[0]!r}, the list of landmarks has {file!r} there")
    return numbers[:, 0], numbers[:, 1]


def _integers(path: Path, columns: int, *, delimiter: str | None = None, header: int = 0) -> NDArray[np.int64]:
    """The first columns of a table; numpy's parser, for 1:1 lists have millions of lines."""
    try:
        with io.TextIOWrapper(open_regular(path), encoding="utf-8") as stream, warnings.catch_warnings():
            # Of an empty list, which the callers refuse.
            warnings.simplefilter("ignore", UserWarning)
            return np.loadtxt(
                stream, np.int64, comments=None, delimiter=delimiter, skiprows=header, usecols=range(columns), ndmin=2
            )
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise DataError(f"{path} does not hold {columns} whole numbers a line: {error}") from None


def _refuse_unknown(path: Path, templates: NDArray[Any], known: NDArray[Any]) -> None:
    foreign = np.setdiff1d(templates, known)
    if len(foreign):
        raise DataError(
            f"{path}: {len(foreign)} of its templates, such as {foreign[0]}, have no face in the list of faces"
        )


def _read_pairs(path: Path, known: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    if not path.exists():
        return np.empty((0, 2), dtype=np.int64), np.empty(0, dtype=bool)
    table = _integers(path, 3)
    _refuse_unknown(path, table[:, :2], known)
    kinds = np.unique(table[:, 2])
    if kinds.tolist() != [0, 1]:
        raise DataError(f"{path}: its third column holds {kinds[:5].tolist()}; wanted 0 and 1, both of them")
    return table[:, :2], table[:, 2] == 1


def _read_enrolment(path: Path, known: NDArray[Any]) -> Enrolment:
    table = np.unique(_integers(path, 2, delimiter=",", header=1), axis=0)
    if not len(table):
        raise DataError(f"{path} lists no template")
    _refuse_unknown(path, table[:, 0], known)
    twice = np.flatnonzero(table[1:, 0] == table[:-1, 0])
    if len(twice):
        raise DataError(f"{path}: template {table[twice[0], 0]} is of two persons, {table[twice[0] : twice[0] + 2, 1]}")
    return Enrolment(table[:, 0], table[:, 1])


def _read_gallery(path: Path, known: NDArray[Any]) -> Enrolment:
    gallery = _read_enrolment(path, known)
    subjects, counts = np.unique(gallery.subjects, return_counts=True)
    if counts.max() > 1:
        raise DataError(f"{path}: person {subjects[counts.argmax()]} is enrolled {counts.max()} times; wanted once")
    return gallery
