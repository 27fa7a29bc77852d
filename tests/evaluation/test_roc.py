"""The ROC against scikit-learn, and against loops over pairs and thresholds."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from sklearn.metrics import roc_curve as sklearn_roc_curve

from arcface_kd.errors import ConfigError
from arcface_kd.evaluation.roc import area_under_curve, equal_error_rate, roc_curve, tar_at_far
from tests.reference import ten_fold

few_scores = st.lists(st.integers(-4, 4).map(float), min_size=1, max_size=25).map(np.array)


@given(genuine=few_scores, impostor=few_scores)
@settings(max_examples=200, deadline=None)
def test_curve_and_area_with_ties(genuine: np.ndarray, impostor: np.ndarray) -> None:
    labels = np.repeat([1, 0], [len(genuine), len(impostor)])
    scores = np.concatenate([genuine, impostor])
    far, tar, _ = sklearn_roc_curve(labels, scores, drop_intermediate=False)
    met_far, met_tar = roc_curve(genuine, impostor)
    np.testing.assert_allclose(met_far, far, rtol=0, atol=1e-15)
    np.testing.assert_allclose(met_tar, tar, rtol=0, atol=1e-15)
    assert area_under_curve(genuine, impostor) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert area_under_curve(genuine, impostor) == ten_fold.area_under_curve(genuine, impostor)
    under_the_curve = np.sum(np.diff(met_far) * (met_tar[1:] + met_tar[:-1]) / 2)
    assert under_the_curve == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)


@given(genuine=few_scores, impostor=few_scores, far=st.sampled_from([1.0, 0.5, 0.3, 0.1, 0.05]))
@settings(max_examples=300, deadline=None)
def test_tar_at_far_is_the_best_allowed_threshold(genuine: np.ndarray, impostor: np.ndarray, far: float) -> None:
    met = tar_at_far(genuine, impostor, [far])[far]
    if len(impostor) < 1 / far:
        assert met is None
    else:
        assert met == ten_fold.tar_at_far(genuine, impostor, far)


def test_tar_at_far_counts_whole_false_acceptances() -> None:
    """A thousand impostors: FAR 1e-3 allows exactly one of them, 1e-4 none, although 1e-3 is not exact in binary."""
    genuine = np.array([999.5, 998.5, 997.5])
    impostor = np.arange(1000.0)
    assert tar_at_far(genuine, impostor, [1e-1, 2e-3, 1e-3, 1e-4]) == {1e-1: 1.0, 2e-3: 1.0, 1e-3: 2 / 3, 1e-4: None}


@pytest.mark.parametrize("level", [10.0**-k for k in range(1, 7)])
def test_a_level_is_measurable_from_its_inverse_number_of_impostors_on(level: float) -> None:
    impostors = np.zeros(round(1 / level))
    assert tar_at_far(np.ones(1), impostors, [level]) == {level: 1.0}
    assert tar_at_far(np.ones(1), impostors[1:], [level]) == {level: None}


@given(genuine=few_scores, impostor=few_scores)
@settings(max_examples=200, deadline=None)
def test_equal_error_rate_lies_between_the_points_around_it(genuine: np.ndarray, impostor: np.ndarray) -> None:
    far, tar = roc_curve(genuine, impostor)
    rate = equal_error_rate(genuine, impostor)
    assert rate <= np.maximum(far, 1 - tar).min() + 1e-12
    assert rate >= np.minimum(far, 1 - tar).max() - 1e-12
    # Swapping the roles of the two kinds and the sign of the scores swaps the two errors.
    assert equal_error_rate(-impostor, -genuine) == pytest.approx(rate, abs=1e-12)


@pytest.mark.parametrize(
    ("genuine", "impostor", "expected"),
    [
        ([1.0, 2.0], [0.0, -1.0], 0.0),
        ([0.0, -1.0], [1.0, 2.0], 1.0),
        ([1.0], [1.0], 0.5),
        ([3.0, 1.0], [2.0, 0.0], 0.5),
        ([4.0, 3.0, 2.0, 0.0], [1.0, 2.5, -1.0, -2.0], 0.25),
    ],
)
def test_equal_error_rate_by_hand(genuine: list[float], impostor: list[float], expected: float) -> None:
    assert equal_error_rate(np.array(genuine), np.array(impostor)) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("level", [0.0, -0.1, 1.5, float("nan")])
def test_levels_out_of_range(level: float) -> None:
    with pytest.raises(ConfigError, match="FAR level"):
        tar_at_far(np.ones(3), np.zeros(3), [level])
