"""A student, its run, its exported file, faces and records."""

from pathlib import Path

import numpy as np
import pytest

from arcface_kd.backbones import FaceBackbone
from arcface_kd.cli.main import main
from arcface_kd.data.synthetic_faces import SyntheticFaces
from arcface_kd.export import onnx as onnx_export
from tests.export.students import run_of, trained
from tests.host.trainer.faces import draw_faces


@pytest.fixture(scope="module")
def faces() -> np.ndarray:
    drawn = SyntheticFaces(5)
    return np.stack([drawn.image(person, 0) for person in range(12)])


@pytest.fixture(scope="module")
def student(faces: np.ndarray) -> FaceBackbone:
    return trained("thin_r18", faces)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, student: FaceBackbone) -> Path:
    return run_of(tmp_path_factory.mktemp("export") / "run", student)


@pytest.fixture(scope="module")
def file(run: Path) -> Path:
    """The student, exported by the command."""
    out = run.parent / "student.onnx"
    assert main(["export", str(run), str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def content(file: Path) -> bytes:
    return file.read_bytes()


@pytest.fixture
def converted(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    """torch's exporter takes seconds; what it made of the student is given again."""
    monkeypatch.setattr(onnx_export, "to_onnx", lambda student: content)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("records")
    draw_faces(folder, identities=10, images=6)
    return folder
