"""The vertex bootstrap, pair by pair: every pair is written down as often as it counts."""

import numpy as np

from arcface_kd.evaluation.roc import area_under_curve, equal_error_rate, tar_at_far


def statistics(
    scores: np.ndarray, is_same: np.ndarray, correct: np.ndarray, times: np.ndarray, levels: list[float]
) -> dict[float | str, float | None]:
    """Scores of a set in which pair k occurs ``times[k]`` times."""
    pairs = [pair for pair, count in enumerate(times) for _ in range(int(count))]
    genuine, impostor = scores[[p for p in pairs if is_same[p]]], scores[[p for p in pairs if not is_same[p]]]
    if len(genuine) == 0 or len(impostor) == 0:
        return {}
    found: dict[float | str, float | None] = {
        "accuracy": float(np.mean(correct[pairs])),
        "auc": area_under_curve(genuine, impostor),
        "eer": equal_error_rate(genuine, impostor),
    }
    found.update({level: tar for level, tar in tar_at_far(genuine, impostor, levels).items()})
    return found


def pair_count(pair: int, identities: np.ndarray, drawn: dict[int, int], own: dict[int, int]) -> int:
    """How often a pair counts when person i was drawn ``drawn[i]`` times, or the pair itself ``own[pair]`` times."""
    persons = set(identities[pair].tolist())
    times = 1
    shares_a_person = False
    for person in persons:
        if sum(person in other for other in identities.tolist()) > 1:
            times *= drawn[person]
            shares_a_person = True
    return times if shares_a_person else own[pair]
