"""Degraded views in a run of the compact trainer."""

from pathlib import Path

import pytest

from arcface_kd.errors import CheckpointError
from arcface_kd.training.trainer import train
from tests.host.trainer.faces import Faces
from tests.training.runs import config_for, same_weights, saved, train_until


def test_the_compact_trainer_resumes_to_the_same_bits(faces: Faces, teacher_file: Path, tmp_path: Path) -> None:
    keys = {
        "kd": "embedding",
        "kd_teacher": str(teacher_file),
        "kd_option": {"student.augment": ["lowres:0.5", "crop:0.5"]},
        "save_all_states": True,
        "val_targets": [],
    }
    train(config_for(faces, tmp_path / "whole", num_workers=1, **keys))
    train_until(1, config_for(faces, tmp_path / "parts", **keys))
    train(config_for(faces, tmp_path / "parts", resume=True, **keys))
    assert same_weights(saved(tmp_path / "whole"), saved(tmp_path / "parts"))
    with pytest.raises(CheckpointError, match=r"student\.augment"):
        train(config_for(faces, tmp_path / "parts", resume=True, **keys | {"kd_option": None}))
