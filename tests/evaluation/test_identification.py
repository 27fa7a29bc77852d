"""1:N search against loops over probes and entries, with ties, strangers and galleries of one."""

import numpy as np
import pytest

from arcface_kd.errors import ConfigError
from arcface_kd.evaluation import identification as module
from arcface_kd.evaluation.embedding import normalize
from arcface_kd.evaluation.identification import Search, identification, search
from tests.reference import ijb


def problem(seed: int, probes: int = 60, coarse: bool = False) -> tuple[dict[int, int], dict[int, int], np.ndarray]:
    """Persons by row for the gallery and the probes, about half of them strangers; rows of both."""
    random = np.random.default_rng(seed)
    entries = 12
    people = random.permutation(30)
    gallery = {row: int(people[row]) for row in range(entries)}
    searched = {entries + row: int(random.choice(people)) for row in range(probes)}
    centers = random.normal(size=(30, 6))
    rows = np.array([centers[person] for person in (gallery | searched).values()])
    rows = rows + random.normal(size=rows.shape)
    if coarse:
        # Many equal cosines.
        rows = np.sign(rows) * [1, 1, 0, 0, 0, 0]
    return gallery, searched, normalize(rows)


def run(gallery: dict[int, int], probes: dict[int, int], rows: np.ndarray) -> Search:
    return search(
        rows[list(probes)], np.array(list(probes.values())), rows[list(gallery)], np.array(list(gallery.values()))
    )


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_search_is_that_of_the_loops(seed: int, coarse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_COSINES_IN_MEMORY", 90)
    gallery, probes, rows = problem(seed, coarse=coarse)
    met = run(gallery, probes, rows)
    mated, strangers = ijb.searches(probes, gallery, dict(enumerate(rows.round(12))))
    assert 10 < len(mated) < 50
    if not coarse:
        assert met.mate_ranks.tolist() == [rank for rank, _ in mated]
    np.testing.assert_allclose(met.mate_scores, [score for _, score in mated], atol=1e-9)
    np.testing.assert_allclose(met.stranger_scores, strangers, atol=1e-9)
    assert met.mate_ranks.min() >= 1
    assert met.mate_ranks.max() <= len(gallery)


def test_ties_count_against_the_model() -> None:
    gallery = np.eye(3)[[0, 0, 1]]
    met = search(np.eye(3)[[0, 1, 2]], np.array([5, 7, 5]), gallery, np.array([5, 6, 7]))
    assert met.mate_ranks.tolist() == [2, 1, 3]


def test_the_best_entry_of_a_person_counts() -> None:
    """Persons 5 and 6 are enrolled twice, and nobody is asked for by -1."""
    gallery = normalize(np.array([[1.0, 0], [0, 1], [1, 1], [1, -1], [1, -0.1]]))
    met = search(np.array([[1.0, 0], [0, 1]]), np.array([6, 5]), gallery, np.array([5, 5, 6, 6, -1]))
    assert met.mate_ranks.tolist() == [3, 1]
    assert met.mate_scores.tolist() == pytest.approx([0.5**0.5, 1.0])


@pytest.mark.parametrize("seed", range(3))
def test_tpir_is_the_best_over_all_thresholds(seed: int) -> None:
    gallery, probes, rows = problem(seed, probes=80)
    met = run(gallery, probes, rows)
    mated = list(zip(met.mate_ranks.tolist(), met.mate_scores.tolist(), strict=True))
    for level, rate in met.tpir((1.0, 0.5, 0.2, 0.1)).items():
        assert rate == ijb.tpir(mated, met.stranger_scores.tolist(), level)


def test_tpir_needs_strangers_enough() -> None:
    met = Search(np.array([1, 1]), np.array([0.9, 0.8]), np.linspace(0, 0.5, 10))
    assert met.tpir() == {1e-1: 1.0, 1e-2: None, 1e-3: None}
    assert Search(np.array([1]), np.array([0.9]), np.empty(0)).tpir() == dict.fromkeys((1e-1, 1e-2, 1e-3))
    assert Search(np.empty(0, int), np.empty(0), np.zeros(20)).tpir((0.5,)) == {0.5: None}
    with pytest.raises(ConfigError, match="FAR level 2"):
        met.tpir((2,))


def test_sums_up_galleries() -> None:
    first = Search(np.array([1, 3, 12]), np.array([0.9, 0.2, 0.1]), np.array([0.5, 0.3]))
    other = Search(np.array([1]), np.array([0.4]), np.array([0.1, 0.45]))
    met = identification([first, other], levels=(0.5, 0.01))
    assert (met.mated, met.strangers) == (4, 4)
    assert met.rank == {1: 0.5, 5: 0.75, 10: 0.75}
    assert met.tpir == {0.5: pytest.approx((1 / 3 + 1) / 2), 0.01: None}
    assert identification([Search(np.empty(0, int), np.empty(0), np.zeros(3))]).rank == {1: None, 5: None, 10: None}
