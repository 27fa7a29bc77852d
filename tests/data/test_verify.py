"""A report on all images of a data set: counts, damage, sizes, labels and files that occur again."""

from pathlib import Path

import pytest

from arcface_kd.cli.main import main
from arcface_kd.data.verify import verify
from tests.data.record_sets import encoded, insightface_records, plain_records, record, write_records


def test_a_sound_set_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_records(tmp_path, insightface_records([3, 1, 2]))
    report = verify(tmp_path)
    assert (report.images, report.people, report.per_person, report.single) == (6, 3, (1, 2.0, 3), 1)
    assert report.sizes == {(112, 112): 6}
    assert (report.faults, report.repeated, report.empty, report.nobody) == ([], 0, [], 0)
    assert main(["data", "verify", str(tmp_path)]) == 0
    assert "num_classes=3 num_image=6" in capsys.readouterr().out


def test_every_fault_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = plain_records([0, 0, 2, 2, -1, 5, 5, 5])
    records[1] = (1, records[1][1][:-90])
    records[3] = (3, record(3, 2.0, encoded(3, ".jpg", 100, 112)))
    records[6] = (6, record(6, 5.5, encoded(6)))
    write_records(tmp_path, records)
    report = verify(tmp_path, num_classes=5)
    for fault, named in zip(report.faults, ("key 1", "100x112", "label is 5", "5.5", "label is 5"), strict=True):
        assert named in fault
        assert "train.rec" in fault
    assert report.sizes == {(112, 112): 5, (100, 112): 1}
    assert (report.people, report.empty, report.nobody) == (3, [1, 3, 4], 1)
    assert main(["data", "verify", str(tmp_path)]) == 2
    shown = capsys.readouterr()
    assert "100x112 1" in shown.out
    assert "3 of 8 images" in shown.err


def test_files_that_occur_again_are_counted_and_told_where_people_differ(tmp_path: Path) -> None:
    pictures = {0: 70, 1: 71, 2: 70, 3: 71, 4: 70, 5: 72}
    labels = {0: 0, 1: 1, 2: 0, 3: 2, 4: 2, 5: 2}
    write_records(tmp_path, [(key, record(key, labels[key], encoded(seed))) for key, seed in pictures.items()])
    report = verify(tmp_path)
    assert report.repeated == 3
    assert [[place.split("key ")[1][0] for place in pair] for pair in report.shared] == [["0", "4"], ["1", "3"]]
    assert "3, 2 of them under another label" in str(report)


def test_several_sets_are_looked_at_as_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_records(tmp_path / "one", insightface_records([2, 2]))
    for key in (1, 90):
        path = tmp_path / "two" / f"p{key}" / "1.jpg"
        path.parent.mkdir(parents=True)
        path.write_bytes(encoded(key))
    assert main(["data", "verify", str(tmp_path / "one"), str(tmp_path / "two")]) == 0
    shown = capsys.readouterr().out
    assert "num_classes=4 num_image=6" in shown
    assert "1 of them under another label" in shown
    assert f"{tmp_path}/two/p1/1.jpg" in shown


def test_a_fault_in_one_of_several_sets_is_reported(tmp_path: Path) -> None:
    write_records(tmp_path / "one", plain_records([0, 1]))
    write_records(tmp_path / "two", [*plain_records([0, 1]), (2, record(2, 0.5, encoded(2))), *plain_records([1], 3)])
    report = verify([tmp_path / "one", tmp_path / "two"])
    assert (report.images, report.people) == (6, 4)
    (fault,) = report.faults
    assert "0.5" in fault
    assert "two/train.rec" in fault


def test_long_lists_are_cut(tmp_path: Path) -> None:
    write_records(tmp_path, [(key, record(key, 40.0, b"no image")) for key in range(30)])
    text = str(verify(tmp_path))
    assert "and 10 more" in text
    assert "40 of 41: 0, 1," in text


def test_a_tree_without_labels_is_counted_as_a_run_reads_it(tmp_path: Path) -> None:
    for seed, place in enumerate(["1.jpg", "2019/2.jpg", "2020/x/3.jpg"]):
        path = tmp_path / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(seed))
    for report in (verify(tmp_path / "**"), verify(tmp_path, num_classes=0)):
        assert (report.images, report.people, report.nobody, report.faults) == (3, 0, 3, [])
        assert "num_classes=0 num_image=3" in str(report)
        assert "people" not in str(report)
