"""Folders of identities: what is listed, in which order, and what is passed over."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from arcface_kd.data.dataset import FolderDataset, UnlabelledFolder, View, open_dataset
from arcface_kd.data.fingerprint import fingerprint
from arcface_kd.data.formats.image import decode_rgb
from arcface_kd.errors import DataError
from tests.data.record_sets import encoded, pixels, refused


def write_image(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(seed, path.suffix.lower()))


def image_folder_twin(root: Path) -> list[tuple[str, int]]:
    """What torchvision's ImageFolder lists, in its order."""
    found = []
    names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    for label, name in enumerate(names):
        for folder, _, files in sorted(os.walk(root / name)):
            for file in sorted(files):
                if file.lower().endswith((".jpg", ".jpeg", ".png", ".bmp", ".webp")):
                    found.append((os.path.join(folder, file), label))
    return found


def test_folders_are_listed_as_the_host_lists_them(tmp_path: Path) -> None:
    places = ["b/1.jpg", "b/10.png", "b/2.JPG", "a/x/1.jpg", "a/x-y/1.jpg", "a/z.jpg", "a/b.bmp", "Z/q.webp", "é/1.jpg"]
    for seed, place in enumerate(places):
        write_image(tmp_path / place, seed)
    (tmp_path / "a" / "notes.txt").write_text("no image")
    (tmp_path / "sheet.jpg").write_text("not in an identity")
    faces = FolderDataset(tmp_path)
    assert [(faces.where(index), faces.label(index)) for index in range(len(faces))] == image_folder_twin(tmp_path)
    assert faces.labels().tolist() == [label for _, label in image_folder_twin(tmp_path)]
    assert len(faces) == len(places)
    assert faces.names == ["Z", "a", "b", "é"]
    sample = faces[View(1, True)]
    data = faces.image_bytes(1)
    np.testing.assert_array_equal(sample.image.permute(1, 2, 0).numpy(), decode_rgb(data)[:, ::-1])
    assert sample[1:] == (1, 1, True)
    assert isinstance(open_dataset(tmp_path, 4), FolderDataset)
    assert f"{tmp_path}/é: its label is 3, but num_classes is 3; set num_classes to 4" in refused(tmp_path, 3)


def test_bad_folders_are_refused(tmp_path: Path) -> None:
    assert f"{tmp_path} holds no image" in refused(tmp_path)
    (tmp_path / "a").mkdir()
    assert f"{tmp_path}/a" in refused(tmp_path)
    write_image(tmp_path / "a" / "1.jpg", 0)
    (tmp_path / "a" / "2.jpg").write_bytes(b"no image")
    faces = open_dataset(tmp_path)
    with pytest.raises(DataError, match=r"a/2\.jpg"):
        faces[1]
    (tmp_path / "a" / "2.jpg").unlink()
    with pytest.raises(DataError, match=r"cannot read .*a/2\.jpg: No such file"):
        faces[1]


def told(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(entry.getMessage() for entry in caplog.records)


def test_what_systems_leave_is_neither_identity_nor_face(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_image(tmp_path / "a" / "1.jpg", 0)
    write_image(tmp_path / "b" / "1.jpg", 1)
    strays = [
        *(".ipynb_checkpoints/1-checkpoint.jpg", "@eaDir/a.jpg", "__MACOSX/a/._1.jpg", "a/._1.jpg"),
        *("a/@eaDir/1.jpg/SYNOPHOTO_THUMB_S.jpg", "b/.thumbnails/1.jpg", "$RECYCLE.BIN/x.jpg", "lost+found/x.png"),
    ]
    for place in strays:
        write_image(tmp_path / place, 2)
    for place in (".DS_Store", "a/Thumbs.db", "b/desktop.ini", "a/notes.txt", "b/a.HEIC", "b/b.heic", "b/README"):
        (tmp_path / place).write_text("x")
    write_image(tmp_path / "sheet.jpg", 3)
    faces = FolderDataset(tmp_path)
    assert faces.names == ["a", "b"]
    assert [faces.where(index) for index in range(len(faces))] == [f"{tmp_path}/a/1.jpg", f"{tmp_path}/b/1.jpg"]
    for counted in ("4 files that are no images", "2 .heic", "1 .txt", "1 images beside", "@eaDir", "and 6 more"):
        assert counted in told(caplog)
    assert len(caplog.records) == 1


def test_a_clean_folder_is_listed_without_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_image(tmp_path / "a" / "1.jpg", 0)
    write_image(tmp_path / "a" / "more" / "1.jpg", 0)
    FolderDataset(tmp_path)
    assert not caplog.records


@pytest.mark.parametrize("suffix", ["jpe", "jfif", "tif", "TIFF", "ppm", "pgm", "pbm", "gif", "jp2", "dib", "bmp"])
def test_images_of_other_suffixes_are_faces(tmp_path: Path, suffix: str) -> None:
    kinds = {"jpe": "JPEG", "jfif": "JPEG", "tif": "TIFF", "gif": "GIF", "jp2": "JPEG2000", "dib": "BMP", "bmp": "BMP"}
    kind = kinds.get(suffix.lower().removesuffix("f"), kinds.get(suffix.lower(), "PPM"))
    picture = Image.fromarray(pixels(1)[..., ::-1])
    picture = picture.convert({"pgm": "L", "pbm": "1", "gif": "P"}.get(suffix, "RGB"))
    (tmp_path / "a").mkdir()
    with open(tmp_path / "a" / f"1.{suffix}", "wb") as stream:
        picture.save(stream, kind)
    sample = FolderDataset(tmp_path)[0]
    with Image.open(tmp_path / "a" / f"1.{suffix}") as image:
        theirs = np.array(image.convert("RGB"))
    np.testing.assert_array_equal(sample.image.permute(1, 2, 0).numpy(), theirs)


def test_identities_one_level_too_deep_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for place in ("train/p1/1.jpg", "train/p2/1.jpg", "val/p3/1.jpg", "extra/1.jpg"):
        write_image(tmp_path / place, 0)
    assert FolderDataset(tmp_path).names == ["extra", "train", "val"]
    assert "2 of 3 identities" in told(caplog)
    assert f"{tmp_path}/train/p1" in told(caplog)


@pytest.mark.parametrize("place", ["a/link.jpg", "a/link", "link"])
def test_links_out_of_the_folder_are_refused(tmp_path: Path, place: str) -> None:
    secret = tmp_path / "secret"
    write_image(secret / "1.jpg", 0)
    root = tmp_path / "set"
    write_image(root / "a" / "1.jpg", 0)
    (root / place).symlink_to(secret / "1.jpg" if place.endswith(".jpg") else secret)
    assert f"{root / place} is a symbolic link" in refused(root)


@pytest.mark.parametrize("place", ["a/link.jpg", "a/link", "link"])
def test_links_to_themselves_are_refused(tmp_path: Path, place: str) -> None:
    write_image(tmp_path / "a" / "1.jpg", 0)
    (tmp_path / place).symlink_to(tmp_path / place)
    assert f"{tmp_path / place} is a symbolic link" in refused(tmp_path)


def test_what_systems_leave_makes_no_identities_of_a_flat_folder(tmp_path: Path) -> None:
    for seed, place in enumerate(["ü 2.png", "1.JPG", "@eaDir/1.JPG/T.jpg", ".thumbs/x.jpg", "__MACOSX/._1.JPG"]):
        write_image(tmp_path / place, seed)
    faces = open_dataset(tmp_path)
    assert isinstance(faces, UnlabelledFolder)
    assert [faces.where(index) for index in range(len(faces))] == [f"{tmp_path}/1.JPG", f"{tmp_path}/ü 2.png"]
    assert faces.labels().tolist() == [-1, -1]
    (tmp_path / "sub").mkdir()
    assert f"{tmp_path}/**" in refused(tmp_path)
    # Neither what is passed over nor where the folder lies is a part of the images.
    before = fingerprint(faces)
    assert fingerprint(open_dataset(tmp_path / "**")) == before
    assert fingerprint(open_dataset(tmp_path.rename(tmp_path.with_name("moved")), 0)) == before


def test_a_tree_is_read_by_folder_and_name_without_labels(tmp_path: Path) -> None:
    places = ["b.jpg", "2019/x/1.jpg", "2019/2.jpg", "2020/1.jpg"]
    for seed, place in enumerate(places):
        write_image(tmp_path / place, seed)
    for faces in (open_dataset(tmp_path / "**"), open_dataset(tmp_path, 0)):
        found = [os.path.relpath(faces.where(index), tmp_path) for index in range(len(faces))]
        assert found == ["b.jpg", "2019/2.jpg", "2019/x/1.jpg", "2020/1.jpg"]
        assert (faces[1].label, faces.found_classes) == (-1, 0)
    assert FolderDataset(tmp_path).names == ["2019", "2020"]
    # Records have labels of their own.
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "train.rec").touch()
    (tmp_path / "records" / "train.idx").touch()
    assert "holds no image" in refused(tmp_path / "records" / "**")
