"""A folder of images becomes records in InsightFace's layout, or nothing at all."""

import os
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest

from arcface_kd.cli.main import main
from arcface_kd.data.dataset import RecordDataset, View
from arcface_kd.data.formats.image import decode_rgb
from arcface_kd.data.formats.record import unpack
from arcface_kd.data.formats.recordio import RecordReader, RecordWriter
from arcface_kd.data.pack import PackCounts, pack_folder, write_identities
from arcface_kd.errors import DataError
from tests.data.record_sets import encoded, pixels


def everything_in(root: Path, *, files_only: bool = False) -> dict[str, bytes | None]:
    """Contents by place; None for folders."""
    found = {os.path.relpath(path, root): path.read_bytes() if path.is_file() else None for path in root.rglob("*")}
    return {place: content for place, content in found.items() if content is not None or not files_only}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three identities; one image is larger, one smaller, one WebP, one grey."""
    root = tmp_path / "faces"
    files = {
        "bob/1.jpg": encoded(1),
        "bob/2.png": encoded(2, ".png"),
        "alice/large.jpg": encoded(3, ".jpg", 250, 200),
        "alice/grey.jpg": cv2.imencode(".jpg", pixels(4)[..., 0])[1].tobytes(),
        "carol/w.webp": encoded(5, ".webp"),
        "carol/small.png": encoded(6, ".png", 60, 60),
        "carol/z.bmp": encoded(7, ".bmp"),
    }
    for place, content in files.items():
        path = root / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def test_a_folder_becomes_records_in_insightface_layout(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "packed"
    assert pack_folder(folder, out) == PackCounts(identities=3, images=7, resized=2)
    assert capsys.readouterr() == ("", ""), "no progress bar without a terminal"
    assert sorted(path.name for path in out.iterdir()) == ["property", "train.idx", "train.rec"]
    assert (out / "property").read_text() == "3,112,112\n"

    faces = RecordDataset(out, num_classes=3)
    assert faces.keys.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert [faces.label(index) for index in range(7)] == [0, 0, 1, 1, 2, 2, 2]
    for index, place in enumerate(sorted(everything_in(folder, files_only=True))):
        data = (folder / place).read_bytes()
        if place in ("alice/large.jpg", "carol/small.png"):
            way = cv2.INTER_AREA if "large" in place else cv2.INTER_LINEAR
            scaled = cv2.resize(decode_rgb(data), (112, 112), interpolation=way)
            expected = cv2.imencode(".jpg", scaled[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()
            assert faces.image_bytes(index) == expected
        elif place.endswith(".webp"):
            assert faces.image_bytes(index)[:4] == b"\x89PNG"
            np.testing.assert_array_equal(faces.pixels(View(index, False))[1], decode_rgb(data))
        else:
            assert faces.image_bytes(index) == data

    with RecordReader(out / "train.rec", out / "train.idx") as reader:
        assert reader.keys.tolist() == list(range(11))
        header, payload = unpack(reader.read(0))
        assert np.asarray(header.label).tolist() == [8, 11]
        assert len(payload) == 0
        assert [unpack(reader.read(key))[0].id for key in range(1, 8)] == list(range(1, 8))
        ranges = [np.asarray(unpack(reader.read(key))[0].label).tolist() for key in (8, 9, 10)]
        assert ranges == [[1, 3], [3, 5], [5, 8]]


def test_mxnet_reads_and_writes_the_same(mxnet: ModuleType, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "packed"
    pack_folder(folder, out)
    theirs = mxnet.recordio.MXIndexedRecordIO(str(out / "train.idx"), str(out / "train.rec"), "r")
    again = mxnet.recordio.MXIndexedRecordIO(str(tmp_path / "a.idx"), str(tmp_path / "a.rec"), "w")
    faces = RecordDataset(out)
    for key in theirs.keys:
        header, image = mxnet.recordio.unpack(theirs.read_idx(key))
        again.write_idx(key, mxnet.recordio.pack(header, image))
        if header.flag == 0:
            np.testing.assert_array_equal(mxnet.image.imdecode(image).asnumpy(), faces.pixels(View(key - 1, False))[1])
    again.close()
    for end in ("rec", "idx"):
        assert (out / f"train.{end}").read_bytes() == (tmp_path / f"a.{end}").read_bytes()


@pytest.mark.parametrize("there", [False, True])
def test_a_bad_image_leaves_everything_as_it_was(folder: Path, tmp_path: Path, there: bool) -> None:
    out = tmp_path / "packed"
    if there:
        out.mkdir()
        (out / "lfw.bin").write_text("kept")
        (out / "property").write_text("old")
    (folder / "carol" / "y.jpg").write_bytes(encoded(0)[:700])
    before = everything_in(tmp_path)
    with pytest.raises(DataError, match=r"carol/y\.jpg"):
        pack_folder(folder, out)
    assert everything_in(tmp_path) == before


@pytest.fixture
def three_bad(folder: Path) -> list[str]:
    """Three images that cannot be read among the seven good ones, one of them all that an identity has."""
    bad = {"alice/a.jpg": b"", "carol/y.jpg": encoded(0)[:700], "dave/1.jpg": b"GIF89a" + bytes(60)}
    (folder / "dave").mkdir()
    for place, content in bad.items():
        (folder / place).write_bytes(content)
    return list(bad)


def test_bad_images_are_named_at_once_and_left_out_when_asked(
    folder: Path, three_bad: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The records are those of the folder without the bad images, and the labels those of the folder as it is."""
    with pytest.raises(DataError, match="3 of 10 images"):
        pack_folder(folder, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()
    assert [place for place in three_bad if place in caplog.text] == three_bad
    caplog.clear()
    counts = pack_folder(folder, tmp_path / "packed", on_bad_record="skip")
    assert counts == PackCounts(identities=4, images=7, resized=2, skipped=3, emptied=1)
    assert len(caplog.records) == 3
    faces = RecordDataset(tmp_path / "packed", num_classes=4)
    assert faces.labels().tolist() == [0, 0, 1, 1, 2, 2, 2]
    assert faces.stated_classes == 4
    with RecordReader(tmp_path / "packed" / "train.rec", tmp_path / "packed" / "train.idx") as reader:
        assert reader.keys.tolist() == list(range(12))
        assert np.asarray(unpack(reader.read(0))[0].label).tolist() == [8, 12]
        ranges = [np.asarray(unpack(reader.read(key))[0].label).tolist() for key in range(8, 12)]
        assert ranges == [[1, 3], [3, 5], [5, 8], [8, 8]]


def test_links_are_followed_when_asked(folder: Path, tmp_path: Path) -> None:
    linked = tmp_path / "linked"
    (linked / "zoe").mkdir(parents=True)
    (linked / "bob").symlink_to(folder / "bob")
    (linked / "zoe" / "1.jpg").symlink_to(folder / "bob" / "1.jpg")
    (linked / "zoe" / "back").symlink_to(linked / "zoe")
    with pytest.raises(DataError, match="--follow-links"):
        pack_folder(linked, tmp_path / "packed")
    assert pack_folder(linked, tmp_path / "packed", follow_links=True) == PackCounts(2, 3, 0)


@pytest.mark.parametrize("tree", [False, True])
def test_images_of_nobody_become_records_without_labels(folder: Path, tmp_path: Path, tree: bool) -> None:
    flat = folder / "bob"
    (flat / "3.jpg").symlink_to(folder / "alice" / "large.jpg")
    source = folder / "**" if tree else flat
    with pytest.raises(DataError, match="--follow-links"):
        pack_folder(source, tmp_path / "packed")
    counts = pack_folder(source, tmp_path / "packed", follow_links=True)
    assert counts == PackCounts(0, 8 if tree else 3, 3 if tree else 1)
    faces = RecordDataset(tmp_path / "packed", num_classes=0)
    assert faces.labels().tolist() == [-1] * counts.images
    assert faces.image_bytes(2 if tree else 0) == (flat / "1.jpg").read_bytes()


def test_the_command(folder: Path, tmp_path: Path, three_bad: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "erin").symlink_to(folder / "bob")
    words = ["data", "pack", str(folder), str(tmp_path / "packed")]
    assert main(words) == 2
    assert main([*words, "--follow-links"]) == 2
    assert main([*words, "--follow-links", "--on-bad-record", "skip"]) == 0
    assert "num_classes=5 num_image=9" in capsys.readouterr().out


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_full_disk_or_an_interruption_leaves_everything_as_it_was(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    write = RecordWriter.write

    def failing(self: RecordWriter, key: int, record: bytes) -> None:
        if key == 6:
            raise error
        write(self, key, record)

    monkeypatch.setattr(RecordWriter, "write", failing)
    before = everything_in(tmp_path)
    wanted = DataError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(wanted, match="packed: No space left" if wanted is DataError else None):
        pack_folder(folder, tmp_path / "packed")
    assert everything_in(tmp_path) == before


def test_records_are_never_overwritten(folder: Path, tmp_path: Path) -> None:
    for name in ("train.rec", "train.idx"):
        out = tmp_path / name.replace(".", "-")
        out.mkdir()
        (out / name).write_text("precious")
        with pytest.raises(DataError, match=f"{name} exists.* remove it"):
            pack_folder(folder, out)
        assert everything_in(out) == {name: b"precious"}


def test_places_that_cannot_be_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "hollow" / "dave").mkdir(parents=True)
    (tmp_path / "bad" / "a").mkdir(parents=True)
    (tmp_path / "bad" / "a" / "1.jpg").write_bytes(b"x")
    for source, out, named in [
        ("faces", "file", "file: File exists"),
        ("faces", "file/below", "file/below: "),
        ("none", "out", "none: No such file"),
        ("empty", "out", "empty holds no image"),
        ("hollow", "out", "dave"),
        ("bad", "out", "1 of 1 images"),
    ]:
        with pytest.raises(DataError, match=named):
            pack_folder(tmp_path / source, tmp_path / out, on_bad_record="skip")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("images", [3, 5])
def test_as_many_images_as_announced(images: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="zip"):
        write_identities(tmp_path / "out", [1, 3], (encoded(number) for number in range(images)))
    assert not (tmp_path / "out").exists()


def test_encoded_images_are_written_as_they_are_and_replace_what_was_there(tmp_path: Path) -> None:
    write_identities(tmp_path, [1, 1], [encoded(8), encoded(9)])
    images = [encoded(number) for number in range(4)]
    write_identities(tmp_path, [1, 3], images)
    records = RecordDataset(tmp_path, num_classes=2)
    assert [bytes(records.image_bytes(place)) for place in range(4)] == images
    assert [records.label(place) for place in range(4)] == [0, 1, 1, 1]
    assert (tmp_path / "property").read_text() == "2,112,112\n"
