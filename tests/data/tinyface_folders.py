"""Small data sets in TinyFace's layout: few persons, several enrolled faces of each, distractors."""

from pathlib import Path

import cv2
import numpy as np


def write_tinyface(folder: Path, persons: int = 6, distractors: int = 25, seed: int = 0) -> Path:
    """Coarse patterns under noise: two enrolled faces and three probes of each person."""
    random = np.random.default_rng(seed)
    patterns = random.uniform(0, 255, (persons + distractors, 4, 4, 3))

    def write(part: str, name: str, pattern: np.ndarray) -> None:
        face = cv2.resize(pattern, (112, 112), interpolation=cv2.INTER_CUBIC) + random.normal(0, 60, (112, 112, 3))
        (folder / part).mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(folder / part / name), np.clip(face, 0, 255).astype(np.uint8))

    for person in range(persons):
        for shot in range(5):
            blurred = patterns[person] * random.uniform(0.5, 1) + random.normal(0, 70, (4, 4, 3))
            write("Probe" if shot < 3 else "Gallery_Match", f"{person + 8}_{shot}.png", blurred)
    for number in range(distractors):
        write("Gallery_Distractor", f"{number}.png", patterns[persons + number])
    return folder
