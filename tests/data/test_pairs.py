"""Verification pairs: balanced, no pair twice, folds of other people each; read by our reader and by the host's."""

from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from arcface_kd.cli.main import main
from arcface_kd.data.formats.pair_identities import pair_identities
from arcface_kd.data.formats.verification_bin import decode, read_bin
from arcface_kd.data.pairs import _ring, choose_pairs, write_pairs
from arcface_kd.errors import ArcfaceKDError, BadRecordError, ConfigError, DataError
from tests.data.record_sets import encoded, insightface_records, write_records


def labels_of(sizes: list[int]) -> NDArray[np.int64]:
    return np.repeat(np.arange(len(sizes)), sizes)


def test_a_ring_has_every_two_items_once() -> None:
    for count in range(8):
        found = [frozenset(pair) for pair in _ring(range(count))]
        assert Counter(found) == Counter(map(frozenset, combinations(range(count), 2)))


@pytest.mark.parametrize(
    ("sizes", "most", "pairs"),
    [
        ([2] * 20, 10_000, 40),  # two pairs of one person a fold
        ([2] * 10 + [1] * 10, 10_000, 20),
        ([5] * 40, 6000, 800),
        ([300, 40, *[3] * 60], 400, 360),
        ([300, 40, *[3] * 60], 359, 340),
    ],
)
def test_each_fold_has_both_kinds_and_its_own_people(sizes: list[int], most: int, pairs: int) -> None:
    labels = labels_of(sizes)
    chosen, same = choose_pairs(labels, most, seed=3)
    assert len(chosen) == len(same) == pairs
    np.testing.assert_array_equal(labels[chosen[:, 0]] == labels[chosen[:, 1]], same)
    assert len({frozenset(pair) for pair in chosen.tolist()}) == pairs
    assert (chosen[:, 0] != chosen[:, 1]).all()
    met: set[int] = set()
    for fold, truths in zip(np.split(chosen, 10), np.split(same, 10), strict=True):
        assert truths.mean() == 0.5
        people = set(labels[fold].ravel().tolist())
        assert not people & met
        met |= people


def test_people_take_turns() -> None:
    """One with 300 images is in no more pairs of one person than the others of the fold."""
    labels = labels_of([300, *[3] * 59])
    chosen, same = choose_pairs(labels, 200, seed=0)
    per_person = Counter(labels[chosen[same][:, 0]].tolist())
    assert per_person[0] <= 2
    assert len(per_person) == 60


def test_the_seed_decides_and_nobody_is_left_out() -> None:
    labels = np.where(np.arange(100) % 5 == 4, -1, np.arange(100) // 4)
    one, again, other = (choose_pairs(labels, 60, seed)[0] for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)
    assert (labels[one] >= 0).all()


@pytest.mark.parametrize(
    ("sizes", "most", "kind"),
    [([2] * 19, 100, DataError), ([2] * 9 + [1] * 20, 100, DataError), ([2] * 20, 19, ConfigError)],
)
def test_too_few_are_refused(sizes: list[int], most: int, kind: type[ArcfaceKDError]) -> None:
    with pytest.raises(kind, match="20"):
        choose_pairs(labels_of(sizes), most)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for person in range(20):
        (tmp_path / "people" / f"p{person:02}").mkdir(parents=True)
        for shot, suffix in enumerate((".jpg", ".webp")):
            size = 112 if person else 60
            path = tmp_path / "people" / f"p{person:02}" / f"{shot}{suffix}"
            path.write_bytes(encoded(2 * person + shot, suffix, size, size))
    return tmp_path / "people"


def test_the_file_is_read_and_names_its_people(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "pairs", str(folder), str(tmp_path / "own.bin"), "--seed", "4"]) == 0
    assert "40 pairs of 20 people" in capsys.readouterr().out
    verification_set = read_bin(tmp_path / "own.bin")
    assert verification_set.is_same.tolist() == [True, False] * 20
    assert decode(verification_set).shape == (80, 3, 112, 112)
    # What mxnet cannot read would stop the host.
    assert {image[:2] for image in verification_set.images} == {b"\xff\xd8", b"\x89P"}
    people = pair_identities(tmp_path / "own.bin", verification_set)
    assert people.source == "stated"
    np.testing.assert_array_equal(people.numbers[:, 0] == people.numbers[:, 1], verification_set.is_same)


def test_a_bad_image_leaves_no_file(folder: Path, tmp_path: Path) -> None:
    (folder / "p03" / "0.jpg").write_bytes(b"\xff\xd8none")
    with pytest.raises(BadRecordError, match=r"p03/0\.jpg"):
        write_pairs(folder, tmp_path / "own.bin")
    assert not (tmp_path / "own.bin").exists()


@pytest.mark.parametrize(("name", "told"), [("own.bin", "exists"), ("own", "ends in .bin")])
def test_no_file_is_overwritten_and_eval_finds_it(folder: Path, tmp_path: Path, name: str, told: str) -> None:
    (tmp_path / "own.bin").write_bytes(b"mine")
    with pytest.raises(ArcfaceKDError, match=told):
        write_pairs(folder, tmp_path / name)
    assert (tmp_path / "own.bin").read_bytes() == b"mine"


def test_records_serve_as_well(tmp_path: Path) -> None:
    records = write_records(tmp_path / "records", insightface_records([2] * 20))
    assert write_pairs(records, tmp_path / "own.bin", pairs=20).pairs == 20
