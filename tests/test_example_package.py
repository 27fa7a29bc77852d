"""The package in ``examples/``: pip installs it, its method is listed, and the compact trainer trains with it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from arcface_kd.backbones import get_backbone
from arcface_kd.cli.main import main
from arcface_kd.evaluation.report.scalars import read_scalars
from tests.forked import start, wait
from tests.host.trainer.faces import draw_faces
from tests.training.runs import config_file

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "similarity_method"


def _with(package: Path, folder: Path, words: list[str]) -> int:
    sys.path.insert(0, str(package))
    os.chdir(folder)
    return main(words)


@pytest.mark.slow
def test_it_is_listed_and_trains_beside_a_built_in_method(tmp_path: Path) -> None:
    shutil.copytree(EXAMPLE, tmp_path / "source")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    installed = ["--target", str(tmp_path / "installed"), str(tmp_path / "source")]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, *installed], check=True, timeout=120)

    def run(name: str, *words: str) -> tuple[int | None, str]:
        (code,) = wait([start(_with, tmp_path / "installed", tmp_path, list(words), log=tmp_path / name)], 240)
        return code, (tmp_path / name).read_text()

    code, listed = run("listed", "methods")
    assert code == 0, listed
    (line,) = [line for line in listed.splitlines() if line.startswith("similarity ")]
    assert line.endswith("Needs: teacher embeddings.")
    (tmp_path / "faces").mkdir()
    faces = draw_faces(tmp_path / "faces", identities=4, images=4)
    config = config_file(faces, tmp_path / "run", num_epoch=1, batch_size=8, val_targets=[])
    torch.manual_seed(0)
    # A teacher of another dimension: the method compares no dimensions.
    torch.save(get_backbone("thin_r10", num_features=24).state_dict(), tmp_path / "teacher.pt")
    train = ["train", str(config), "--kd", "rkd+similarity", "--kd-teacher", "teacher.pt", "--kd-option"]
    code, said = run("trained", *train, "similarity.weight=100")
    assert code == 0, said
    scalars = read_scalars(tmp_path / "run" / "tensorboard")
    assert scalars["kd/similarity"].x.tolist() == [1, 2]
    assert (scalars["kd/similarity"].y > 0).all()
    shares = [scalars[f"kd/gradient_share/{name}"].y for name in ("ce", "rkd_distance", "rkd_angle", "similarity")]
    assert np.sum(shares, axis=0).tolist() == pytest.approx([1, 1], rel=1e-5)
    assert (tmp_path / "run" / "model.pt").is_file()
    code, said = run("refused", *train, "similarity.weight=-1")
    assert code == 2
    assert "similarity.weight is '-1'" in said
    assert said.count("\n") == 1
