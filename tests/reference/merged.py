"""Merged embeddings as one would write them down: one image at a time, axes by a singular value decomposition."""

import numpy as np


def unit(row: np.ndarray) -> np.ndarray:
    return row / np.sqrt((row**2).sum())


def merged_rows(teachers: list[np.ndarray], how: str, count: int = 0) -> np.ndarray:
    """Unit vectors of the teachers (N, D_i), by ``concat``, ``mean`` or ``pca`` with ``count`` axes, up to sign."""
    rows = []
    for number in range(len(teachers[0])):
        parts = [unit(teacher[number]) for teacher in teachers]
        rows.append(unit(np.sum(parts, 0) if how == "mean" else np.concatenate(parts)))
    if how != "pca":
        return np.stack(rows)
    axes = np.linalg.svd(np.stack(rows), full_matrices=False)[2][:count]
    return np.stack([unit(axes @ row) for row in rows])
