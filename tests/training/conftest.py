"""Faces and a teacher for runs of a second or two."""

from pathlib import Path

import pytest

from tests.host.trainer.faces import Faces, draw_faces
from tests.networks import untrained_file


@pytest.fixture(scope="session")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Faces:
    return draw_faces(tmp_path_factory.mktemp("faces"), identities=10, images=8)


@pytest.fixture(scope="session")
def teacher_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untrained_file(tmp_path_factory.mktemp("teacher"), "thin_r10", 32)
