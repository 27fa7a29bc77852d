r"""Confidence intervals of verification scores, by a bootstrap over identities.

Pairs that share a person are not independent: a face that is hard to recognise spoils all of its pairs. So persons are
drawn, with replacement, and a pair counts as often as its persons were drawn, ``W_i W_j`` times for an impostor pair of
i and j and ``W_i`` times for a genuine pair (the vertex bootstrap; Fogliato, Patil, Perona, "Confidence Intervals for
Error Rates in 1:1 Matching Tasks", IJCV 2024, arXiv 2306.01198). A person who occurs in one pair only is not told apart
from that pair: such a pair counts as often as its other person was drawn, or is drawn itself where both occur once.
Without any shared person this is the ordinary bootstrap over pairs. The product also multiplies what is an impostor
pair's own chance, so the intervals err on the wide side: with scores that do not depend on persons at all, 6,000 pairs
of 1,500 persons have intervals one and a half times as wide as those of pairs.

The same draws serve all models of a comparison, so that differences between models have intervals of their own, which
are narrower than those of the scores.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from arcface_kd.evaluation.roc import equal_error_rates
from arcface_kd.evaluation.verification import tar_name

REPLICATES = 1000
LEVEL = 0.95
# Replicates that are worked on together: a few arrays of 64 x 12,000 numbers.
_TOGETHER = 64

Floats = NDArray[np.float64]


class Interval(NamedTuple):
    """A confidence interval."""

    low: float
    high: float


def interval(values: Floats, level: float = LEVEL) -> Interval:
    """The percentile interval of a statistic from its replicates (R,); NaN where none has a value."""
    known = values[~np.isnan(values)]
    if len(known) == 0:
        return Interval(float("nan"), float("nan"))
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


def resampling_units(identities: NDArray[np.int64]) -> tuple[NDArray[np.int64], int]:
    """What is drawn: persons of several pairs, and pairs that share none.

    From (P, 2) person numbers to units (P, 2), the second -1 where a pair has one, and their number.
    """
    genuine = identities[:, 0] == identities[:, 1]
    persons, flat = np.unique(identities, return_inverse=True)
    places = flat.reshape(-1, 2)
    occurrences = np.bincount(places[:, 0], minlength=len(persons))
    occurrences += np.bincount(places[~genuine, 1], minlength=len(persons))
    shared = occurrences[places] > 1
    shared[genuine, 1] = False
    units = np.where(shared, places, -1)
    # One person of the pair in the first column, where there is one.
    swap = units[:, 0] < 0
    units[swap] = units[swap][:, ::-1]
    alone = units[:, 0] < 0
    units[alone, 0] = len(persons) + np.arange(alone.sum())
    used, numbered = np.unique(units[units >= 0], return_inverse=True)
    units[units >= 0] = numbered
    return units, len(used)


def pair_weights(
    identities: NDArray[np.int64], replicates: int = REPLICATES, seed: int = 0, together: int = _TOGETHER
) -> Iterator[Floats]:
    """How often each pair counts in each replicate, in blocks (r, P) of at most ``together`` rows."""
    units, count = resampling_units(identities)
    both = units[:, 1] >= 0
    random = np.random.default_rng(seed)
    for start in range(0, replicates, together):
        rows = min(together, replicates - start)
        drawn = random.integers(count, size=(rows, count)) + np.arange(rows)[:, None] * count
        times = np.bincount(drawn.reshape(-1), minlength=rows * count).reshape(rows, count).astype(np.float64)
        weights = times[:, units[:, 0]]
        weights[:, both] *= times[:, units[both, 1]]
        yield weights


def replicate_statistics(
    scores: Floats, is_same: NDArray[np.bool_], correct: NDArray[np.bool_], weights: Floats, far_levels: Sequence[float]
) -> dict[str, Floats]:
    """The verification scores of weighted pairs, (r,) each, from weights (r, P).

    ``correct`` (P,) says whether the ten-fold protocol decided the pair correctly; its thresholds stay as they are. A
    replicate that lacks genuine or impostor pairs gives NaN. With all weights 1 they equal those of
    :mod:`arcface_kd.evaluation.roc`.
    """
    order = np.argsort(-scores, kind="stable")
    last_of_score = np.append(np.diff(scores[order]) != 0, True)
    ordered = weights[:, order]
    accepted_genuine = np.cumsum(ordered * is_same[order], axis=1)
    accepted_impostor = np.cumsum(ordered * ~is_same[order], axis=1)
    genuine, impostor = accepted_genuine[:, -1:], accepted_impostor[:, -1:]
    nothing = np.zeros((len(weights), 1))
    with np.errstate(invalid="ignore", divide="ignore"):
        tar = np.hstack([nothing, accepted_genuine[:, last_of_score] / genuine])
        far_counts = np.hstack([nothing, accepted_impostor[:, last_of_score]])
        far = far_counts / impostor
        found = {"accuracy": (weights * correct).sum(1) / weights.sum(1)}
        found["auc"] = (np.diff(far, axis=1) * (tar[:, 1:] + tar[:, :-1]) / 2).sum(1)
        found["eer"] = equal_error_rates(far, tar)
        rows = np.arange(len(weights))
        for level in far_levels:
            # A hair, since 1e-3 * 3000 may lie below 3.
            allowed = (far_counts <= level * impostor + 1e-9).sum(1) - 1
            found[tar_name(level)] = tar[rows, allowed]
    incomplete = (genuine * impostor)[:, 0] == 0
    for values in found.values():
        values[incomplete] = np.nan
    return found


def bootstrap(
    scores: Floats,
    is_same: NDArray[np.bool_],
    correct: NDArray[np.bool_],
    identities: NDArray[np.int64],
    far_levels: Sequence[float],
    *,
    replicates: int = REPLICATES,
) -> dict[str, Floats]:
    """The verification scores in each replicate, (R,) each; equal pairs give equal draws.

    As :func:`replicate_statistics`, from persons (P, 2).
    """
    blocks = [
        replicate_statistics(scores, is_same, correct, weights, far_levels)
        for weights in pair_weights(identities, replicates)
    ]
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
