"""Records that cannot be read: named and an end to it, or passed over, counted and told, on every rank alike."""

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from arcface_kd.data import dataset as dataset_module
from arcface_kd.data.bad_records import BadRecord, SkippedRecords
from arcface_kd.data.dataset import RecordDataset, View, open_dataset
from arcface_kd.data.fingerprint import fingerprint
from arcface_kd.data.formats.image import decode_rgb
from arcface_kd.data.loader import FaceLoader, get_dataloader
from arcface_kd.data.record_labels import RecordLabels
from arcface_kd.data.sampler import ViewSampler
from arcface_kd.errors import BadRecordError, DataError
from tests.data.batches import epoch_of
from tests.data.record_damage import no_image, no_magic, no_number, offset_of, too_many_labels
from tests.data.record_sets import encoded, insightface_records, one_line, plain_records, record, write_records

COUNTS = [3, 4, 2, 4]
IMAGES = sum(COUNTS)


DAMAGES = [
    (no_magic, r"no record starts at byte \d+"),
    (no_image, "no image that can be read"),
    (no_number, "its label is nan, which is no whole number"),
    (too_many_labels, "too short for the 1073741824 labels"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_records(tmp_path / "faces", insightface_records(COUNTS))


def opened(folder: Path) -> RecordDataset:
    faces = open_dataset(folder, on_bad_record="skip")
    assert isinstance(faces, RecordDataset)
    return faces


# The data set -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("damage", "reason"), DAMAGES)
def test_by_default_a_bad_record_ends_the_run_and_is_named(
    folder: Path, damage: Callable[[Path, int], None], reason: str
) -> None:
    faces = open_dataset(folder)
    damage(folder, 5)
    with pytest.raises(BadRecordError, match=reason) as caught:
        faces[4]
    place = f"{folder / 'train.rec'}: record with key 5 at byte {offset_of(folder, 5)}: "
    assert one_line(caught.value).startswith(place)


@pytest.mark.parametrize(("damage", "reason"), DAMAGES)
def test_skipped_it_gives_its_place_to_the_next_good_one(
    folder: Path, damage: Callable[[Path, int], None], reason: str
) -> None:
    damage(folder, 5)
    faces = opened(folder)
    assert len(faces) == IMAGES
    lost = {3, 4} if damage is no_magic else {4}
    for index in range(IMAGES):
        bad: list[BadRecord] = []
        shown, label, pixels = faces.shown(View(index, True), bad)
        expected = 5 if index in lost else index
        assert shown == View(expected, True)
        assert label == faces.label(expected) >= 0
        np.testing.assert_array_equal(pixels, decode_rgb(encoded(expected + 1))[:, ::-1])
        assert [each.index for each in bad] == list(range(index, expected))
        assert all(f"key {each.index + 1} at byte " in each.message for each in bad)
    sample = faces[4]
    assert (sample.index, sample.label, sample.flipped) == (5, 1, False)


def test_the_last_image_gives_its_place_to_the_first(folder: Path) -> None:
    no_image(folder, IMAGES)
    assert opened(folder).shown(View(IMAGES - 1, False), [])[0] == View(0, False)


@pytest.mark.parametrize("key", range(1, IMAGES + len(COUNTS)))
def test_wherever_the_damage_is_the_images_stay_the_same_ones(folder: Path, key: int) -> None:
    # The number of a record's labels, so that nothing tells an image from an identity.
    too_many_labels(folder, key)
    faces = opened(folder)
    assert faces.keys.tolist() == list(range(1, IMAGES + 1))
    whole, labels = np.repeat(np.arange(len(COUNTS)), COUNTS), faces.labels()
    good = np.arange(IMAGES) != key - 1
    assert labels[good].tolist() == whole[good].tolist()
    if key <= IMAGES:
        # Inside an identity's range its label is known all the same.
        assert labels[key - 1] in (whole[key - 1], -1)
        assert faces.label(key - 1) == -1
        with pytest.raises(BadRecordError, match=f"key {key} "):
            RecordDataset(folder, num_classes=len(COUNTS))


def test_a_wrong_label_is_not_a_bad_record(tmp_path: Path) -> None:
    folder = write_records(tmp_path / "faces", plain_records([0, 1, 7, 1]))
    faces = opened(folder)
    faces._records = RecordLabels(faces.reader, 2)
    with pytest.raises(DataError, match="its label is 7") as caught:
        faces[2]
    assert not isinstance(caught.value, BadRecordError)


def test_too_many_in_a_row_are_no_accident(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_module, "MOST_BAD_IN_A_ROW", 3)
    for key in (4, 5, 6):
        no_image(folder, key)
    faces = opened(folder)
    assert faces[4].index == 6
    with pytest.raises(BadRecordError, match=r"key 4 at byte \d+: .*; nor can the 2 images after it be read: mend"):
        faces[3]


def test_nothing_but_bad_records_comes_to_an_end(tmp_path: Path) -> None:
    folder = write_records(tmp_path / "faces", [(key, record(key, 0.0, b"no image")) for key in range(3)])
    with pytest.raises(BadRecordError, match="nor can the 2 images after it"):
        opened(folder)[1]


def test_folders(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(2):
            (tmp_path / name / f"{number}.jpg").write_bytes(encoded(number))
    faces = open_dataset(tmp_path)
    skipping = open_dataset(tmp_path, on_bad_record="skip")
    (tmp_path / "a" / "1.jpg").write_bytes(encoded(1)[:300])
    (tmp_path / "b" / "0.jpg").unlink()
    with pytest.raises(BadRecordError, match=r"a/1\.jpg: OpenCV cannot decode"):
        faces[1]
    with pytest.raises(BadRecordError, match=r"cannot read .*b/0\.jpg: No such file"):
        faces[2]
    assert skipping[1].index == 3


def test_a_set_with_a_bad_record_has_a_fingerprint(folder: Path) -> None:
    whole = fingerprint(open_dataset(folder))
    stopping = open_dataset(folder)
    too_many_labels(folder, 5)
    with pytest.raises(BadRecordError, match="key 5 "):
        fingerprint(stopping)
    assert fingerprint(opened(folder)) == fingerprint(opened(folder)) != whole


# The loader ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_keep_their_shape_and_say_what_they_show(
    folder: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    no_image(folder, 5)
    no_image(folder, 11)
    faces = opened(folder)
    loader = FaceLoader(faces, batch_size=4, sampler=ViewSampler(IMAGES, seed=3), num_workers=workers, drop_last=False)
    asked = list(loader.sampler)
    expected = [View({4: 5, 10: 11}.get(view.index, view.index), view.flipped) for view in asked]
    for repetition in range(2):
        batches = epoch_of(loader)
        assert [images.shape[0] for images, *_ in batches] == [4, 4, 4, 1]
        shown = [
            View(*view)
            for *_, views in batches
            for view in zip(views.index.tolist(), views.flipped.tolist(), strict=True)
        ]
        assert shown == expected
        labels = torch.cat([labels for _, labels, _ in batches])
        assert labels.tolist() == [faces.label(view.index) for view in expected]
        for image, view in zip(torch.cat([images for images, *_ in batches]), expected, strict=True):
            pixels = torch.from_numpy(faces.pixels(view)[1].copy()).permute(2, 0, 1)
            assert torch.equal(((image + 1) * 127.5).round().to(torch.uint8), pixels)
        told = [entry.getMessage() for entry in caplog.records if "skipped: " in entry.getMessage()]
        # Each is told once, with its key and its place, and counted in every epoch.
        assert sorted(told) == sorted(
            f"skipped: {message}" for message in (_fault_of(folder, 5), _fault_of(folder, 11))
        )
        totals = [entry.getMessage() for entry in caplog.records if "in this epoch" in entry.getMessage()]
        assert len(totals) == repetition + 1
        assert totals[-1].startswith("2 bad records were skipped in this epoch")
    assert sorted(loader.skipped.found) == [4, 10]


def _fault_of(folder: Path, key: int) -> str:
    with pytest.raises(BadRecordError) as caught:
        open_dataset(folder)[key - 1]
    return str(caught.value)


def test_an_epoch_that_is_left_early_is_not_counted(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    no_image(folder, 1)
    loader = FaceLoader(opened(folder), batch_size=2, num_workers=0)
    next(iter(loader))
    assert "key 1 " in caplog.text
    assert "in this epoch" not in caplog.text


def test_a_good_set_says_nothing(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        epoch_of(FaceLoader(opened(folder), batch_size=4, num_workers=0))
    assert not caplog.records


def test_the_drop_in_takes_the_choice(folder: Path) -> None:
    no_image(folder, 2)
    with pytest.raises(BadRecordError, match="key 2 "):
        epoch_of(get_dataloader(str(folder), 0, 4, num_workers=0))
    loader = get_dataloader(str(folder), 0, 4, num_workers=0, on_bad_record="skip")
    assert len(epoch_of(loader)) == IMAGES // 4
    assert loader.skipped.found.keys() <= {1}


def test_counting_starts_anew_each_epoch() -> None:
    skipped = SkippedRecords()
    skipped.note([BadRecord(3, "x"), BadRecord(3, "x"), BadRecord(5, "y")])
    assert skipped.end_epoch() == 2
    assert skipped.end_epoch() == 0
    assert skipped.found == {3: "x", 5: "y"}
