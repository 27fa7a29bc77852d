"""What the campaigns train on: few faces, and a teacher of one."""

from pathlib import Path

import pytest

from tests.host.trainer.faces import Faces, draw_faces
from tests.networks import untrained_file


@pytest.fixture(scope="session")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Faces:
    """Four people with four images each; nobody writes to the folder."""
    return draw_faces(tmp_path_factory.mktemp("faces"), identities=4, images=4)


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untrained_file(tmp_path_factory.mktemp("teacher"), "thin_r18", 16)
