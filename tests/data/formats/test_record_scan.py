"""An index that was lost is built anew."""

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from arcface_kd.cli.main import main
from arcface_kd.data.dataset import RecordDataset, open_dataset
from arcface_kd.data.formats.record_scan import build_index
from arcface_kd.errors import DataError
from tests.data.record_sets import MAGIC, encoded, insightface_records, plain_records, record, write_records


def lost(folder: Path, records: list[tuple[int, bytes]]) -> tuple[Path, str]:
    """Records without their index, and the index that they had."""
    write_records(folder, records)
    index = (folder / "train.idx").read_text()
    (folder / "train.idx").unlink()
    return folder, index


@pytest.mark.parametrize("layout", ["insightface", "plain", "from-1", "threads", "shuffled", "parts"])
def test_the_index_is_the_one_that_was_lost(tmp_path: Path, layout: str) -> None:
    records = insightface_records([4, 1, 3]) if layout in ("insightface", "shuffled") else plain_records([0, 1, 1, 0])
    if layout in ("from-1", "threads"):
        records = plain_records([0, 1, 1, 0], first_key=1)
    if layout in ("threads", "shuffled"):
        records = [records[place] for place in np.random.default_rng(3).permutation(len(records))]
    if layout == "parts":
        records[1] = (1, record(1, 1.0, b"abcd" + MAGIC + b"x" + MAGIC + encoded(1)))
    folder, index = lost(tmp_path, records)
    assert build_index(folder).records == len(records)
    assert (folder / "train.idx").read_text() == index


def test_records_that_all_carry_one_number_are_counted(tmp_path: Path) -> None:
    folder, _ = lost(tmp_path, [(key, record(0, float(key), encoded(key))) for key in range(3)])
    build_index(folder)
    assert RecordDataset(folder).keys.tolist() == [0, 1, 2]


def test_mxnet_reads_by_the_index(mxnet: ModuleType, tmp_path: Path) -> None:
    folder, _ = lost(tmp_path, insightface_records([2, 3]))
    build_index(folder)
    theirs = mxnet.recordio.MXIndexedRecordIO(str(folder / "train.idx"), str(folder / "train.rec"), "r")
    assert mxnet.recordio.unpack(theirs.read_idx(0))[0].label.tolist() == [6.0, 8.0]
    assert mxnet.recordio.unpack(theirs.read_idx(5))[1] == encoded(5)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html>Quota exceeded</html>", "HTML"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        (b"something else altogether", "byte 0"),
        (MAGIC + b"\xff\x00\x00\x00abc", "cut short"),
        (MAGIC + b"\x04\x00\x00\x00abcd" + b"x" * 12, "byte 12"),
        (MAGIC + b"\x04\x00\x00\x20abcd", "cut short"),
        (MAGIC + b"\x04\x00\x00\x00abcd" + MAGIC, "cut short"),
    ],
)
def test_damaged_files_get_no_index(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "train.rec").write_bytes(content)
    with pytest.raises(DataError, match=f"train.rec .*{said}"):
        build_index(tmp_path)
    assert not (tmp_path / "train.idx").exists()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("train.idx", b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        ("train.rec", b"PK\x03\x04" + bytes(60), "zip"),
    ],
)
def test_what_stands_in_place_of_records_or_index_is_named(
    tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    write_records(tmp_path, insightface_records([2]))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name} .*{said}"):
        open_dataset(tmp_path)


WRONG = {
    "another file's": lambda lines: [lines[0], "1\t12\n", *lines[2:]],
    "cut short": lambda lines: lines[:-2],
    "cut within a line": lambda lines: [*lines[:-1], lines[-1][:1]],
    "joined": lambda lines: [*lines, lines[3]],
    "key twice": lambda lines: [*lines[:-1], "3" + lines[-1][1:]],
    "empty": lambda lines: [],
    "no index": lambda lines: ["<html>\n"],
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_index_is_built_anew_and_kept_aside(tmp_path: Path, fault: str) -> None:
    folder, index = lost(tmp_path, insightface_records([2, 3]))
    wrong = "".join(WRONG[fault](index.splitlines(keepends=True)))
    (folder / "train.idx").write_text(wrong)
    built = build_index(folder)
    assert (built.built, built.records) == (True, 8)
    assert built.fault
    assert "train.idx.wrong" in str(built)
    assert (folder / "train.idx").read_text() == index
    assert (folder / "train.idx.wrong").read_text() == wrong


def test_an_index_that_lists_every_record_is_left_alone(tmp_path: Path) -> None:
    folder, index = lost(tmp_path, insightface_records([2, 3]))
    turned = "".join(reversed(index.splitlines(keepends=True)))
    (folder / "train.idx").write_text(turned)
    assert not build_index(folder).built
    assert (folder / "train.idx").read_text() == turned


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = lost(tmp_path, insightface_records([2, 3]))
    with pytest.raises(DataError, match=f"arcface-kd data index {folder}"):
        open_dataset(folder, 2)
    assert main(["data", "index", str(folder)]) == 0
    assert "8 records" in capsys.readouterr().out
    assert len(open_dataset(folder, 2)) == 5
    assert main(["data", "index", str(folder / "train.rec")]) == 0
    assert "left as it is" in capsys.readouterr().out
    assert main(["data", "index", str(tmp_path / "none")]) == 2
