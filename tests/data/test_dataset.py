import pickle
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from arcface_kd.data.dataset import FolderDataset, RecordDataset, SyntheticDataset, View, open_dataset
from arcface_kd.data.formats.image import decode_rgb
from arcface_kd.errors import DataError
from tests.data.record_sets import encoded, insightface_records, pixels, plain_records, record, write_records


def one_line(error: BaseException) -> str:
    assert "\n" not in str(error)
    return str(error)


def refused(root: Path, num_classes: int | None = None) -> str:
    """The message with which a folder is refused."""
    with pytest.raises(DataError) as caught:
        open_dataset(root, num_classes)
    return one_line(caught.value)


# Records ------------------------------------------------------------------------------------------------------------


def test_insightface_layout(tmp_path: Path) -> None:
    write_records(tmp_path, insightface_records([2, 1, 3]))
    (tmp_path / "property").write_text("3,112,112\n")
    faces = RecordDataset(tmp_path, num_classes=3)
    assert len(faces) == 6
    assert faces.keys.tolist() == [1, 2, 3, 4, 5, 6]
    assert [faces.label(index) for index in range(6)] == [0, 0, 1, 2, 2, 2]
    assert faces.stated_classes == 3
    for index in range(6):
        assert faces.image_bytes(index) == encoded(index + 1)
        sample = faces[index]
        assert sample.image.dtype == torch.uint8
        assert sample.image.shape == (3, 112, 112)
        np.testing.assert_array_equal(sample.image.permute(1, 2, 0).numpy(), decode_rgb(encoded(index + 1)))
        assert sample[1:] == (faces.label(index), index, False)


def test_plain_layout(tmp_path: Path) -> None:
    write_records(tmp_path, plain_records([1, 0, 1]))
    # RecBuilder's property has a second line with the number of images.
    (tmp_path / "property").write_text("2,112,112\n3\n")
    faces = RecordDataset(tmp_path)
    assert faces.keys.tolist() == [0, 1, 2]
    assert [faces[index].label for index in range(3)] == [1, 0, 1]
    assert faces.stated_classes == 2


def test_plain_layout_without_a_record_0_and_without_property(tmp_path: Path) -> None:
    records = plain_records([4, 5, 6], first_key=3)
    write_records(tmp_path, [records[1], records[2], records[0]])
    faces = RecordDataset(tmp_path)
    # The host goes through them in the order of the index.
    assert faces.keys.tolist() == [4, 5, 3]
    assert [faces.label(index) for index in range(3)] == [5, 6, 4]
    assert faces.image_bytes(2) == encoded(3)
    assert faces.stated_classes is None


def test_label_vectors_give_their_first_label(tmp_path: Path) -> None:
    write_records(tmp_path, [(key, record(key, [float(key), 0.5, 7.0], encoded(key))) for key in range(3)])
    faces = RecordDataset(tmp_path)
    # Record 0 has labels as a header record has, but it holds an image.
    assert [faces[index].label for index in range(3)] == [0, 1, 2]


def test_an_unordered_index_and_a_left_out_image(tmp_path: Path) -> None:
    records = insightface_records([2, 2])
    write_records(tmp_path, records[::-1])
    faces = RecordDataset(tmp_path, num_classes=2)
    assert faces.keys.tolist() == [1, 2, 3, 4]
    assert [faces.label(index) for index in range(4)] == [0, 0, 1, 1]
    for left_out, expected in ((2, [1, 3, 4]), (4, [1, 2, 3])):
        write_records(tmp_path, [pair for pair in records if pair[0] != left_out])
        assert RecordDataset(tmp_path).keys.tolist() == expected


def test_a_header_without_identity_records(tmp_path: Path) -> None:
    records = insightface_records([2, 2])[:5]
    write_records(tmp_path, [(0, record(0, [5.0, 5.0], b"")), *records[1:]])
    assert RecordDataset(tmp_path).keys.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("images", range(1, 12))
def test_counts_beyond_what_float32_tells_apart(tmp_path: Path, images: int) -> None:
    first = (1 << 24) - 3
    records = insightface_records([images, 2], first_key=first)
    write_records(tmp_path, records)
    faces = RecordDataset(tmp_path)
    assert faces.keys.tolist() == list(range(first, first + images + 2))
    assert faces.image_bytes(images + 1) == encoded(first + images + 1)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([4.0, 7.0], "the header says that images end before key 4, but the last image in the index has key 4"),
        ([6.0, 7.0], None),
        ([7.0, 8.0], "the header says that images end before key 7, but the last image in the index has key 4"),
        ([float("nan"), 7.0], "images end before key nan"),
        ([float("inf"), 7.0], "images end before key inf"),
        ([-5.0, 7.0], "images end before key -5"),
        ([5.0], "it holds neither an image nor the two counts of a header record"),
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
    assert "holds a header record and no image" in refused(tmp_path)
    write_records(tmp_path, [(0, record(0, [1.0, 2.0], b"")), (1, record(1, [1.0, 1.0], b""))])
    assert "holds a header record and no image" in refused(tmp_path)


def test_labels_beyond_num_classes_are_refused_at_the_start(tmp_path: Path) -> None:
    write_records(tmp_path, plain_records([0, 3, 1]))
    assert len(RecordDataset(tmp_path, num_classes=4)) == 3
    message = refused(tmp_path, 3)
    assert "record with key 1 at byte" in message
    assert message.endswith("its label is 3, but num_classes is 3; set num_classes to 4 or more")


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (-2.0, "its label is -2; wanted 0 or more, or -1 for no identity"),
        (1.5, "its label is 1.5, which is no whole number"),
        (-0.5, "its label is -0.5, which is no whole number"),
        (float("nan"), "its label is nan, which is no whole number"),
        (float("inf"), "its label is inf, which is no whole number"),
        (float("-inf"), "its label is -inf, which is no whole number"),
        (2.0**24, "its label is 16777216; a float32 tells whole numbers apart up to 16777216 only"),
    ],
)
def test_impossible_labels_are_refused_on_reading(tmp_path: Path, label: float, message: str) -> None:
    write_records(tmp_path, [*plain_records([-1, 2**24 - 1]), (2, record(2, label, encoded(2)))])
    faces = RecordDataset(tmp_path)
    assert faces[0].label == -1
    assert faces[1].label == 2**24 - 1
    with pytest.raises(DataError, match=message) as caught:
        faces[2]
    assert "record with key 2 at byte" in str(caught.value)
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
        with pytest.raises(IndexError, match=f"index {index} is out of range: the data set has 2 images"):
            faces[index]
        with pytest.raises(IndexError):
            faces.label(index)
        with pytest.raises(IndexError):
            faces.image_bytes(index)
        with pytest.raises(IndexError):
            faces[View(index, True)]
    assert [sample.label for sample in faces] == [0, 1]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "content",
    [
        *(b"985", b"985,112", b"985,112,112,3", b"985,112,112\r\n17", b" 985 , 112 , 112 ", b"985 112 112", b"985;112"),
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
    assert flipped.flipped
    assert not plain.flipped
    torch.testing.assert_close(flipped.image, plain.image.flip(-1), rtol=0, atol=0)
    assert not torch.equal(flipped.image, plain.image)
    label, rows = faces.pixels(View(1, True))
    assert label == 1
    np.testing.assert_array_equal(rows, flipped.image.permute(1, 2, 0).numpy())


def test_grey_and_transparent_records(tmp_path: Path) -> None:
    grey = cv2.imencode(".jpg", pixels(0)[..., 0])[1].tobytes()
    clear = cv2.imencode(".png", np.dstack([pixels(1), pixels(2)[..., 0]]))[1].tobytes()
    faces = RecordDataset(write_records(tmp_path, [(0, record(0, 0.0, grey)), (1, record(1, 1.0, clear))]))
    assert torch.equal(faces[0].image[0], faces[0].image[2])
    np.testing.assert_array_equal(faces[1].image.permute(1, 2, 0).numpy(), pixels(1)[..., ::-1])


def first_of(samples: list[tuple[torch.Tensor, int, int, bool]]) -> list[tuple[torch.Tensor, int]]:
    return [(sample[0], sample[1]) for sample in samples]


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_of_both_kinds_see_the_same_faces(tmp_path: Path, start: str) -> None:
    faces = RecordDataset(write_records(tmp_path, insightface_records([2, 3])), num_classes=2)
    loader = DataLoader(faces, num_workers=1, batch_size=2, multiprocessing_context=start, collate_fn=first_of)
    seen = [pair for batch in loader for pair in batch]
    assert len(seen) == 5
    for index, (image, label) in enumerate(seen):
        assert torch.equal(image, faces[index].image)
        assert label == faces.label(index)


def test_a_pickled_data_set_is_the_same(tmp_path: Path) -> None:
    faces = RecordDataset(write_records(tmp_path, insightface_records([2, 3])[::-1]), num_classes=2)
    copy = pickle.loads(pickle.dumps(faces))
    assert copy.keys.tolist() == faces.keys.tolist()
    assert all(torch.equal(copy[index].image, faces[index].image) for index in range(5))


@settings(max_examples=150, deadline=None)
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
        target[place] ^= data.draw(st.integers(1, 255))
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
    assert len(faces) == 1_000_000
    sample = faces[999_999]
    assert sample.label == 1
    assert sample.image.shape == (3, 112, 112)
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
    assert isinstance(open_dataset(tmp_path), RecordDataset)
    assert isinstance(open_dataset(str(tmp_path)), RecordDataset)
    (tmp_path / "train.idx").rename(tmp_path / "kept")
    assert f"arcface-kd data index {tmp_path}" in refused(tmp_path)
    (tmp_path / "train.rec").unlink()
    (tmp_path / "kept").rename(tmp_path / "train.idx")
    assert refused(tmp_path) == f"{tmp_path} holds train.idx but no train.rec; both are needed"
    (tmp_path / "train.idx").unlink()
    assert isinstance(open_dataset(tmp_path), FolderDataset)
    assert f"there is no folder {tmp_path}/none; wanted train.rec" in refused(tmp_path / "none")
    assert "there is no folder" in refused(tmp_path / "a" / "1.jpg")
