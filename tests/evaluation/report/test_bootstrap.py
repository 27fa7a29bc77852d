"""The bootstrap against pairs that are written down one by one, and against what statistics knows of it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arcface_kd.evaluation.report.bootstrap import (
    bootstrap,
    interval,
    pair_weights,
    replicate_statistics,
    resampling_units,
)
from arcface_kd.evaluation.verification import tar_name
from tests.reference import bootstrap as twin

LEVELS = [1.0, 0.5, 0.3, 0.1]


def draw(seed: int, pairs: int = 60, persons: int = 12) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Scores with ties, kinds, decisions and identities."""
    random = np.random.default_rng(seed)
    is_same = random.random(pairs) < 0.5
    first = random.integers(persons, size=pairs)
    other = (first + random.integers(1, persons, size=pairs)) % persons
    scores = np.round(random.normal(is_same * 0.6, 0.5), 1)
    return scores, is_same, (scores > 0.3) == is_same, np.stack([first, np.where(is_same, first, other)], axis=1)


@given(seed=st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_weighted_statistics_equal_those_of_repeated_pairs(seed: int) -> None:
    scores, is_same, correct, _ = draw(seed, pairs=24)
    weights = np.random.default_rng(seed).integers(0, 4, size=(5, 24)).astype(float)
    met = replicate_statistics(scores, is_same, correct, weights, LEVELS)
    for row, times in enumerate(weights):
        wanted = twin.statistics(scores, is_same, correct, times, LEVELS)
        names: list[str | float] = ["accuracy", "auc", "eer", *LEVELS]
        for name in names:
            value = met[name if isinstance(name, str) else tar_name(name)][row]
            if not wanted:
                assert np.isnan(value)
            elif wanted[name] is not None:
                assert value == pytest.approx(wanted[name], abs=1e-12), name


def test_a_pair_counts_as_often_as_its_persons_were_drawn() -> None:
    # 0 and 1 occur often; 2 to 5 once each; pair 4 shares nobody, pair 5 is genuine and alone.
    identities = np.array([[0, 0], [0, 1], [0, 2], [1, 3], [4, 5], [6, 6], [1, 1]])
    units, count = resampling_units(identities)
    assert count == 4  # persons 0 and 1, pairs 4 and 5
    seen = set()
    for block in pair_weights(identities, replicates=200, seed=3, together=7):
        for weights in block:
            drawn = {0: int(weights[0]), 1: int(weights[6]), **dict.fromkeys(range(2, 7), 1)}
            own = {4: int(weights[4]), 5: int(weights[5])}
            wanted = [twin.pair_count(pair, identities, drawn, own) for pair in range(7)]
            assert weights.tolist() == wanted
            assert drawn[0] + drawn[1] + own[4] + own[5] == count
            seen.add(tuple(wanted))
    assert len(seen) > 10
    assert sorted(np.unique(units[units >= 0])) == [0, 1, 2, 3]


@pytest.mark.parametrize("together", [1, 5, 64])
def test_the_draws_depend_on_the_seed_alone(together: int) -> None:
    identities = draw(0)[3]
    whole = np.concatenate(list(pair_weights(identities, 20, seed=1)))
    assert np.array_equal(np.concatenate(list(pair_weights(identities, 20, 1, together))), whole)
    assert not np.array_equal(np.concatenate(list(pair_weights(identities, 20, seed=2))), whole)


def test_unknown_persons_give_the_ordinary_bootstrap_over_pairs() -> None:
    random = np.random.default_rng(0)
    correct = random.random(400) < 0.8
    is_same, scores = np.arange(400) % 2 == 0, random.normal(size=400)
    nobody = np.arange(800).reshape(400, 2)
    nobody[is_same, 1] = nobody[is_same, 0]
    found = bootstrap(scores, is_same, correct, nobody, [], replicates=2000)["accuracy"]
    share = correct.mean()
    assert found.mean() == pytest.approx(share, abs=0.003)
    assert found.std() == pytest.approx(np.sqrt(share * (1 - share) / 400), rel=0.08)
    low, high = interval(found)
    assert low < share < high
    assert high - low == pytest.approx(2 * 1.96 * found.std(), rel=0.08)


def test_persons_who_decide_all_of_their_pairs_widen_the_interval() -> None:
    """25 pairs a person that all come out alike tell as much as one: the deviation is five times that of pairs."""
    random = np.random.default_rng(0)
    person = np.repeat(np.arange(80), 25)
    correct = (random.random(80) < 0.7)[person]
    is_same = np.ones(2000, dtype=bool)
    is_same[:25] = False  # one person's impostor pairs, so that both kinds occur
    identities = np.stack([person, np.where(is_same, person, 1000 + np.arange(2000))], axis=1)
    scores = random.normal(size=2000)
    known = bootstrap(scores, is_same, correct, identities, [], replicates=1000)["accuracy"]
    nobody = np.stack([np.arange(2000), np.where(is_same, np.arange(2000), 5000 + np.arange(2000))], axis=1)
    alone = bootstrap(scores, is_same, correct, nobody, [], replicates=1000)["accuracy"]
    assert np.nanstd(known) / np.nanstd(alone) == pytest.approx(5, rel=0.15)


def test_models_share_their_draws() -> None:
    """Two models that differ in one pair differ little in every replicate, however much the replicates differ."""
    scores, is_same, correct, identities = draw(4, pairs=400, persons=60)
    other = correct.copy()
    other[7] ^= True
    one = bootstrap(scores, is_same, correct, identities, [0.1])
    two = bootstrap(scores, is_same, other, identities, [0.1])
    assert np.array_equal(one["auc"], two["auc"])
    assert 0 < np.std(one["accuracy"] - two["accuracy"]) < 0.3 * np.std(one["accuracy"])


def test_interval_passes_over_replicates_without_a_value() -> None:
    values = np.concatenate([np.arange(101.0), np.full(50, np.nan)])
    assert interval(values, 0.9) == pytest.approx((5, 95))
    assert np.isnan(interval(np.full(3, np.nan))).all()
