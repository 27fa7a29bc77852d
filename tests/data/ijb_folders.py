"""Small data sets in IJB's layout, of any aligned faces."""

from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np

from arcface_kd.data.formats.face_alignment import TEMPLATE

Face = Callable[[int, int], np.ndarray]
"""Identity and number of an image to uint8 (112, 112, 3), RGB, aligned."""


def loosen(face: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A larger picture around an aligned face, turned and scaled, and where the five landmarks are in it."""
    angle, scale = random.uniform(-0.5, 0.5), random.uniform(1.2, 1.8)
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    middle = np.array([150.0, 140.0])
    placed = np.hstack([turn, (middle - turn @ [56.0, 56.0])[:, None]])
    picture = cv2.warpAffine(face, placed, (300, 280), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT)
    return picture, TEMPLATE @ turn.T + placed[:, 2]


def write_ijb(
    folder: Path,
    face: Face,
    subjects: Sequence[int],
    *,
    name: str = "ijbt",
    seed: int = 0,
    one_to_many: bool = True,
    ending: str = ".png",
) -> None:
    """Write a set: of each subject an enrolled template and two to search for it, of one to four media.

    Every pair of an enrolled template and another is listed. The subjects are dealt out to the galleries G1 and G2.
    """
    random = np.random.default_rng(seed)
    meta, crops = folder / "meta", folder / "loose_crop"
    meta.mkdir(parents=True)
    crops.mkdir()
    faces: list[str] = []
    grouping: list[str] = []
    enrolled: list[tuple[int, int]] = []
    searched: list[tuple[int, int]] = []
    numbers = iter(random.permutation(np.arange(1000, 1000 + 3 * len(subjects))).tolist())
    medium = 0
    for subject in subjects:
        shot = 0
        for part in range(3):
            template = next(numbers)
            (searched if part else enrolled).append((template, subject))
            for _ in range(int(random.integers(1, 5))):
                medium += 1
                for _ in range(int(random.choice([1, 1, 3]))):
                    picture, landmarks = loosen(face(subject, shot), random)
                    shot += 1
                    file = f"{len(faces) + 1}{ending}"
                    cv2.imwrite(str(crops / file), picture[..., ::-1])
                    points = " ".join(f"{value:.3f}" for value in landmarks.ravel())
                    faces.append(f"{file} {points} {random.uniform(0.4, 1):.4f}")
                    # Two templates may show frames of one video: its number occurs in both.
                    grouping.append(f"{file} {template} {medium % 7 if part == 2 else 100 + medium}")
    (meta / f"{name}_name_5pts_score.txt").write_text("\n".join(faces) + "\n")
    (meta / f"{name}_face_tid_mid.txt").write_text("\n".join(grouping) + "\n")
    pairs = [f"{a} {b} {int(i == j)}" for a, i in enrolled for b, j in searched]
    (meta / f"{name}_template_pair_label.txt").write_text("\n".join(pairs) + "\n")
    if one_to_many:
        head = "TEMPLATE_ID,SUBJECT_ID,FILENAME"
        for gallery in (0, 1):
            # As in IJB's own lists, a line for each image.
            lines = [
                f"{template},{subject},img/{k}.jpg" for template, subject in enrolled[gallery::2] for k in range(2)
            ]
            (meta / f"{name}_1N_gallery_G{gallery + 1}.csv").write_text("\n".join([head, *lines]) + "\n")
        lines = [f"{template},{subject},frames/a b.png" for template, subject in searched]
        (meta / f"{name}_1N_probe_mixed.csv").write_text("\n".join([head, *lines]) + "\n")
