"""Several data sets as one: which image is where, which number each person has, what caches and runs know of it."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from arcface_kd.config.arcface_torch import load_config
from arcface_kd.data.dataset import FaceDataset, SyntheticDataset, View, open_dataset
from arcface_kd.data.fingerprint import fingerprint, outline, shows_two_views
from arcface_kd.data.joined import JoinedDataset, open_rec
from arcface_kd.data.loader import get_dataloader
from arcface_kd.errors import ArcfaceKDError, ConfigError, DataError
from tests.data.record_sets import insightface_records, pixels, plain_records, write_records


@pytest.fixture
def sets(tmp_path: Path) -> list[str]:
    """Three people in records; two in plain records, with faces of nobody between; two in folders."""
    write_records(tmp_path / "first", insightface_records([2, 1, 2]))
    write_records(tmp_path / "second", plain_records([1, -1, 0, -1], first_key=40))
    for seed, place in enumerate(["anna/1.png", "bert/1.png", "bert/2.png"], start=80):
        path = tmp_path / "third" / place
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), pixels(seed))
    return [str(tmp_path / name) for name in ("first", "second", "third")]


def table(folder: Path, *rows: str, header: str = "set,label,identity") -> str:
    path = folder / "people.csv"
    path.write_text("\n".join([header, *rows]) + "\n")
    return str(path)


def test_labels_follow_each_other_and_nobody_stays_nobody(sets: list[str]) -> None:
    joined = open_rec(sets, 7)
    assert joined.labels().tolist() == [0, 0, 1, 2, 2, 4, -1, 3, -1, 5, 6, 6]
    assert [joined.label(index) for index in range(len(joined))] == joined.labels().tolist()
    assert joined.found_classes == 7


def test_images_are_those_of_the_sets(sets: list[str]) -> None:
    joined = open_rec(sets)
    alone = [(faces, index) for faces in map(open_dataset, sets) for index in range(len(faces))]
    assert len(joined) == len(alone) == 12
    for index, (faces, own) in enumerate(alone):
        assert joined.where(index) == faces.where(own)
        assert joined.image_bytes(index) == faces.image_bytes(own)
        np.testing.assert_array_equal(joined.pixels(View(index, True))[1], faces.pixels(View(own, True))[1])
        assert joined[index].label == joined.label(index)
    with pytest.raises(IndexError):
        joined.label(12)


def naive_labels(sets: list[FaceDataset], same: dict[tuple[int, int], str]) -> list[int]:
    """Go through all people one by one and ask whether this one was there before."""
    numbers: dict[object, int] = {}
    people = [(place, label) for place, faces in enumerate(sets) for label in range(faces.found_classes)]
    for person in people:
        numbers.setdefault(same.get(person, person), len(numbers))
    labels = [(place, int(label)) for place, faces in enumerate(sets) for label in faces.labels()]
    return [numbers[same.get(person, person)] if person[1] >= 0 else -1 for person in labels]


@pytest.mark.parametrize(
    "rows",
    [
        ["0,2,x", "1,0,x"],
        ["0,1,x", "2,bert,x", "1,1,y", "2,anna,y"],
        ["1,0,x", "1,1,x", "0,0,lone"],
        ['0,0,"Doe, Jane"', '2,bert,"Doe, Jane"', '1,1,"Doe, Jane"', "0,2,z", "1,0,z"],
    ],
)
def test_people_of_one_identity_share_a_number(sets: list[str], tmp_path: Path, rows: list[str]) -> None:
    joined = open_rec(sets, identities=table(tmp_path, *rows))
    assert isinstance(joined, JoinedDataset)
    split = [row.replace("anna", "0").replace("bert", "1").split(",", 2) for row in rows]
    same = {(int(place), int(label)): identity for place, label, identity in split}
    assert joined.labels().tolist() == naive_labels(joined.sets, same)
    assert set(joined.labels()) - {-1} == set(range(joined.found_classes))
    assert joined.found_classes < 7


def test_a_table_merges_people_of_one_set(sets: list[str], tmp_path: Path) -> None:
    for rows in (["0,0,x", "0,2,x"], ["0, 0, x", "", "0, 2,x", ""]):
        joined = open_rec(sets[0], identities=table(tmp_path, *rows))
        assert joined.labels().tolist() == [0, 0, 1, 0, 0]


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        (["3,0,x"], "line 2"),
        (["0,0,x", "0,3,x"], "line 3"),
        (["2,carl,x"], "carl"),
        (["0,-1,x"], "-1"),
        (["0,0,x", "0,0,y"], "label 0 of set 0"),
        (["0,0"], "line 2"),
        (["0,0,"], "line 2"),
        (["\x00"], "people.csv"),
    ],
)
def test_a_wrong_table_is_refused(sets: list[str], tmp_path: Path, rows: list[str], named: str) -> None:
    with pytest.raises(DataError, match=named):
        open_rec(sets, identities=table(tmp_path, *rows))


def test_a_table_that_is_none_is_refused(sets: list[str], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="set,label,identity"):
        open_rec(sets, identities=table(tmp_path, header="0,0,x"))
    (tmp_path / "people.csv").write_bytes(b"set,label,identity\n0,0,\xff\n")
    for path in (tmp_path / "people.csv", tmp_path / "none.csv", tmp_path):
        with pytest.raises(DataError, match=str(path)):
            open_rec(sets, identities=path)


@pytest.mark.parametrize(
    ("chosen", "classes", "named", "kind"),
    [([0, 1], 4, "num_classes=5", DataError), ([], None, "rec", ConfigError), ([0, 1, 0], None, "first", ConfigError)],
)
def test_sets_that_cannot_be_joined_are_refused(
    sets: list[str], chosen: list[int], classes: int | None, named: str, kind: type[ArcfaceKDError]
) -> None:
    with pytest.raises(kind, match=named):
        open_rec([sets[place] for place in chosen], classes)


def test_a_set_is_named_once_however_it_is_written(sets: list[str]) -> None:
    with pytest.raises(ConfigError, match="second"):
        open_rec([sets[1], f"{sets[1]}/"])


def test_a_bad_record_is_named_and_skipped_across_the_border(sets: list[str], tmp_path: Path) -> None:
    records = insightface_records([1, 2])
    records[3] = (3, records[3][1][:40])
    bad = str(write_records(tmp_path / "bad", [*records[:4]]))
    with pytest.raises(DataError, match=r"bad/train\.rec"):
        open_rec([sets[2], bad])[5]
    skipping = open_rec([sets[2], bad, sets[0]], on_bad_record="skip")
    assert skipping[5].index == 6


def test_fingerprints_know_sets_and_order_and_not_who_is_who(sets: list[str], tmp_path: Path) -> None:
    people = table(tmp_path, "0,0,x", "1,0,x")
    joined, merged, turned = open_rec(sets), open_rec(sets, identities=people), open_rec(sets[::-1])
    assert fingerprint(joined) == fingerprint(merged)
    assert len({fingerprint(joined), fingerprint(turned), fingerprint(open_rec(sets[:2]))}) == 3
    # A run that goes on with other labels would be another run.
    assert len({outline(joined), outline(merged), outline(turned)}) == 3
    assert outline(joined) == outline(open_rec(sets))
    assert shows_two_views(joined)
    assert not shows_two_views(JoinedDataset([joined, SyntheticDataset()]))


def test_a_loader_shows_all_sets(sets: list[str], tmp_path: Path) -> None:
    loader = get_dataloader(sets, 0, 4, num_workers=0, num_classes=6, identities=table(tmp_path, "0,0,x", "2,anna,x"))
    labels = [int(label) for _, batch in loader for label in batch]
    assert sorted(labels) == [-1, -1, 0, 0, 0, 1, 2, 2, 3, 4, 5, 5]


def test_rec_may_be_a_list_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("config = dict(rec='one')\n")
    several = load_config(str(tmp_path / "own.py"), {"rec": "[a, b]", "rec_identities": "people.csv"})
    assert several.rec == ["a", "b"]
    assert several.rec_identities == "people.csv"
    assert load_config(str(tmp_path / "own.py"), {"rec": "a, b"}).rec == "a, b"


def test_labels_without_order_and_with_gaps_stay(tmp_path: Path) -> None:
    labels = np.random.default_rng(0).permutation(60)[:20].tolist()
    write_records(tmp_path / "one", plain_records(labels))
    write_records(tmp_path / "two", plain_records([0, 1]))
    joined = open_rec([tmp_path / "one", tmp_path / "two"])
    classes = max(labels) + 1
    assert joined.labels().tolist() == [*labels, classes, classes + 1]
