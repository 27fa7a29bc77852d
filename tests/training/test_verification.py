"""Verification in a run: what cannot be read is told before the first step, what fails costs no checkpoint."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from easydict import EasyDict

from arcface_kd.data.formats.verification_bin import read_bin, write_bin
from arcface_kd.errors import DataError
from arcface_kd.evaluation import verification
from arcface_kd.training import run
from arcface_kd.training.trainer import train
from tests.host.trainer.faces import Faces, draw_faces
from tests.training.runs import config_for


@pytest.fixture
def config(tmp_path: Path) -> EasyDict:
    faces: Faces = draw_faces(tmp_path, identities=4, images=4)
    shutil.copy(faces.folder / "pairs.bin", faces.folder / "again.bin")
    keys = {"num_epoch": 1, "batch_size": 8, "verbose": 1, "val_targets": ["pairs", "again"]}
    return config_for(faces, tmp_path / "run", save_all_states=True, **keys)


def test_an_image_that_cannot_be_decoded_is_told_before_the_first_step(config: EasyDict) -> None:
    path = Path(config.rec) / "again.bin"
    pairs = read_bin(path)
    pairs.images[5] = b"\xff\xd8 no image"
    write_bin(path, pairs.images, pairs.is_same)
    with pytest.raises(DataError, match=r"again\.bin: .*image 5"):
        train(config)
    assert not Path(config.output).exists()


@pytest.mark.parametrize("error", [DataError("NaN"), torch.OutOfMemoryError("CUDA out of memory"), ValueError("odd")])
def test_a_verification_that_fails_costs_no_checkpoint(
    config: EasyDict, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def evaluate(student: Any, pairs: Any, **keys: Any) -> Any:
        if pairs.name == "pairs":
            raise error
        return verification.evaluate(student, pairs, **keys)

    monkeypatch.setattr(run, "evaluate", evaluate)
    result = train(config)
    assert list(result.verification) == ["again"]
    assert (result.steps, {path.name for path in result.output.glob("*.pt")}) == (
        2,
        {"model.pt", "checkpoint_gpu_0.pt"},
    )
    log = (result.output / "training.log").read_text()
    assert log.count(f"not verified: {error}") == 3
