"""What the campaigns train on: few faces, and a teacher of one."""

from pathlib import Path

import pytest
import torch

from arcface_kd.backbones import get_backbone
from tests.host.trainer.faces import Faces, draw_faces


@pytest.fixture(scope="session")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Faces:
    """Four people with four images each; nobody writes to the folder."""
    return draw_faces(tmp_path_factory.mktemp("faces"), identities=4, images=4)


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(7)
    path = tmp_path_factory.mktemp("teacher") / "teacher.pt"
    torch.save(get_backbone("thin_r18", num_features=16).state_dict(), path)
    return path
