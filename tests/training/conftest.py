"""Faces and a teacher for runs of a second or two."""

from pathlib import Path

import pytest
import torch

from arcface_kd.backbones import get_backbone
from tests.host.trainer.faces import Faces, draw_faces


@pytest.fixture(scope="session")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Faces:
    return draw_faces(tmp_path_factory.mktemp("faces"), identities=10, images=8)


@pytest.fixture(scope="session")
def teacher_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(7)
    path = tmp_path_factory.mktemp("teacher") / "teacher.pt"
    torch.save(get_backbone("thin_r10", num_features=32).state_dict(), path)
    return path
