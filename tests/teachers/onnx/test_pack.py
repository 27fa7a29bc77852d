"""Packs: the network that puts out embeddings is found, several are named, and manifests are obeyed."""

import hashlib
import json
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arcface_kd.errors import TeacherError
from arcface_kd.teachers import Preprocessing, load_teacher
from arcface_kd.teachers.onnx.pack import pack_folder
from tests.teachers.onnx_models import EMBEDDING_SIZE, face_network, other_network, saved, weights


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without packs, and without a network to get them from."""
    from insightface.utils import storage

    def no_network(*arguments: object, **keywords: object) -> None:
        raise RuntimeError("Failed downloading url\nno network in tests")

    monkeypatch.setattr(storage, "download", no_network)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    return tmp_path / "home"


def _pack(folder: Path) -> Path:
    """Files named and shaped like buffalo_l's."""
    saved(folder, other_network(192, 1), "1k3d68.onnx")
    saved(folder, other_network(192, 1), "2d106det.onnx")
    saved(folder, other_network(640, 9), "det_10g.onnx")
    saved(folder, other_network(96, 1), "genderage.onnx")
    saved(folder, face_network(batch=None, tail="flatten"), "w600k_r50.onnx")
    return folder


def test_the_recognition_network_of_a_pack_is_the_one_insightface_routes_to(tmp_path: Path) -> None:
    from insightface.model_zoo import get_model

    folder = _pack(tmp_path / "buffalo")
    routed = {file.name: type(get_model(str(file))).__name__ for file in sorted(folder.iterdir())}
    assert [name for name, kind in routed.items() if kind == "ArcFaceONNX"] == ["w600k_r50.onnx"]
    # A damaged neighbour hides nothing.
    (folder / "a.onnx").write_bytes(b"damaged")
    assert load_teacher(folder).fingerprint == load_teacher(folder / "w600k_r50.onnx").fingerprint
    assert load_teacher(folder).description == f"ONNX {folder / 'w600k_r50.onnx'}"


def test_a_pack_without_a_recognition_network_lists_its_files(tmp_path: Path) -> None:
    saved(tmp_path, other_network(640, 9), "det.onnx")
    saved(tmp_path, other_network(96, 1), "genderage.onnx")
    with pytest.raises(TeacherError, match=r"det\.onnx has 9 outputs; genderage\.onnx puts out 3 numbers"):
        load_teacher(tmp_path)


def test_a_pack_that_git_lfs_has_not_fetched_says_so(tmp_path: Path) -> None:
    (tmp_path / "w600k_r50.onnx").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(TeacherError, match=r"w600k_r50\.onnx is a Git LFS pointer"):
        load_teacher(tmp_path)


def test_two_recognition_networks_are_named_with_how_to_choose(tmp_path: Path) -> None:
    for name in ("glintr100.onnx", "w600k_r50.onnx"):
        saved(tmp_path, face_network(batch=None, tail="flatten"), name)
    with pytest.raises(TeacherError, match=r"w600k_r50\.onnx.*--kd-teacher .*glintr100\.onnx"):
        load_teacher(tmp_path)


def _putting_out(numbers: int) -> Any:
    """A network of the recogniser's input that puts out so many numbers: liveness, expressions, attributes."""
    arrays = {**weights(), "matrix": np.ones((64, numbers), np.float32)}
    return face_network(arrays=arrays, outputs=f"float[1, {numbers}] embedding")


def _restorer() -> Any:
    return face_network(size=512, behind="ignored = Identity (raw)", outputs="float[1, 8, 64, 64] map1")


@pytest.mark.parametrize(
    ("other", "warned"),
    [(_putting_out(2), True), (_putting_out(8), True), (_putting_out(40), True), (_restorer(), False)],
)
def test_a_network_that_puts_out_no_embedding_is_passed_over(
    tmp_path: Path, other: Any, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """The insightface package would take the first one by name; where that may be meant, it is said."""
    saved(tmp_path, other, "antispoof.onnx")
    saved(tmp_path, face_network(batch=None, tail="flatten"), "w600k_r50.onnx")
    with caplog.at_level(logging.WARNING):
        assert load_teacher(tmp_path).description == f"ONNX {tmp_path / 'w600k_r50.onnx'}"
    assert ("w600k_r50.onnx is taken" in caplog.text) is warned


@pytest.mark.parametrize("inside", [".", "antelope"])
def test_a_pack_by_name_is_found_where_insightface_keeps_it(home: Path, inside: str) -> None:
    # The archive of antelopev2 has a folder of its own name inside.
    _pack(home / ".insightface" / "models" / "antelope" / inside)
    teacher = load_teacher("insightface:antelope")
    assert teacher.embedding_size == EMBEDDING_SIZE
    assert "w600k_r50.onnx" in teacher.description


def test_a_missing_pack_is_downloaded_by_insightface_and_said_so(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from insightface.utils import storage

    def download(kind: str, name: str, force: bool) -> None:
        assert (kind, force) == ("models", True)
        _pack(home / ".insightface" / kind / name)

    monkeypatch.setattr(storage, "download", download)
    (home / ".insightface" / "models" / "buffalo_l").mkdir(parents=True)
    with caplog.at_level(logging.WARNING):
        assert load_teacher("insightface:buffalo_l").embedding_size == EMBEDDING_SIZE
    assert "insightface downloads" in caplog.text
    assert "buffalo_l.zip" in caplog.text


def test_one_rank_of_a_machine_downloads(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from insightface.utils import storage

    asked = []

    def download(kind: str, name: str, force: bool) -> None:
        asked.append(name)
        folder = home / ".insightface" / kind / name
        folder.mkdir(parents=True)
        time.sleep(0.3)
        (folder / "w600k.onnx").touch()

    monkeypatch.setattr(storage, "download", download)
    with ThreadPoolExecutor(3) as ranks:
        folders = list(ranks.map(pack_folder, ["buffalo_l"] * 3))
    assert folders == [home / ".insightface" / "models" / "buffalo_l"] * 3
    assert asked == ["buffalo_l"]


def test_a_failed_download_is_one_clear_line(home: Path) -> None:
    with pytest.raises(TeacherError, match=r"insightface:buffalo_l .*cannot be downloaded") as caught:
        load_teacher("insightface:buffalo_l")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["", "..", "../models", "a/b", "/etc", "a\\b", "a..b", "-x"])
def test_a_pack_name_leads_nowhere_else(home: Path, name: str) -> None:
    with pytest.raises(TeacherError, match="wanted the name of a pack"):
        load_teacher(f"insightface:{name}")


def _manifest(folder: Path, **recognition: object) -> Path:
    path = saved(folder, face_network(batch=None, tail="flatten"), "recognition.onnx")
    task = {"file": "recognition.onnx", "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), **recognition}
    (folder / "MODEL.LICENSE").write_text("test")
    manifest = {"manifest_version": 2, "model_id": "small", "license": "MODEL.LICENSE", "tasks": {"recognition": task}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_a_manifest_decides_on_file_and_preprocessing(tmp_path: Path) -> None:
    folder = _pack(_manifest(tmp_path / "raccoon", preprocessing={"mean": 127, "std": 128}))
    teacher = load_teacher(folder)
    assert teacher.preprocessing == Preprocessing("rgb", (127.0,) * 3, (128.0,) * 3)
    assert "recognition.onnx" in teacher.description
    assert load_teacher(folder, {"std": "1"}).preprocessing.std == (1.0, 1.0, 1.0)
    embedded = load_teacher(_manifest(tmp_path / "other", preprocessing="embedded"))
    assert embedded.preprocessing == Preprocessing("rgb", (0.0,) * 3, (1.0,) * 3)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"manifest_version": 2}', '{"manifest_version": 2, "model_id": "\\u0000"}']
)
def test_a_manifest_that_is_none_is_one_line(tmp_path: Path, text: str) -> None:
    _manifest(tmp_path / "raccoon")
    (tmp_path / "raccoon" / "manifest.json").write_text(text)
    with pytest.raises(TeacherError, match=r"teacher .*raccoon: ") as caught:
        load_teacher(tmp_path / "raccoon")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "recognition",
    [{"file": "../recognition.onnx"}, {"sha256": "0" * 64}, {"file": "missing.onnx"}, {"preprocessing": 5}],
)
def test_a_manifest_that_leads_astray_is_refused(tmp_path: Path, recognition: dict[str, object]) -> None:
    with pytest.raises(TeacherError, match="raccoon") as caught:
        load_teacher(_manifest(tmp_path / "raccoon", **recognition))
    assert "\n" not in str(caught.value)
