"""IJB's protocols written out: files parsed line by line, loops over templates, media, faces, pairs and probes."""

import csv
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import nn

CORNERS = [(38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041)]

Embed = Callable[[np.ndarray], np.ndarray]
"""uint8 (112, 112, 3), RGB, to (D,)."""


def embed_with(model: nn.Module) -> Embed:
    """One face by a network in evaluation mode, as a trainer shows it."""
    model.eval()

    @torch.no_grad()
    def embed(face: np.ndarray) -> np.ndarray:
        pixels = torch.from_numpy(np.ascontiguousarray(face.transpose(2, 0, 1)))[None].float()
        return model((pixels - 127.5) / 127.5)[0].double().numpy()

    return embed


def similarity(landmarks: np.ndarray) -> np.ndarray:
    """Least squares over a, b, x, y of (a -b x; b a y)."""
    rows, wanted = [], []
    for (x, y), (u, v) in zip(landmarks, CORNERS, strict=True):
        rows += [[x, -y, 1, 0], [y, x, 0, 1]]
        wanted += [u, v]
    a, b, x, y = np.linalg.lstsq(np.array(rows), np.array(wanted), rcond=None)[0]
    return np.array([[a, -b, x], [b, a, y]])


def unit(vector: np.ndarray) -> np.ndarray:
    length = np.sqrt((vector**2).sum())
    return vector / length if length > 0 else vector


def templates(folder: Path, name: str, embed: Embed) -> dict[int, np.ndarray]:
    """Each template's pooled embedding."""
    faces: dict[int, dict[int, list[np.ndarray]]] = {}
    meta = folder / "meta"
    listed = (meta / f"{name}_name_5pts_score.txt").read_text().splitlines()
    grouped = (meta / f"{name}_face_tid_mid.txt").read_text().splitlines()
    for line, group in zip(listed, grouped, strict=True):
        file, *numbers = line.split()
        values = [float(number) for number in numbers]
        picture = cv2.imread(str(folder / "loose_crop" / file))[..., ::-1]
        matrix = similarity(np.array(values[:10]).reshape(5, 2))
        face = cv2.warpAffine(np.ascontiguousarray(picture), matrix, (112, 112))
        embedding = (embed(face) + embed(face[:, ::-1])) * values[10]
        number, medium = map(int, group.split()[1:])
        faces.setdefault(number, {}).setdefault(medium, []).append(embedding)
    pooled: dict[int, np.ndarray] = {}
    for template, media in faces.items():
        total = np.zeros_like(embedding)
        for embeddings in media.values():
            total = total + np.array(embeddings).mean(axis=0)
        pooled[template] = unit(total)
    return pooled


def pairs(folder: Path, name: str, pooled: dict[int, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Genuine and impostor cosines."""
    genuine: list[float] = []
    impostor: list[float] = []
    for line in (folder / "meta" / f"{name}_template_pair_label.txt").read_text().splitlines():
        first, second, same = map(int, line.split())
        (genuine if same else impostor).append(float(pooled[first] @ pooled[second]))
    return np.array(genuine), np.array(impostor)


def persons(path: Path) -> dict[int, int]:
    """Person by template."""
    with path.open(newline="") as stream:
        return {int(row["TEMPLATE_ID"]): int(row["SUBJECT_ID"]) for row in csv.DictReader(stream)}


def searches(
    probes: dict[int, int], gallery: dict[int, int], pooled: dict[int, np.ndarray]
) -> tuple[list[tuple[int, float]], list[float]]:
    """Rank and score of the mate for each probe that has one, and the best score for each that has none."""
    mated, strangers = [], []
    for probe, person in probes.items():
        scores = {enrolled: float(pooled[probe] @ pooled[entry]) for entry, enrolled in gallery.items()}
        if person in scores:
            rank = sum(score >= scores[person] for score in scores.values())
            mated.append((rank, scores[person]))
        else:
            strangers.append(max(scores.values()))
    return mated, strangers


def tpir(mated: list[tuple[int, float]], strangers: list[float], level: float) -> float:
    """The best share of hits of all thresholds that raise at most ``level`` false alarms."""
    best = 0.0
    for threshold in [*(score for _, score in mated), *strangers]:
        alarms = sum(score >= threshold for score in strangers)
        if alarms <= level * len(strangers) + 1e-9:
            hits = sum(rank == 1 and score >= threshold for rank, score in mated)
            best = max(best, hits / len(mated))
    return best
