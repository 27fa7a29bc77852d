"""Records of drawn faces, where what is measured does not depend on whose faces they are."""

from pathlib import Path

from arcface_kd.data.pack import write_identities
from arcface_kd.data.synthetic_faces import SyntheticFaces


def draw_records(folder: Path, images: int) -> None:
    """Write ``train.rec`` and what belongs to it, one image of each identity.

    Args:
        folder: where to.
        images: number of them.
    """
    faces = SyntheticFaces(0)
    write_identities(folder, [1] * images, (faces.jpeg(number, 0) for number in range(images)))
