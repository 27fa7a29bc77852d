"""InsightFace's ten-fold verification written out: a loop over folds, a loop over thresholds, a loop over pairs."""

from collections.abc import Iterator

import numpy as np


def folds(pairs: int) -> Iterator[tuple[list[int], list[int]]]:
    """Training and test indices of ten contiguous folds, the longer ones first."""
    start = 0
    for fold in range(10):
        size = pairs // 10 + (1 if fold < pairs % 10 else 0)
        test = list(range(start, start + size))
        yield [i for i in range(pairs) if i not in set(test)], test
        start += size


def accuracy(distances: np.ndarray, is_same: np.ndarray, threshold: float) -> float:
    right = sum((distance < threshold) == bool(same) for distance, same in zip(distances, is_same, strict=True))
    return right / len(distances)


def ten_fold_accuracy(distances: np.ndarray, is_same: np.ndarray) -> tuple[list[float], list[float]]:
    """Accuracy of each fold and the threshold it was had at."""
    accuracies, chosen = [], []
    for train, test in folds(len(distances)):
        best, best_threshold = -1.0, float("nan")
        for threshold in np.arange(0, 4, 0.01):
            now = accuracy(distances[train], is_same[train], threshold)
            if now > best:
                best, best_threshold = now, threshold
        accuracies.append(accuracy(distances[test], is_same[test], best_threshold))
        chosen.append(best_threshold)
    return accuracies, chosen


def accepted_share(distances: np.ndarray, threshold: float) -> float:
    return sum(distance < threshold for distance in distances) / len(distances)


def ten_fold_val(distances: np.ndarray, is_same: np.ndarray, far: float) -> tuple[list[float], list[float]]:
    """TAR and FAR of each fold at the threshold, interpolated on a grid, with a given FAR on the other nine."""
    grid = np.arange(0, 4, 0.001)
    vals, fars = [], []
    for train, test in folds(len(distances)):
        impostors = distances[[i for i in train if not is_same[i]]]
        curve = [accepted_share(impostors, threshold) for threshold in grid]
        if max(curve) < far:
            threshold = 0.0
        else:
            threshold = grid[-1]
            for i in range(1, len(grid)):
                if curve[i] > far:
                    threshold = grid[i - 1] + (far - curve[i - 1]) / (curve[i] - curve[i - 1]) * (grid[i] - grid[i - 1])
                    break
        vals.append(accepted_share(distances[[i for i in test if is_same[i]]], threshold))
        fars.append(accepted_share(distances[[i for i in test if not is_same[i]]], threshold))
    return vals, fars


def tar_at_far(genuine: np.ndarray, impostor: np.ndarray, far: float) -> float:
    """The best TAR of all thresholds (scores themselves, and one above all) whose FAR does not exceed ``far``.

    Scores are similarities; a score that reaches the threshold is accepted.
    """
    best = 0.0
    for threshold in [*genuine, *impostor]:
        accepted = sum(score >= threshold for score in impostor)
        if accepted <= far * len(impostor) + 1e-9:
            best = max(best, sum(score >= threshold for score in genuine) / len(genuine))
    return best


def area_under_curve(genuine: np.ndarray, impostor: np.ndarray) -> float:
    wins = sum((g > i) + 0.5 * (g == i) for g in genuine for i in impostor)
    return wins / (len(genuine) * len(impostor))
