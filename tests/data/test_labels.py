"""All labels at once are those of the records one by one."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from arcface_kd.data.dataset import FolderDataset, RecordDataset
from tests.data.record_sets import insightface_records, pixels, plain_records, record, write_records


def one_by_one(dataset: RecordDataset | FolderDataset) -> list[int]:
    return [dataset.label(index) for index in range(len(dataset))]


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    seen: list[int] = []
    label = RecordDataset.label

    def counted(self: RecordDataset, index: int) -> int:
        seen.append(index)
        return label(self, index)

    monkeypatch.setattr(RecordDataset, "label", counted)
    return seen


def test_identity_records_spare_reading_every_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = RecordDataset(write_records(tmp_path / "one", insightface_records([5, 1, 9, 3])))
    wanted = one_by_one(dataset)
    seen = count_reads(monkeypatch)
    assert dataset.labels().tolist() == wanted == [0] * 5 + [1] + [2] * 9 + [3] * 3
    assert dataset.labels().dtype == np.int64
    assert len(seen) == 2 * 2 * 4


def test_an_index_in_another_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = insightface_records([5, 1, 9, 3])
    shuffled = [records[place] for place in np.random.default_rng(0).permutation(len(records))]
    dataset = RecordDataset(write_records(tmp_path / "one", shuffled))
    wanted = one_by_one(dataset)
    seen = count_reads(monkeypatch)
    assert dataset.labels().tolist() == wanted
    assert len(set(wanted)) == 4
    assert len(seen) == 8


def test_an_identity_without_images_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = RecordDataset(write_records(tmp_path / "one", insightface_records([2, 0, 3])))
    wanted = one_by_one(dataset)
    assert dataset.labels().tolist() == wanted == [0, 0, 2, 2, 2]


@pytest.mark.parametrize(
    "damage",
    [
        lambda records: [*records[:3], (3, record(3, 7.0, records[3][1][24:])), *records[4:]],
        lambda records: [*records[:-1], (records[-1][0], record(records[-1][0], [6.0, 9.0], b""))],
        lambda records: [*records[:-1], (records[-1][0], record(records[-1][0], [5.0, float("nan")], b""))],
        lambda records: [*records[:-1], (records[-1][0], record(records[-1][0], [5.0, 6.0], b""))],
        lambda records: [*records[:-1], (records[-1][0], record(records[-1][0], [5.0, 8.0, 1.0], b""))],
        lambda records: records[:-1],
        lambda records: [*records[:-2], records[-1], (records[-2][0], records[-2][1])],
    ],
    ids=["two-labels", "overlap", "nan", "gap", "three-numbers", "missing", "order"],
)
def test_identity_records_that_do_not_work_out_are_not_trusted(tmp_path: Path, damage: object) -> None:
    assert callable(damage)
    dataset = RecordDataset(write_records(tmp_path / "one", damage(insightface_records([3, 1, 3]))))
    assert dataset.labels().tolist() == one_by_one(dataset)


def test_records_without_identities(tmp_path: Path) -> None:
    dataset = RecordDataset(write_records(tmp_path / "one", plain_records([4, -1, 2, 2])))
    assert dataset.labels().tolist() == [4, -1, 2, 2]


def test_folders(tmp_path: Path) -> None:
    for seed, name in enumerate(["anna/1.jpg", "anna/2.jpg", "bert/1.jpg"]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        cv2.imwrite(str(tmp_path / name), pixels(seed))
    dataset = FolderDataset(tmp_path)
    assert dataset.labels().tolist() == one_by_one(dataset) == [0, 0, 1]
