"""IJB's lists: what is read, and every way in which they can be at odds."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from arcface_kd.data.formats.ijb import is_ijb, read_ijb
from arcface_kd.errors import DataError
from tests.data.ijb_folders import write_ijb


def grey(identity: int, shot: int) -> np.ndarray:
    return np.full((112, 112, 3), (20 * identity + shot) % 256, np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_ijb(tmp_path / "IJBT", grey, [3, 5, 8, 9])
    return tmp_path / "IJBT"


def test_what_is_read(folder: Path) -> None:
    assert is_ijb(folder)
    met = read_ijb(folder)
    lines = (folder / "meta" / "ijbt_face_tid_mid.txt").read_text().splitlines()
    assert met.name == "ijbt"
    assert [f"{f} {t} {m}" for f, t, m in zip(met.files, met.templates, met.media, strict=True)] == lines
    assert met.pairs.shape == (4 * 8, 2)
    assert met.is_same.sum() == 8
    assert set(met.galleries) == {"G1", "G2"}
    assert met.galleries["G1"].subjects.tolist() != met.galleries["G2"].subjects.tolist()
    assert sorted([*met.galleries["G1"].subjects, *met.galleries["G2"].subjects]) == [3, 5, 8, 9]
    assert met.probes is not None
    assert sorted(met.probes.subjects.tolist()) == [3, 3, 5, 5, 8, 8, 9, 9]
    assert len(np.unique(met.probes.templates)) == 8
    assert 0.4 <= met.detector_scores.min() < met.detector_scores.max() <= 1
    face = met.face(0)
    assert face.shape == (3, 112, 112)
    assert face.flags.c_contiguous
    assert abs(int(face[0, 56, 56]) - int(grey(3, 0)[0, 0, 0])) <= 1


def test_without_galleries_or_pairs(folder: Path, tmp_path: Path) -> None:
    write_ijb(tmp_path / "a", grey, [1, 2], one_to_many=False)
    met = read_ijb(tmp_path / "a")
    assert (len(met.galleries), met.probes) == (0, None)
    (folder / "meta" / "ijbt_template_pair_label.txt").unlink()
    assert read_ijb(folder).pairs.shape == (0, 2)


def test_other_folders_are_none(tmp_path: Path) -> None:
    assert not is_ijb(tmp_path)
    with pytest.raises(DataError, match=r"none of \*_face_tid_mid.txt"):
        read_ijb(tmp_path)


def line(file: str, number: int, text: str | None) -> Callable[[Path], None]:
    """Put ``text`` in the place of a line, or take it away."""

    def change(folder: Path) -> None:
        path = folder / "meta" / file
        lines = path.read_text().splitlines()
        lines[number : number + 1] = [] if text is None else [text]
        path.write_text("\n".join(lines) + "\n")

    return change


def without(file: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "meta" / file).unlink()


def content(file: str, data: bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "meta" / file).write_bytes(data)

    return change


def pipe(file: str) -> Callable[[Path], None]:
    """Whoever opens it for reading waits for somebody to write."""

    def change(folder: Path) -> None:
        without(file)(folder)
        os.mkfifo(folder / "meta" / file)

    return change


def nothing_to_tell_apart(folder: Path) -> None:
    for file in ("ijbt_template_pair_label.txt", "ijbt_1N_gallery_G1.csv", "ijbt_1N_gallery_G2.csv"):
        without(file)(folder)


NAMES, GROUPS, PAIRS = "ijbt_name_5pts_score.txt", "ijbt_face_tid_mid.txt", "ijbt_template_pair_label.txt"
PROBES, GALLERY = "ijbt_1N_probe_mixed.csv", "ijbt_1N_gallery_G1.csv"


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (without(NAMES), [NAMES, "cannot read"]),
        (content(NAMES, b""), [NAMES, "empty"]),
        (content(NAMES, b"\xff\xfe\x00"), [NAMES, "no text"]),
        (line(NAMES, 1, "2.png 1 2 3"), [NAMES, "line 2", "five landmarks"]),
        (line(NAMES, 1, "2.png 0.5"), [NAMES, "line 2", "five landmarks"]),
        (line(NAMES, 1, ""), [NAMES, "line 2"]),
        (line(NAMES, 0, "1.png" + " x" * 11), [NAMES, "line 1"]),
        (line(NAMES, 0, "1.png" + " 7" * 11), [NAMES, "line 1", "one point"]),
        (line(NAMES, 0, "1.png 1 2 3 4 5 6 7 8 9 nan 1"), [NAMES, "line 1", "not finite"]),
        (line(NAMES, 0, "1.png 1 2 3 4 5 6 7 8 9 10 inf"), [NAMES, "line 1", "not finite"]),
        (line(NAMES, 1, "/etc/hostname" + " 7" * 11), [NAMES, "line 2", "'/etc/hostname', outside loose_crop"]),
        (line(NAMES, 1, "../meta/x.png" + " 7" * 11), [NAMES, "line 2", "outside loose_crop"]),
        (line(NAMES, 1, "a/../../x.png" + " 7" * 11), [NAMES, "line 2", "outside loose_crop"]),
        *((pipe(file), [file, "it is no regular file"]) for file in (NAMES, GROUPS, PAIRS, PROBES, GALLERY)),
        (line(GROUPS, 0, None), [GROUPS, "the same"]),
        (line(GROUPS, 0, "1.png 1001"), [GROUPS, "line 1", "its template and its medium"]),
        (line(GROUPS, 0, "1.png one two"), [GROUPS, "line 1"]),
        (line(GROUPS, 0, "1.png 1 99999999999999999999"), [GROUPS, "line 1"]),
        (line(GROUPS, 0, "7.png 1001 1"), [GROUPS, "line 1", "'7.png'", "'1.png'"]),
        (line(PAIRS, 0, "1 77 0"), [PAIRS, "no face", "such as 1"]),
        (line(PAIRS, 0, "1 2"), [PAIRS, "3 whole numbers"]),
        (line(PAIRS, 0, "a b c"), [PAIRS, "3 whole numbers"]),
        (line(PAIRS, 0, "1000 1001 2"), [PAIRS, "[0, 1, 2]", "0 and 1"]),
        (content(PAIRS, b""), [PAIRS, "0 and 1"]),
        (without(PROBES), [PROBES]),
        (content(PROBES, b"TEMPLATE_ID,SUBJECT_ID\n"), [PROBES, "no template"]),
        (line(PROBES, 1, "5,1,a.jpg"), [PROBES, "no face", "such as 5"]),
        (line(GALLERY, 1, "template,1,a.jpg"), [GALLERY, "2 whole numbers"]),
        (nothing_to_tell_apart, ["neither", "1:1", "1:N"]),
    ],
)
def test_lists_at_odds(folder: Path, damage: Callable[[Path], None], named: list[str]) -> None:
    damage(folder)
    with pytest.raises(DataError) as caught:
        read_ijb(folder)
    assert "\n" not in str(caught.value)
    for word in named:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("file", "person", "said"),
    [(GALLERY, 3, "person 3 is enrolled 2 times"), (PROBES, 77, "template {} is of two persons")],
)
def test_a_person_or_a_template_twice(folder: Path, file: str, person: int, said: str) -> None:
    template = (folder / "meta" / PROBES).read_text().splitlines()[1].split(",")[0]
    with open(folder / "meta" / file, "a") as stream:
        stream.write(f"{template},{person},a.jpg\n")
    with pytest.raises(DataError, match=said.format(template)):
        read_ijb(folder)


def test_two_sets_in_one_folder(folder: Path) -> None:
    (folder / "meta" / "ijbb_face_tid_mid.txt").write_text("")
    with pytest.raises(DataError, match=r"ijbb_face_tid_mid.txt, ijbt_face_tid_mid.txt"):
        read_ijb(folder)


def test_missing_images_are_told_before_one_is_read(folder: Path) -> None:
    for name in ("2.png", "5.png"):
        (folder / "loose_crop" / name).unlink()
    with pytest.raises(DataError, match=r"loose_crop lacks 2 of 33 images .* such as 2\.png, 5\.png"):
        read_ijb(folder)
    shutil.rmtree(folder / "loose_crop")
    with pytest.raises(DataError, match=r"loose_crop is no folder"):
        read_ijb(folder)


def test_a_face_that_cannot_be_read_is_named(folder: Path) -> None:
    (folder / "loose_crop" / "2.png").write_bytes(b"no image")
    faces = read_ijb(folder)
    faces.face(0)
    with pytest.raises(DataError) as caught:
        faces.face(1)
    assert str(caught.value).count("2.png") == 1
