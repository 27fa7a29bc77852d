"""The fingerprint of a data set: the same for the same images in the same order, and for nothing else."""

import shutil
from pathlib import Path

import cv2
import pytest

from arcface_kd.data.dataset import FolderDataset, RecordDataset, SyntheticDataset
from arcface_kd.data.fingerprint import fingerprint, shows_two_views
from arcface_kd.data.formats.record import RecordHeader, pack
from arcface_kd.errors import DataError
from tests.data.record_sets import encoded, insightface_records, pixels, plain_records, record, write_records


def of_records(folder: Path, records: list[tuple[int, bytes]]) -> str:
    return fingerprint(RecordDataset(write_records(folder, records)))


def test_a_copy_is_the_same(tmp_path: Path) -> None:
    first = of_records(tmp_path / "one", insightface_records([3, 2, 4]))
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    assert fingerprint(RecordDataset(tmp_path / "two")) == first
    assert len(first) == 64


def test_labels_do_not_count(tmp_path: Path) -> None:
    """Relabelled records keep their embeddings; so do records whose identities were counted otherwise."""
    first = of_records(tmp_path / "one", insightface_records([3, 2, 4]))
    assert of_records(tmp_path / "two", insightface_records([3, 6])) == first


def test_other_images_are_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("arcface_kd.data.fingerprint._SAMPLES", 4)
    records = insightface_records([6, 6])
    seen = {of_records(tmp_path / "one", records)}
    # Between two of the images whose bytes are looked at: its length tells.
    middle = [(key, body) if key != 2 else (key, record(2, 0.0, encoded(9999))) for key, body in records]
    assert len(middle[2][1]) != len(records[2][1])
    others = [middle, insightface_records([6, 7]), insightface_records([6, 5]), plain_records([0] * 12, first_key=1)]
    seen |= {of_records(tmp_path / str(number), other) for number, other in enumerate(others)}
    assert len(seen) == 5


def test_the_last_bit_of_an_image_that_is_looked_at_counts(tmp_path: Path) -> None:
    records = plain_records([0, 0, 1])
    first = of_records(tmp_path / "one", records)
    payload = bytearray(encoded(1))
    payload[-1] ^= 1
    records[1] = (1, record(1, 0.0, bytes(payload)))
    assert of_records(tmp_path / "two", records) != first


def test_the_order_counts(tmp_path: Path) -> None:
    records = plain_records([0] * 8)
    first = of_records(tmp_path / "one", records)
    assert of_records(tmp_path / "two", [records[1], records[0], *records[2:]]) != first
    folder = tmp_path / "one"
    lines = (folder / "train.idx").read_text().splitlines(keepends=True)
    (folder / "train.idx").write_text("".join(reversed(lines)))
    assert fingerprint(RecordDataset(folder)) != first


def test_keys_count(tmp_path: Path) -> None:
    same = [pack(RecordHeader(0, 0.0, 0, 0), encoded(i)) for i in range(4)]
    first = of_records(tmp_path / "one", list(enumerate(same)))
    assert of_records(tmp_path / "two", list(enumerate(same, start=5))) != first


def write_folder(root: Path, names: list[str]) -> Path:
    for seed, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(root / name), pixels(seed))
    return root


NAMES = ["anna/1.jpg", "anna/2.jpg", "bert/1.jpg", "bert/old/1.jpg"]


def test_folders(tmp_path: Path) -> None:
    first = fingerprint(FolderDataset(write_folder(tmp_path / "one", NAMES)))
    shutil.copytree(tmp_path / "one", tmp_path / "deep" / "er" / "two")
    assert fingerprint(FolderDataset(tmp_path / "deep" / "er" / "two")) == first
    others = {
        "renamed": ["anna/1.jpg", "anna/3.jpg", *NAMES[2:]],
        "moved": ["anna/1.jpg", "anna/2.jpg", "bert/1.jpg", "bert/new/1.jpg"],
        "one person": ["anna/1.jpg", "anna/2.jpg"],
        "another": ["carl/1.jpg", "carl/2.jpg"],
        "identity": ["anna/1.jpg", "anna/2.jpg", "carl/1.jpg", "carl/old/1.jpg"],
        "fewer": NAMES[:3],
    }
    seen = {fingerprint(FolderDataset(write_folder(tmp_path / name, names))) for name, names in others.items()}
    assert len(seen | {first}) == 1 + len(others)
    cv2.imwrite(str(tmp_path / "one" / NAMES[1]), pixels(77))
    assert fingerprint(FolderDataset(tmp_path / "one")) != first


def test_lengths_count_in_folders_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("arcface_kd.data.fingerprint._SAMPLES", 2)
    names = [f"anna/{i}.jpg" for i in range(5)]
    first = fingerprint(FolderDataset(write_folder(tmp_path / "one", names)))
    with open(tmp_path / "one" / names[2], "ab") as stream:
        stream.write(b"x")
    assert fingerprint(FolderDataset(tmp_path / "one")) != first
    dataset = FolderDataset(tmp_path / "one")
    (tmp_path / "one" / names[2]).unlink()
    with pytest.raises(DataError, match=r"cannot read .*2\.jpg"):
        fingerprint(dataset)


class _Augmented(RecordDataset):
    pass


def test_data_that_show_other_views_have_none(tmp_path: Path) -> None:
    folder = write_records(tmp_path / "one", plain_records([0, 1]))
    assert shows_two_views(RecordDataset(folder))
    for dataset in (_Augmented(folder), SyntheticDataset()):
        assert not shows_two_views(dataset)
        with pytest.raises(DataError, match="leave kd_cache unset"):
            fingerprint(dataset)
