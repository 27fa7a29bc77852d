"""Data sets of records: their layouts, labels and images, and what is refused by name."""

import pickle
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arcface_kd.data.dataset import FolderDataset, RecordDataset, SyntheticDataset, View, open_dataset
from arcface_kd.data.formats.image import decode_rgb
from arcface_kd.errors import DataError
from tests.data.record_sets import (
    encoded,
    insightface_records,
    one_line,
    pixels,
    plain_records,
    record,
    refused,
    write_records,
)

# Records ------------------------------------------------------------------------------------------------------------


def test_insightface_layout(tmp_path: Path) -> None:
    write_records(tmp_path, insightface_records([2, 1, 3]))
    (tmp_path / "property").write_text("3,112,112\n")
    faces = RecordDataset(tmp_path, num_classes=3)
    assert faces.keys.tolist() == [1, 2, 3, 4, 5, 6]
    assert [faces.label(index) for index in range(len(faces))] == [0, 0, 1, 2, 2, 2]
    assert faces.stated_classes == 3
    for index in range(6):
        assert faces.image_bytes(index) == encoded(index + 1)
        sample = faces[index]
        np.testing.assert_array_equal(sample.image.permute(1, 2, 0).numpy(), decode_rgb(encoded(index + 1)))
        assert sample[1:] == (faces.label(index), index, False)


FACES = insightface_records([2, 2])
PLAIN = plain_records([4, 5, 6], first_key=3)
# Records; the keys and the labels of the images among them.
LAYOUTS: dict[str, tuple[list[tuple[int, bytes]], list[int], list[int]]] = {
    "plain": (plain_records([1, 0, 1]), [0, 1, 2], [1, 0, 1]),
    # The host goes through them in the order of the index.
    "plain, in any order": ([PLAIN[1], PLAIN[2], PLAIN[0]], [4, 5, 3], [5, 6, 4]),
    # Record 0 has labels as a header record has, but it holds an image.
    "label vectors": ([(key, record(key, [key, 0.5, 7], encoded(key))) for key in range(3)], [0, 1, 2], [0, 1, 2]),
    "from the last": (FACES[::-1], [1, 2, 3, 4], [0, 0, 1, 1]),
    "without the second image": ([*FACES[:2], *FACES[3:]], [1, 3, 4], [0, 1, 1]),
    "without the last image": ([*FACES[:4], *FACES[5:]], [1, 2, 3], [0, 0, 1]),
    "without identities": ([(0, record(0, [5, 5], b"")), *FACES[1:5]], [1, 2, 3, 4], [0, 0, 1, 1]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_layouts(tmp_path: Path, layout: str) -> None:
    records, keys, labels = LAYOUTS[layout]
    faces = RecordDataset(write_records(tmp_path, records))
    assert faces.stated_classes is None
    assert faces.keys.tolist() == keys
    assert [faces.label(index) for index in range(len(faces))] == faces.labels().tolist() == labels
    assert [faces.image_bytes(index) for index in range(len(faces))] == [encoded(key) for key in keys]


@pytest.mark.parametrize("images", range(1, 12))
def test_counts_beyond_what_float32_tells_apart(tmp_path: Path, images: int) -> None:
    first = (1 << 24) - 3
    faces = RecordDataset(write_records(tmp_path, insightface_records([images, 2], first_key=first)))
    assert faces.keys.tolist() == list(range(first, first + images + 2))
    assert faces.image_bytes(images + 1) == encoded(first + images + 1)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([4.0, 7.0], "before key 4, but the last image in the index has key 4"),
        ([6.0, 7.0], None),
        ([7.0, 8.0], "before key 7, but the last image in the index has key 4"),
        ([float("nan"), 7.0], "before key nan"),
        ([float("inf"), 7.0], "before key inf"),
        ([-5.0, 7.0], "before key -5"),
        ([5.0], "two counts of a header record"),
    ],
)
def test_a_header_that_does_not_fit_the_index_is_refused(
    tmp_path: Path, labels: list[float], message: str | None
) -> None:
    records = insightface_records([2, 2])
    # Key 5, the first identity, is moved to 6: both 5 and 6 are right now.
    identities = [(key + 1, packed) for key, packed in records[5:]]
    write_records(tmp_path, [(0, record(0, labels, b"")), *records[1:5], *identities])
    if message is None:
        assert len(RecordDataset(tmp_path)) == 4
    else:
        assert message in refused(tmp_path)


def test_a_header_alone_is_refused(tmp_path: Path) -> None:
    write_records(tmp_path, [(0, record(0, [1.0, 1.0], b""))])
    assert "a header record and no image" in refused(tmp_path)
    write_records(tmp_path, [(0, record(0, [1.0, 2.0], b"")), (1, record(1, [1.0, 1.0], b""))])
    assert "a header record and no image" in refused(tmp_path)


@pytest.mark.parametrize("label", [-2.0, 1.5, -0.5, float("nan"), float("inf"), float("-inf"), 2.0**24])
def test_impossible_labels_are_refused_on_reading_and_at_the_start(tmp_path: Path, label: float) -> None:
    write_records(tmp_path, [*plain_records([-1, 2**24 - 1]), (2, record(2, label, encoded(2)))])
    faces = RecordDataset(tmp_path)
    assert (faces[0].label, faces[1].label) == (-1, 2**24 - 1)
    message = f"record with key 2 at byte {faces.reader.offsets[2]}: its label is {label:.16g}"
    with pytest.raises(DataError) as caught:
        faces[2]
    assert message in str(caught.value)
    assert message in refused(tmp_path, 2**30)


def test_bad_images_are_named_with_key_and_offset(tmp_path: Path) -> None:
    write_records(
        tmp_path,
        [
            (0, record(0, 0.0, encoded(0))),
            (5, record(5, 0.0, encoded(1)[:900])),
            (6, record(6, 0.0, encoded(1, ".jpg", 112, 96))),
            (7, record(7, 0.0, b"")),
            (8, b"short"),
        ],
    )
    faces = RecordDataset(tmp_path)
    for index, message in [
        (1, "OpenCV cannot decode the image: it is damaged or cut short"),
        (2, "the image is 112x96 pixels, wanted 112x112"),
        (3, "it holds no image"),
        (4, "a record of 5 bytes is too short for its header of 24"),
    ]:
        place = f"{tmp_path}/train.rec: record with key {index + 4} at byte {faces.reader.offsets[index]}"
        assert faces.where(index) == place
        with pytest.raises(DataError) as caught:
            faces[index]
        assert str(caught.value) == f"{place}: {message}"


def test_indices_out_of_range(tmp_path: Path) -> None:
    faces = RecordDataset(write_records(tmp_path, plain_records([0, 1])))
    for index in (-1, 2):
        for ask in (faces.__getitem__, faces.label, faces.image_bytes, lambda at: faces[View(at, True)]):
            with pytest.raises(IndexError, match=f"index {index} "):
                ask(index)
    assert [sample.label for sample in faces] == [0, 1]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "content",
    [
        *(
            b"985",
            b"985,112",
            b"985,112,112,3",
            b"985,112,112\n17\n",
            b"985,112,112\r\n17",
            b" 985 , 112 , 112 ",
            b"985 112 112",
            b"985;112",
        ),
        *(b"\xef\xbb\xbf985,112,112\r\n", "\ufeff985,112,112".encode("utf-16-le"), "985,112,112".encode("utf-16")),
    ],
)
def test_a_property_written_by_hand_is_read(tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    write_records(tmp_path, plain_records([0, 1]))
    (tmp_path / "property").write_bytes(content)
    assert RecordDataset(tmp_path).stated_classes == 985
    assert not caplog.records


@pytest.mark.parametrize("content", [b"", b"a,112", b"-1,112", b"1.5,112", b"9" * 300, bytes(9), b"0,1", b"16777217,1"])
def test_a_property_that_is_none_is_passed_over(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    write_records(tmp_path, plain_records([0, 1]))
    (tmp_path / "property").write_bytes(content)
    assert RecordDataset(tmp_path).stated_classes is None
    (tmp_path / "property").unlink()
    (tmp_path / "property").mkdir()
    assert RecordDataset(tmp_path).stated_classes is None
    assert [str(tmp_path / "property") in entry.getMessage() for entry in caplog.records] == [True, True]


def test_flipped_views_are_mirrored(tmp_path: Path) -> None:
    faces = RecordDataset(write_records(tmp_path, plain_records([0, 1])))
    plain, flipped = faces[View(1, False)], faces[View(1, True)]
    assert (plain.flipped, flipped.flipped) == (False, True)
    assert torch.equal(flipped.image, plain.image.flip(-1))
    assert not torch.equal(flipped.image, plain.image)


def test_grey_and_transparent_records(tmp_path: Path) -> None:
    grey = cv2.imencode(".jpg", pixels(0)[..., 0])[1].tobytes()
    clear = cv2.imencode(".png", np.dstack([pixels(1), pixels(2)[..., 0]]))[1].tobytes()
    faces = RecordDataset(write_records(tmp_path, [(0, record(0, 0.0, grey)), (1, record(1, 1.0, clear))]))
    assert torch.equal(faces[0].image[0], faces[0].image[2])
    np.testing.assert_array_equal(faces[1].image.permute(1, 2, 0).numpy(), pixels(1)[..., ::-1])


def test_a_pickled_data_set_is_the_same(tmp_path: Path) -> None:
    faces = RecordDataset(write_records(tmp_path, insightface_records([2, 3])[::-1]), num_classes=2)
    copy = pickle.loads(pickle.dumps(faces))
    assert copy.keys.tolist() == faces.keys.tolist()
    assert all(torch.equal(copy[index].image, faces[index].image) for index in range(5))


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_mutated_sets_give_samples_or_one_clear_line(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "mutated"
    if not folder.exists():
        write_records(folder, insightface_records([1, 2]), "whole")
        (folder / "whole.property").write_text("2,112,112\n")
    names = {"train.rec": "whole.rec", "train.idx": "whole.idx", "property": "whole.property"}
    content = {name: bytearray((folder / whole).read_bytes()) for name, whole in names.items()}
    for _ in range(data.draw(st.integers(1, 3))):
        target = content[data.draw(st.sampled_from(sorted(names)))]
        # Headers are few bytes among many: aim at them half of the time.
        place = data.draw(st.integers(0, min(len(target), 120) - 1) | st.integers(0, len(target) - 1))
        match data.draw(st.sampled_from(["flip", "flip", "cut", "insert"])):
            case "flip":
                target[place] ^= data.draw(st.integers(1, 255))
            case "cut":
                # A file that is empty is tested elsewhere.
                del target[place + 1 : place + 1 + data.draw(st.integers(1, 9))]
            case _:
                target[place:place] = data.draw(st.binary(min_size=1, max_size=9))
    for name, mutated in content.items():
        (folder / name).write_bytes(mutated)
    try:
        faces = RecordDataset(folder, num_classes=2)
    except DataError as error:
        one_line(error)
        return
    for index in range(len(faces)):
        try:
            sample = faces[index]
        except DataError as error:
            one_line(error)
        else:
            assert sample.image.shape == (3, 112, 112)
            assert -1 <= sample.label < 2


@pytest.mark.real
def test_real_faces_equal_the_hosts(mxnet: ModuleType, real_data: Path) -> None:
    root = real_data / "faces_real"
    records = mxnet.recordio.MXIndexedRecordIO(str(root / "train.idx"), str(root / "train.rec"), "r")
    header, _ = mxnet.recordio.unpack(records.read_idx(0))
    keys = range(1, int(header.label[0]))
    faces = RecordDataset(root, num_classes=985)
    assert faces.keys.tolist() == list(keys)
    assert len(faces) == 6433
    assert faces.stated_classes == 985
    for index in range(0, len(faces), 13):
        header, image = mxnet.recordio.unpack(records.read_idx(keys[index]))
        sample = faces[index]
        assert sample.label == int(header.label)
        assert faces.image_bytes(index) == image
        np.testing.assert_array_equal(sample.image.permute(1, 2, 0).numpy(), mxnet.image.imdecode(image).asnumpy())
    assert "set num_classes to 985 or more" in refused(root, 984)


def test_the_synthetic_set() -> None:
    faces = open_dataset("synthetic", 2)
    assert isinstance(faces, SyntheticDataset)
    sample = faces[999_999]
    assert sample.label == 1
    sample.image.zero_()
    assert torch.equal(faces[5].image.flip(-1), faces[View(6, True)].image)
    assert faces[5].image.float().std() > 50
    np.testing.assert_array_equal(decode_rgb(faces.image_bytes(3)), faces[3].image.permute(1, 2, 0).numpy())
    with pytest.raises(DataError, match="label 1, but num_classes is 1"):
        open_dataset("synthetic", 1)


def test_what_is_there_decides(tmp_path: Path) -> None:
    write_records(tmp_path, plain_records([0, 1]))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.jpg").write_bytes(encoded(0))
    assert isinstance(open_dataset(str(tmp_path)), RecordDataset)
    (tmp_path / "train.idx").rename(tmp_path / "kept")
    assert f"arcface-kd data index {tmp_path}" in refused(tmp_path)
    (tmp_path / "train.rec").unlink()
    (tmp_path / "kept").rename(tmp_path / "train.idx")
    assert "no train.rec" in refused(tmp_path)
    (tmp_path / "train.idx").unlink()
    assert isinstance(open_dataset(tmp_path), FolderDataset)
    assert f"there is no folder {tmp_path}/none; wanted train.rec" in refused(tmp_path / "none")
    assert "there is no folder" in refused(tmp_path / "a" / "1.jpg")
