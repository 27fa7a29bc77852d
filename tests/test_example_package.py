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
from arcface_kd.evaluation.report.scalars import read_scalars
from tests.host.trainer.faces import draw_faces

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "similarity_method"

CONFIG = """
from easydict import EasyDict as edict

config = edict()
config.network = "thin_r18"
config.embedding_size = 16
config.rec = "faces"
config.num_classes = {num_classes}
config.num_image = {num_image}
config.num_epoch = 1
config.warmup_epoch = 0
config.batch_size = 8
config.frequent = 1
config.num_workers = 0
config.val_targets = []
config.output = "run"
"""


def _install(source: Path, target: Path) -> Path:
    """Install a package into a folder of its own, without network and without touching the source."""
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, "--target", str(target), str(source)],
        check=True,
        timeout=120,
    )
    return target


def _run(folder: Path, packages: list[Path], *words: str) -> subprocess.CompletedProcess[str]:
    """``arcface-kd WORDS`` with some packages installed beside it."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, packages)), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "arcface_kd", *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("example")
    shutil.copytree(EXAMPLE, folder / "source")
    return _install(folder / "source", folder / "installed")


@pytest.mark.slow
def test_it_is_listed_and_trains_beside_a_built_in_method(example: Path, tmp_path: Path) -> None:
    (tmp_path / "faces").mkdir()
    faces = draw_faces(tmp_path / "faces", identities=4, images=4)
    (tmp_path / "small.py").write_text(CONFIG.format(num_classes=faces.num_classes, num_image=faces.num_image))
    torch.manual_seed(0)
    # A teacher of another dimension: the method compares no dimensions.
    torch.save(get_backbone("thin_r18", num_features=24).state_dict(), tmp_path / "teacher.pt")
    kd = ["--kd", "rkd+similarity", "--kd-teacher", "teacher.pt"]
    trained = _run(tmp_path, [example], "train", "small.py", *kd, "--kd-option", "similarity.weight=100")
    assert trained.returncode == 0, trained.stderr
    scalars = read_scalars(tmp_path / "run" / "tensorboard")
    assert scalars["kd/similarity"].x.tolist() == [1, 2]
    assert (scalars["kd/similarity"].y > 0).all()
    shares = [scalars[f"kd/gradient_share/{name}"].y for name in ("ce", "rkd_distance", "rkd_angle", "similarity")]
    assert np.sum(shares, axis=0).tolist() == pytest.approx([1, 1], rel=1e-5)
    assert (tmp_path / "run" / "model.pt").is_file()
    refused = _run(tmp_path, [example], "train", "small.py", *kd, "--kd-option", "similarity.weight=-1")
    assert refused.returncode == 2
    assert refused.stderr == "arcface-kd: similarity.weight is '-1'; it must be a finite number, at least 0\n"


def test_two_installed_distributions_that_claim_one_name_are_both_named(example: Path, tmp_path: Path) -> None:
    listed = _run(tmp_path, [example], "methods")
    assert listed.returncode == 0, listed.stderr
    (line,) = [line for line in listed.stdout.splitlines() if line.startswith("similarity ")]
    assert line == (
        "similarity           Rows that the teacher finds alike are to be alike for the student. "
        "Needs: teacher embeddings."
    )
    shutil.copytree(EXAMPLE, tmp_path / "source")
    for file in (tmp_path / "source").iterdir():
        text = file.read_text(encoding="utf-8").replace("arcface-kd-similarity", "rival-similarity")
        file.write_text(text.replace("arcface_kd_similarity", "rival_similarity"), encoding="utf-8")
    (tmp_path / "source" / "arcface_kd_similarity.py").rename(tmp_path / "source" / "rival_similarity.py")
    rival = _install(tmp_path / "source", tmp_path / "installed")
    refused = _run(tmp_path, [example, rival], "methods")
    assert refused.returncode == 2
    assert refused.stdout == ""
    assert refused.stderr == (
        "arcface-kd: two distributions claim the name 'similarity' in arcface_kd.methods: arcface-kd-similarity and "
        "rival-similarity; uninstall one of them\n"
    )
