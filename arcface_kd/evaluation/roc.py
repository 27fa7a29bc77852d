"""Receiver operating characteristic of genuine and impostor scores: curve, area, equal error rate, TAR at a FAR.

A score is a similarity: larger means more alike. A pair is accepted when its score reaches a threshold. FAR is the
share of impostor pairs that are accepted, TAR the share of genuine ones; both are exact step functions of the threshold
here, without a grid. There is at least one score of each kind.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arcface_kd.errors import ConfigError


def roc_curve(genuine: NDArray[Any], impostor: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """FAR and TAR (K,), rising from 0 to 1: a point for each distinct score, the strictest threshold first."""
    scores = np.concatenate([genuine, impostor])
    order = np.argsort(-scores, kind="stable")
    descending = scores[order]
    is_last_of_its_score = np.append(descending[1:] != descending[:-1], True)
    accepted_genuine = np.cumsum(order < len(genuine))[is_last_of_its_score]
    accepted = np.flatnonzero(is_last_of_its_score) + 1
    far = np.append(0.0, (accepted - accepted_genuine) / len(impostor))
    tar = np.append(0.0, accepted_genuine / len(genuine))
    return far, tar


def area_under_curve(genuine: NDArray[Any], impostor: NDArray[Any]) -> float:
    """Probability that a genuine score exceeds an impostor score, ties counting half (Mann-Whitney)."""
    ascending = np.sort(impostor)
    below = np.searchsorted(ascending, genuine, side="left").sum(dtype=np.int64)
    not_above = np.searchsorted(ascending, genuine, side="right").sum(dtype=np.int64)
    return int(below + not_above) / (2 * len(genuine) * len(impostor))


def equal_error_rate(genuine: NDArray[Any], impostor: NDArray[Any]) -> float:
    """The common error rate where the curve, joined by straight lines, has FAR = 1 - TAR."""
    far, tar = roc_curve(genuine, impostor)
    return float(equal_error_rates(far[None], tar[None])[0])


def equal_error_rates(far: NDArray[Any], tar: NDArray[Any]) -> NDArray[Any]:
    """The same of each of R curves (R, K) that rise from 0 to 1."""
    excess = far - (1 - tar)
    after = np.maximum(np.argmax(excess >= 0, axis=1), 1)
    rows, before = np.arange(len(far)), after - 1
    share = excess[rows, before] / (excess[rows, before] - excess[rows, after])
    return np.asarray(far[rows, before] + share * (far[rows, after] - far[rows, before]))


def tar_at_far(genuine: NDArray[Any], impostor: NDArray[Any], levels: Sequence[float]) -> dict[float, float | None]:
    """TAR at the loosest threshold whose FAR does not exceed each level, which is in (0, 1].

    A level needs at least 1 / level impostor pairs, or it gets None: with fewer, a single false acceptance already
    exceeds it, and the number would only say where the hardest impostor pair is. A genuine score of minus infinity is
    never accepted.
    """
    descending = -np.sort(-impostor)
    result: dict[float, float | None] = {}
    for level in levels:
        if not 0 < level <= 1:
            raise ConfigError(f"FAR level {level!r}: wanted a share above 0 and at most 1, such as 1e-3")
        # 1e-3 * 1000 is a hair below 1 in floating point for some levels; a whole pair is meant.
        allowed = int(level * len(impostor) + 1e-9)
        if allowed == 0:
            result[level] = None
        else:
            threshold = descending[allowed] if allowed < len(descending) else -np.inf
            result[level] = float(np.mean(genuine > threshold))
    return result
