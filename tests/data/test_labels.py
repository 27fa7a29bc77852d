"""All labels, read in one pass, are those of the records one by one; wrong ones are told when the set is opened."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arcface_kd.data.dataset import RecordDataset
from arcface_kd.data.formats import record_scan
from arcface_kd.data.subset import write_subset
from arcface_kd.errors import BadRecordError, DataError
from tests.data.record_damage import no_image, no_magic, no_number, offset_of, too_many_labels
from tests.data.record_sets import MAGIC, encoded, insightface_records, plain_records, record, write_records


def one_by_one(dataset: RecordDataset) -> list[int]:
    return [dataset.label(index) for index in range(len(dataset))]


def labelled(folder: Path, labels: list[float], payload: bytes = b"no image") -> Path:
    """Records in the plain layout with any labels."""
    return write_records(folder, [(key, record(key, label, payload)) for key, label in enumerate(labels)])


@pytest.fixture(params=[1, 3, 1 << 17])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Records that are looked at in one go."""
    monkeypatch.setattr(record_scan, "_CHUNK", request.param)
    return int(request.param)


@pytest.mark.usefixtures("chunk")
def test_both_layouts_in_any_order(tmp_path: Path) -> None:
    records = insightface_records([5, 1, 0, 9, 3])
    shuffled = [records[place] for place in np.random.default_rng(0).permutation(len(records))]
    for number, stored in enumerate((records, shuffled)):
        dataset = RecordDataset(write_records(tmp_path / str(number), stored), num_classes=5)
        assert dataset.labels().tolist() == one_by_one(dataset) == [0] * 5 + [1] + [3] * 9 + [4] * 3
        assert dataset.labels().dtype == np.int64
    dataset = RecordDataset(write_records(tmp_path / "plain", plain_records([4, -1, 2, 2])), num_classes=5)
    assert dataset.labels().tolist() == [4, -1, 2, 2]


@pytest.mark.usefixtures("chunk")
def test_vectors_and_records_of_several_parts(tmp_path: Path) -> None:
    records = [
        (0, record(0, [3.0, 0.5], encoded(0))),
        (1, record(1, 2.0, b"abcd" + MAGIC + b"efgh" + MAGIC)),
        (2, record(2, [1.0, 7.0, 9.0], MAGIC + b"x")),
        (3, record(3, -1.0, encoded(3))),
        (4, record(4, float(2**24 - 1), b"x")),
    ]
    dataset = RecordDataset(write_records(tmp_path, records), num_classes=1 << 24)
    assert dataset.labels().tolist() == one_by_one(dataset) == [3, 2, 1, -1, 2**24 - 1]


def test_an_index_that_leaves_records_out(tmp_path: Path) -> None:
    folder = labelled(tmp_path, [4.0, 3.0, 2.0, 1.0, 0.0])
    lines = (folder / "train.idx").read_text().splitlines(keepends=True)
    (folder / "train.idx").write_text("".join(lines[place] for place in (4, 0, 2)))
    assert RecordDataset(folder, num_classes=5).labels().tolist() == [0, 4, 2]


def test_nobody_inside_an_identity_stays_nobody(tmp_path: Path) -> None:
    records = insightface_records([4, 4])
    records[2] = (2, record(2, -1.0, encoded(2)))
    folder = write_records(tmp_path / "all", records)
    assert RecordDataset(folder, num_classes=2).labels().tolist() == [0, -1, 0, 0, 1, 1, 1, 1]
    write_subset(folder, tmp_path / "few", images_per_identity=4)
    few = RecordDataset(tmp_path / "few")
    assert few.labels().tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert encoded(2) not in [few.image_bytes(index) for index in range(len(few))]


@pytest.mark.usefixtures("chunk")
def test_too_large_labels_are_told_at_the_start_with_the_largest(tmp_path: Path) -> None:
    folder = labelled(tmp_path, [0.0, 1.0, 2.0, 1.0, 8.0, 0.0, 3.0])
    assert len(RecordDataset(folder)) == 7
    with pytest.raises(DataError, match=r"key 2 at byte .* label is 2, .* 2 more .* num_classes to 9 ") as caught:
        RecordDataset(folder, num_classes=2, on_bad_record="skip")
    assert not isinstance(caught.value, BadRecordError)


@pytest.mark.parametrize("label", [0.5, -0.5, -2.0, float("nan"), float("inf"), float("-inf")])
def test_labels_that_are_none_are_told_at_the_start_or_skipped(tmp_path: Path, label: float) -> None:
    folder = labelled(tmp_path, [0.0, 1.0, label, 1.0])
    with pytest.raises(BadRecordError, match="key 2 at byte"):
        RecordDataset(folder, num_classes=2)
    assert RecordDataset(folder, num_classes=2, on_bad_record="skip").labels().tolist() == [0, 1, -1, 1]


@pytest.mark.parametrize("label", [2.0**24, 1e30])
def test_labels_beyond_float32_are_told(tmp_path: Path, label: float) -> None:
    folder = labelled(tmp_path, [0.0, 1.0, label, 1.0])
    for num_classes in (2, 2**30):
        with pytest.raises(DataError, match="key 2 at byte"):
            RecordDataset(folder, num_classes=num_classes, on_bad_record="skip")
    with pytest.raises(DataError, match="key 2 at byte"):
        RecordDataset(folder).labels()


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("damage", [no_magic, no_image, no_number, too_many_labels])
def test_damaged_records_are_nobody_where_they_are_skipped(tmp_path: Path, damage: Callable[[Path, int], None]) -> None:
    folder = write_records(tmp_path, insightface_records([3, 1, 3]))
    damage(folder, 5)
    dataset = RecordDataset(folder, num_classes=3, on_bad_record="skip")
    assert dataset.labels().tolist() == one_by_one(dataset)
    if damage is not no_image:
        assert -1 in dataset.labels()
        with pytest.raises(BadRecordError, match=r"key [45] "):
            RecordDataset(folder, num_classes=3)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_damage_is_read_alike(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp() / "labels"
    records = [(key, record(key, float(key % 3), b"image" * key)) for key in range(1, 6)]
    header = record(0, [6.0, 8.0], b"")
    identities = [(6, record(6, [1.0, 3.0], b"")), (7, record(7, [3.0, 6.0], b""))]
    write_records(folder, [(0, header), *records, *identities])
    content = bytearray((folder / "train.rec").read_bytes())
    begin = offset_of(folder, 1)
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(begin, len(content) - 1))] = data.draw(st.integers(0, 255))
    (folder / "train.rec").write_bytes(content)
    try:
        dataset = RecordDataset(folder, on_bad_record="skip")
        expected = one_by_one(dataset)
    except DataError:
        return
    assert dataset.labels().tolist() == expected


def joined(folder: Path, first: list[int], second: list[int], first_label: int) -> Path:
    """Two InsightFace sets behind each other, under keys that run on."""
    records = [content for _, content in insightface_records(first)]
    for _, content in insightface_records(second):
        image = content[:4] == bytes(4)
        label = np.frombuffer(content, "<f4", 1, 4)[0] + first_label
        records.append(content[:4] + np.float32(label).tobytes() + content[8:] if image else content)
    return write_records(folder, list(enumerate(records)))


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("sizes", [([4, 4], [4, 4]), ([1], [5, 2]), ([5, 3], [1]), ([1], [1])])
def test_sets_behind_each_other_are_read_whole(
    tmp_path: Path, sizes: tuple[list[int], list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    first, second = sizes
    folder = joined(tmp_path, first, second, len(first))
    dataset = RecordDataset(folder, num_classes=len(first + second))
    expected = np.repeat(np.arange(len(first + second)), first + second).tolist()
    assert dataset.labels().tolist() == one_by_one(dataset) == expected
    assert len(caplog.records) == 1
    assert str(folder) in caplog.text
    order = np.random.default_rng(1).permutation(len(dataset.reader))
    with open(folder / "train.idx", "r+") as stream:
        lines = stream.readlines()
        stream.seek(0)
        stream.writelines(lines[place] for place in order)
    assert RecordDataset(folder).labels().tolist() == expected


def test_faces_of_nobody_may_be_in_several_sets(tmp_path: Path) -> None:
    records = [*insightface_records([2]), *plain_records([1]), *insightface_records([2])]
    contents = [content for _, content in records]
    for place in (1, 6, 7):
        contents[place] = contents[place][:4] + np.float32(-1).tobytes() + contents[place][8:]
    folder = write_records(tmp_path, list(enumerate(contents)))
    assert RecordDataset(folder).labels().tolist() == [-1, 0, 1, -1, -1]


@pytest.mark.parametrize("sizes", [([4, 4], [4, 4]), ([4, 4], [2]), ([1], [6, 6])])
def test_sets_behind_each_other_that_share_labels_are_refused(
    tmp_path: Path, sizes: tuple[list[int], list[int]]
) -> None:
    folder = joined(tmp_path, *sizes, 0)
    with pytest.raises(DataError, match=r"train\.rec: record with key .* overlap"):
        RecordDataset(folder)


def test_a_set_of_the_other_layout_in_front_is_refused(tmp_path: Path) -> None:
    records = [content for _, content in [*plain_records([0, 1]), *insightface_records([2, 2])]]
    folder = write_records(tmp_path, list(enumerate(records)))
    with pytest.raises(DataError, match=r"train\.rec: record with key 8 ") as caught:
        RecordDataset(folder, on_bad_record="skip")
    assert not isinstance(caught.value, BadRecordError)


def test_a_set_of_the_other_layout_behind_is_read_whole(tmp_path: Path) -> None:
    records = [content for _, content in [*insightface_records([2, 2]), *plain_records([2, 3, 2])]]
    folder = write_records(tmp_path, list(enumerate(records)))
    assert RecordDataset(folder, num_classes=4).labels().tolist() == [0, 0, 1, 1, 2, 3, 2]
