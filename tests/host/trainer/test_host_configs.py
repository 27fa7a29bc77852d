"""Files of configs/ copied into a trainer without the flag: one of each method, all in one process.

Needs ARCFACE_TORCH. Only what names data and files, and what makes a run short, is changed in the copies.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from arcface_kd.backbones import get_backbone
from arcface_kd.cli.main import main
from tests.compatibility.same_losses import losses_of
from tests.host.trainer.faces import Faces, draw_faces
from tests.host.trainer.host import checkout
from tests.host.trainer.launch import Run, Turn, launch_in_turn
from tests.host.trainer.teacher import Teacher, untrained_teacher

pytestmark = [pytest.mark.trainer, pytest.mark.slow]

CONFIGS = Path(__file__).parents[3] / "configs"
LAST_LINE = "arcface_kd.attach(config)\n"
# Every method with the smaller student, and the bigger one once; test_shkd.py runs the one that takes three runs.
FILES = [*CONFIGS.glob("ms1mv2_mbf_*.py"), CONFIGS / "wf42m_r18_adadistill.py"]
NAMES = sorted(path.stem for path in FILES if not path.stem.endswith("_shkd"))


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Faces:
    return draw_faces(tmp_path_factory.mktemp("faces"), identities=6, images=4)


@pytest.fixture(scope="module")
def teacher(faces: Faces, tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    return untrained_teacher(faces, tmp_path_factory.mktemp("teacher") / "model.pt", 512)


@pytest.fixture(scope="module")
def runs(
    arcface_torch: Path, faces: Faces, teacher: Teacher, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Run]:
    """The trainer's folder and what it printed."""
    host = checkout(arcface_torch, tmp_path_factory.mktemp("host") / "arcface_torch", "current_stack", "cpu_gloo")
    assert "--kd" not in (host / "train_v2.py").read_text(encoding="utf-8")
    files = tmp_path_factory.mktemp("files")
    torch.save({"weight": normalize(teacher.embeddings.reshape(faces.num_classes, -1, 512).mean(1))}, files / "head.pt")
    short = {
        "rec": str(faces.folder),
        "num_classes": faces.num_classes,
        "num_image": faces.num_image,
        "num_epoch": 1,
        "batch_size": 8,
        "num_workers": 0,
        "frequent": 1,
        "val_targets": [],
    }
    ours = {"kd_teacher": str(teacher.file), "kd_classifier": str(files / "head.pt"), "kd_cache": str(files / "cache")}
    for name in NAMES:
        text = (CONFIGS / f"{name}.py").read_text(encoding="utf-8")
        changes = short | {key: value for key, value in ours.items() if f"config.{key} =" in text}
        body = text.removesuffix(LAST_LINE)
        config = host / "configs" / f"{name}.py"
        config.write_text(f"{body}config.update({changes!r})\n{LAST_LINE}", encoding="utf-8")
        if "kd_cache" in changes and not (files / "cache").exists():
            assert main(["cache", str(config)]) == 0
    return host, launch_in_turn(host, [Turn(name, [f"configs/{name}"]) for name in NAMES])


@pytest.mark.parametrize("name", NAMES)
def test_it_runs_where_it_is_copied_to(runs: tuple[Path, Run], name: str) -> None:
    host, run = runs
    assert f"finished {name} on rank 0" in run.printed, run.printed[-6000:]
    output = host / "work_dirs" / name
    losses = losses_of(output)
    assert sorted(losses) == [2, 3]
    assert np.isfinite(list(losses.values())).all()
    network = get_backbone(name.split("_")[1], num_features=512)
    network.load_state_dict(torch.load(output / "model.pt", weights_only=True))
    head = torch.load(output / "checkpoint_gpu_0.pt", weights_only=True)["state_dict_softmax_fc"]
    assert head["class_range"].tolist() == [0, 6, 6], "the head is ours"
    assert int(head["step"]) == 3
