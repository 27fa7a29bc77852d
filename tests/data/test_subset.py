"""Few images of each identity: which ones, and what is written."""

import errno
import os
import shutil
from pathlib import Path
from typing import IO

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arcface_kd.cli.main import main
from arcface_kd.data.dataset import RecordDataset
from arcface_kd.data.subset import choose_images, write_subset
from arcface_kd.errors import ConfigError, DataError
from tests.data.record_sets import encoded, insightface_records, make_odd, plain_records, record, write_records

LABELS = st.lists(st.integers(-1, 6), min_size=1, max_size=60).map(np.array)


@given(labels=LABELS, per_identity=st.integers(1, 5), seed=st.integers(0, 2**32 - 1))
def test_as_many_of_each_as_asked_for_or_all(labels: np.ndarray, per_identity: int, seed: int) -> None:
    chosen = choose_images(labels, per_identity, seed)
    assert len(set(chosen.tolist())) == len(chosen)
    for identity in range(-1, 7):
        wanted = 0 if identity < 0 else min(per_identity, int((labels == identity).sum()))
        assert int((labels[chosen] == identity).sum()) == wanted
    assert list(zip(labels[chosen], chosen, strict=True)) == sorted(zip(labels[chosen], chosen, strict=True))


@given(labels=LABELS, seed=st.integers(0, 2**32 - 1))
def test_a_smaller_choice_is_part_of_a_larger_one(labels: np.ndarray, seed: int) -> None:
    choices = [set(choose_images(labels, count, seed).tolist()) for count in (1, 2, 5)]
    assert choices[0] <= choices[1] <= choices[2]


def test_the_seed_decides_and_the_choice_is_fixed_for_good() -> None:
    labels = np.repeat(np.arange(4), 8)
    assert choose_images(labels, 2, 0).tolist() == [2, 5, 10, 11, 16, 22, 26, 28]
    assert choose_images(labels, 2, 1).tolist() != choose_images(labels, 2, 0).tolist()
    drawn = np.concatenate([choose_images(labels, 1, seed) % 8 for seed in range(100)])
    assert np.bincount(drawn, minlength=8).min() > 25, "every image of an identity has its chance"


def test_records_of_a_subset(tmp_path: Path) -> None:
    source = write_records(tmp_path / "all", insightface_records([5, 1, 0, 4]))
    (source / "lfw.bin").write_bytes(b"]pairs")
    counts = write_subset(source, tmp_path / "few", images_per_identity=2, seed=3)
    assert counts == (4, 5, 2)
    assert str(counts) == "num_classes=4 num_image=5; 2 identities had no more to give"
    whole, few = RecordDataset(source), RecordDataset(tmp_path / "few", num_classes=4)
    assert few.labels().tolist() == [0, 0, 1, 3, 3]
    chosen = choose_images(whole.labels(), 2, 3)
    assert [few.image_bytes(at) for at in range(5)] == [whole.image_bytes(index) for index in chosen.tolist()]
    assert (tmp_path / "few" / "property").read_text() == "4,112,112\n"
    assert (tmp_path / "few" / "lfw.bin").read_bytes() == b"]pairs"
    again = tmp_path / "again"
    write_subset(source, again, images_per_identity=2, seed=3)
    for name in ("train.rec", "train.idx", "property"):
        assert (again / name).read_bytes() == (tmp_path / "few" / name).read_bytes()


def test_pairs_of_another_disk_are_copied_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_records(tmp_path / "all", insightface_records([2]))
    (source / "lfw.bin").write_bytes(b"]pairs")

    def no_link(*names: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    def full(stored: IO[bytes], stream: IO[bytes]) -> None:
        stream.write(stored.read(2))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "link", no_link)
    write_subset(source, tmp_path / "few", images_per_identity=1)
    assert (tmp_path / "few" / "lfw.bin").read_bytes() == b"]pairs"
    monkeypatch.setattr(shutil, "copyfileobj", full)
    with pytest.raises(DataError, match=r"cannot copy .*No space left"):
        write_subset(source, tmp_path / "none", images_per_identity=1)
    assert sorted(os.listdir(tmp_path / "none")) == ["property", "train.idx", "train.rec"]


def test_a_link_to_pairs_is_followed(tmp_path: Path) -> None:
    source = write_records(tmp_path / "all", insightface_records([2]))
    (tmp_path / "lfw").write_bytes(b"]pairs")
    (source / "lfw.bin").symlink_to("../lfw")
    write_subset(source, tmp_path / "deep" / "few", images_per_identity=1)
    assert not (tmp_path / "deep" / "few" / "lfw.bin").is_symlink()
    assert (tmp_path / "deep" / "few" / "lfw.bin").read_bytes() == b"]pairs"


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "nothing"])
def test_pairs_that_are_no_file_are_refused_before_anything_is_written(tmp_path: Path, kind: str) -> None:
    """A pipe would be waited for, and a device without an end copied until the disk is full."""
    source = write_records(tmp_path / "all", insightface_records([2]))
    pairs = source / "lfw.bin"
    make_odd(pairs, kind)
    with pytest.raises(DataError, match=r"lfw\.bin is no file, or a link to none"):
        write_subset(source, tmp_path / "few", images_per_identity=1)
    assert not (tmp_path / "few").exists()


def test_the_other_layout_and_images_of_nobody(tmp_path: Path) -> None:
    source = write_records(tmp_path / "all", plain_records([2, -1, 0, 2, 2, -1]))
    assert write_subset(source, tmp_path / "few", images_per_identity=1) == (3, 2, 1)
    assert RecordDataset(tmp_path / "few").labels().tolist() == [0, 2]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_records(tmp_path / "all", insightface_records([3, 3]))
    words = ["data", "subset", str(source), str(tmp_path / "few"), "--images-per-identity", "2", "--seed", "5"]
    assert main(words) == 0
    assert "num_classes=2 num_image=4" in capsys.readouterr().out
    assert main(words) == 2
    assert "train.rec exists; remove it" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "seed", "said"), [(0, 0, "images_per_identity is 0"), (1, -1, "seed is -1")])
def test_numbers_that_cannot_be(tmp_path: Path, number: int, seed: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        write_subset(tmp_path, tmp_path / "few", images_per_identity=number, seed=seed)


@pytest.mark.parametrize("lost", ["header", "image"])
def test_a_record_without_an_image_is_not_chosen(tmp_path: Path, lost: str) -> None:
    """Of an index that has lost record 0, the identity records would be images with labels; so would an empty one."""
    records = insightface_records([2, 2])
    if lost == "header":
        source = write_records(tmp_path / "all", [(9, record(9, 0.0, encoded(0))), *records[1:]])
    else:
        source = write_records(tmp_path / "all", [*records[:1], (1, record(1, 0.0, b"")), *records[2:]])
    with pytest.raises(DataError, match=r"train\.rec: record with key [16] at byte"):
        write_subset(source, tmp_path / "few", images_per_identity=1)
    assert not (tmp_path / "few").exists()


def test_nothing_to_choose_from(tmp_path: Path) -> None:
    source = write_records(tmp_path / "all", plain_records([-1, -1]))
    with pytest.raises(DataError, match=r"no image in .*all has an identity"):
        write_subset(source, tmp_path / "few", images_per_identity=1)
    with pytest.raises(DataError, match="cannot read"):
        write_subset(tmp_path / "nowhere", tmp_path / "few", images_per_identity=1)
    assert not (tmp_path / "few").exists()
