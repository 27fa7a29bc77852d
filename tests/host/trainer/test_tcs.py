"""TCS by a copied config: in the trainer of our own, interrupted and not, and in the real one, on two ranks."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from easydict import EasyDict

from arcface_kd.backbones import get_backbone
from arcface_kd.teachers.cache.fill import fill_cache
from tests.host.trainer.faces import Faces
from tests.host.trainer.host import checkout
from tests.host.trainer.host import settings as host_settings
from tests.host.trainer.launch import head_state, launch, train, write_config
from tests.host.trainer.teacher import untrained_teacher

pytestmark = pytest.mark.slow

STAND_IN = Path(__file__).parent / "stand_in"
ATTACH = "\nimport arcface_kd\n\narcface_kd.attach(config)"
OPTIONS = {"tcs.dimension": 12, "tcs.drop": 0.5, "tcs.rounds": 2, "tcs.drop_end": 0.75}


@pytest.fixture(scope="module")
def cache(faces: Faces, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of 32 dimensions, whose file is gone when the cache is full."""
    folder = tmp_path_factory.mktemp("teacher")
    teacher = untrained_teacher(faces, folder / "model.pt", 32)
    fill_cache(EasyDict(rec=str(faces.folder), kd_teacher=str(teacher.file), kd_cache=str(folder / "rows")))
    teacher.file.unlink()
    return folder / "rows"


def distilling(cache: Path, **changes: object) -> dict[str, object]:
    return {"kd": "tcs", "kd_cache": str(cache), "kd_option": OPTIONS, **changes}


def axes_left(output: Path, rank: int = 0) -> list[int]:
    mask = head_state(output, rank)["methods.tcs.mask"]
    return [int(axis) for axis in mask.nonzero().flatten()]


def test_two_ranks_an_interruption_and_the_same_bytes(faces: Faces, cache: Path, tmp_path: Path) -> None:
    folder = tmp_path / "trainer"
    shutil.copytree(STAND_IN, folder, ignore=shutil.ignore_patterns("__pycache__"))

    def run(name: str, **changes: object) -> Path:
        keys = {"rec": str(faces.folder), "num_classes": 6, "num_image": 48, "num_epoch": 2, **changes}
        output = tmp_path / str(changes.get("output", name))
        config = write_config(folder, name, {**keys, **distilling(cache), "output": str(output)}, ATTACH)
        train(folder, config, ranks=2)
        return output

    def losses(output: Path, rank: int) -> list[float]:
        trace: list[float] = json.loads((output / f"losses_{rank}.json").read_text(encoding="utf-8"))
        return trace

    whole = run("whole")
    # Twice the images in one epoch make the length of the whole run; the data set decides where the epoch ends.
    halves = run("first", num_epoch=1, num_image=96, output="halves")
    begun = [losses(halves, rank) for rank in range(2)]
    assert 6 < len(axes_left(halves)) <= 12
    run("second", resume=True, output="halves")
    for rank in range(2):
        assert begun[rank] + losses(halves, rank) == losses(whole, rank)
        assert axes_left(whole, rank) == axes_left(whole)
        for name, value in head_state(whole, rank).items():
            assert torch.equal(head_state(halves, rank)[name], value), name
    assert (halves / "model.pt").read_bytes() == (whole / "model.pt").read_bytes()
    assert len(axes_left(whole)) == 6
    scale = torch.load(whole / "model.pt", weights_only=True)["6.weight"]
    assert scale.nonzero().flatten().tolist() == axes_left(whole)


@pytest.mark.trainer
def test_the_real_trainer_leaves_a_plain_network(
    arcface_torch: Path, faces: Faces, cache: Path, tmp_path: Path
) -> None:
    folder = checkout(arcface_torch, tmp_path / "arcface_torch", "current_stack", "cpu_gloo")
    output = tmp_path / "run"
    keys = host_settings(faces, output, num_epoch=2, batch_size=4, **distilling(cache))
    train(folder, write_config(folder, "tcs", keys, ATTACH), ranks=2)
    network = get_backbone("mbf", num_features=512).eval()
    network.load_state_dict(torch.load(output / "model.pt", weights_only=True), strict=True)
    with torch.no_grad():
        embeddings = network(torch.rand(4, 3, 112, 112))
    assert axes_left(output, 1) == axes_left(output)
    assert len(axes_left(output)) == 6
    assert embeddings.abs().sum(0).nonzero().flatten().tolist() == axes_left(output)

    missing = {**keys, **distilling(tmp_path / "none"), "output": str(tmp_path / "stopped")}
    run = launch(folder, write_config(folder, "stopped", missing, ATTACH))
    assert run.exit_code != 0
    assert f"--kd-cache {tmp_path / 'none'}" in run.printed
    assert not (tmp_path / "stopped" / "model.pt").exists()
