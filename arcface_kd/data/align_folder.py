"""Cut the faces out of a folder of photographs, as every network here wants them."""

import os
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from arcface_kd.data.face_detector import DetectedFaces, Detector
from arcface_kd.data.formats.face_alignment import align, fit_similarity
from arcface_kd.data.formats.image import decode_rgb
from arcface_kd.data.formats.image_folder import list_images, read_image_file
from arcface_kd.errors import ConfigError, DataError
from arcface_kd.system.files import atomic_write

Which = Literal["largest", "central"]

_JPEG_QUALITY = 95


class AlignCounts(NamedTuple):
    """Counts of an aligned folder."""

    written: int  # faces that were cut out now
    there: int  # faces that an earlier run had cut out
    several: int  # photographs among ``written`` with more than one face
    without: int  # photographs without a face, or that cannot be read
    missing: Path  # the file that lists those

    def __str__(self) -> str:
        words = f"{self.written} faces"
        if self.several:
            words += f", {self.several} of them one of several on a photograph"
        if self.there:
            words += f"; {self.there} were there already"
        return words + (f"; {self.without} photographs without a face: {self.missing}" if self.without else "")


def align_folder(
    folder: str | os.PathLike[str], out: str | os.PathLike[str], detector: Detector, *, which: Which = "largest"
) -> AlignCounts:
    """Align the face on each photograph of a folder, at any depth, to 112x112 pixels.

    Faces go to the same places below ``out``, as JPEG of quality 95: ``ann/1.jpg`` stays ``ann/1.jpg``, ``ann/2.png``
    becomes ``ann/2.png.jpg``. Those that are there already are left alone. Photographs are turned as their EXIF says.

    Args:
        folder: photographs.
        out: where faces go; ``not_found.txt`` there lists photographs without one, with the reason.
        detector: see :func:`~arcface_kd.data.face_detector.open_detector`.
        which: of several faces the largest, or the one whose middle is nearest to that of the photograph.

    Raises:
        ConfigError: ``out`` lies in ``folder``.
        DataError: no image in the folder.
        OSError: ``out`` cannot be written.
    """
    import cv2
    from tqdm import tqdm

    source, target = Path(folder), Path(out)
    if target.resolve().is_relative_to(source.resolve()):
        raise ConfigError(f"{target} lies in {source}, and its faces would be aligned as well: choose another folder")
    written = there = several = 0
    missing: dict[str, str] = {}
    # None shows the bar on a terminal only.
    for path in tqdm(list_images(source), desc="aligning", unit="image", disable=None):
        place = os.path.relpath(path, source)
        face = target / (place if place.lower().endswith((".jpg", ".jpeg")) else f"{place}.jpg")
        if face.exists():
            there += 1
            continue
        try:
            pixels = decode_rgb(read_image_file(path), upright=True)
        except DataError as error:
            missing[place] = str(error)
            continue
        faces = detector(pixels)
        if not len(faces.boxes):
            missing[place] = "no face found"
            continue
        aligned = align(pixels, fit_similarity(faces.landmarks[[_choose(faces, pixels, which)]])[0])
        jpeg = cv2.imencode(".jpg", aligned[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])[1]
        _write(face, jpeg.tobytes())
        written += 1
        several += len(faces.boxes) > 1
    listed = "".join(f"{place}\t{reason}\n" for place, reason in missing.items())
    _write(target / "not_found.txt", listed.encode(errors="surrogateescape"))
    return AlignCounts(written, there, several, len(missing), target / "not_found.txt")


def _choose(faces: DetectedFaces, pixels: NDArray[np.uint8], which: Which) -> int:
    low, high = faces.boxes[:, :2], faces.boxes[:, 2:]
    if which == "largest":
        return int((high - low).prod(axis=1).argmax())
    middle = np.array(pixels.shape[1::-1]) / 2
    return int((((low + high) / 2 - middle) ** 2).sum(axis=1).argmin())


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as stream:
        stream.write(content)
