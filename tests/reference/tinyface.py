"""TinyFace's protocol written out: a loop over probes, one over the gallery, and one down the ranks."""

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

Embed = Callable[[np.ndarray], np.ndarray]
"""uint8 (112, 112, 3), RGB, to (D,)."""


def _views(path: Path, embed: Embed) -> np.ndarray:
    face = cv2.imread(str(path))[..., ::-1]
    total = embed(face) + embed(face[:, ::-1])
    return total / np.sqrt((total**2).sum())


def rank_rates(folder: Path, embed: Embed, ranks: tuple[int, ...], enrol: Embed | None = None) -> dict[int, float]:
    """The share of probes with a face of their person among the first of the gallery."""
    gallery = []
    for part in ("Gallery_Match", "Gallery_Distractor"):
        for path in (folder / part).iterdir():
            person = path.name.split("_")[0] if part == "Gallery_Match" else None
            gallery.append((person, _views(path, enrol or embed)))
    found: dict[int, list[bool]] = {rank: [] for rank in ranks}
    for path in (folder / "Probe").iterdir():
        probe = _views(path, embed)
        order = sorted(gallery, key=lambda entry: -float(probe @ entry[1]))
        for rank in ranks:
            found[rank].append(any(person == path.name.split("_")[0] for person, _ in order[:rank]))
    return {rank: float(np.mean(hits)) for rank, hits in found.items()}
