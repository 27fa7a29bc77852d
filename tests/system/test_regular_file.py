"""Pipes, devices and endless files where a file should be: one line, at once."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from arcface_kd.data.dataset import open_dataset
from arcface_kd.data.formats.verification_bin import read_bin
from arcface_kd.errors import ArcfaceKDError, DataError, TeacherError
from arcface_kd.system.files import open_regular
from arcface_kd.teachers.base import read_bytes
from tests.data.record_sets import encoded, make_odd, one_line, plain_records, write_records


def read_image_folder(path: Path) -> None:
    open_dataset(path.parent.parent)[0]


def read_records(path: Path) -> None:
    open_dataset(path.parent)


READERS: dict[str, Callable[[Path], Any]] = {
    **{"train.rec": read_records, "train.idx": read_records},
    **{"pairs.bin": read_bin, "identity/1.jpg": read_image_folder, "model.onnx": read_bytes},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_records(tmp_path, plain_records([0, 1]))
    (tmp_path / "property").write_text("2,112,112\n")
    (tmp_path / "people" / "identity").mkdir(parents=True)
    (tmp_path / "people" / "identity" / "1.jpg").write_bytes(encoded(1))
    return tmp_path


def place(folder: Path, name: str) -> Path:
    path = folder / "people" / name if "/" in name else folder / name
    path.unlink(missing_ok=True)
    return path


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_file_is_refused_at_once(folder: Path, name: str, kind: str) -> None:
    path = place(folder, name)
    make_odd(path, kind)
    with pytest.raises(ArcfaceKDError, match=f"{path.stem}|{path.parent.name}") as caught:
        READERS[name](path)
    one_line(caught.value)
    assert kind != "pipe" or "regular file" in str(caught.value)


def test_files_are_opened_through_links_and_may_be_missing(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    with open_regular(tmp_path / "link") as stream:
        assert stream.read() == b"content"
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "missing")


def test_files_without_end_are_not_read(folder: Path) -> None:
    image = folder / "people" / "identity" / "1.jpg"
    os.truncate(image, 1 << 40)
    with pytest.raises(DataError, match=r"1\.jpg has 1099511627776 bytes"):
        read_image_folder(image)
    model = folder / "model.onnx"
    model.touch()
    os.truncate(model, 1 << 40)
    with pytest.raises(TeacherError, match=r"model\.onnx has 1099511627776 bytes"):
        read_bytes(model)
