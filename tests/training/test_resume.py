"""A run that goes on with another product of ranks and batch: the schedule is counted in images."""

from pathlib import Path
from typing import Any

import pytest
import torch
from easydict import EasyDict

from arcface_kd.distillation.drop_ins import drop_ins
from arcface_kd.evaluation.report.scalars import read_scalars
from arcface_kd.training.resume import load_optimizer, resume
from arcface_kd.training.run import Run
from arcface_kd.training.trainer import train
from tests.host.trainer.faces import Faces, draw_faces
from tests.training.test_trainer import config_for


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Faces:
    return draw_faces(tmp_path_factory.mktemp("faces"), identities=10, images=8)


@pytest.fixture(scope="module")
def begun(faces: Faces, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two of four epochs, batch 16: ten of twenty steps."""
    folder = tmp_path_factory.mktemp("begun")

    class Stop(Exception):
        pass

    def stop(epoch: int) -> None:
        if epoch == 2:
            raise Stop

    with pytest.raises(Stop):
        train(config_for(faces, folder, **KEYS), on_epoch=stop)
    return folder


KEYS: dict[str, Any] = {"num_epoch": 4, "warmup_epoch": 1, "save_all_states": True, "val_targets": []}


def going_on(faces: Faces, begun: Path, output: Path, **keys: Any) -> EasyDict:
    output.mkdir()
    (output / "checkpoint_gpu_0.pt").write_bytes((begun / "checkpoint_gpu_0.pt").read_bytes())
    return config_for(faces, output, **KEYS, resume=True, **keys)


@pytest.mark.parametrize(("batch_size", "place", "total"), [(8, 20, 40), (32, 4, 8), (12, 12, 24), (16, 10, 20)])
def test_the_schedule_goes_on_at_the_same_image(
    faces: Faces, begun: Path, tmp_path: Path, batch_size: int, place: int, total: int
) -> None:
    config = going_on(faces, begun, tmp_path / "run", batch_size=batch_size)
    run = Run(config, drop_ins(lambda: config), 0, 0, 1)
    resume(run)
    assert (run.epoch, run.step) == (2, 10)
    assert run.schedule.last_epoch == place
    assert run.head.schedule_offset == place - 10
    assert run.last_step == 10 + total // 2
    # Half of the run: two thirds of what follows the warm-up are left.
    assert run.schedule.get_last_lr()[0] == pytest.approx(config.lr * 2 / 3)
    run.optimizer.step()
    run.schedule.step()
    assert run.schedule.get_last_lr()[0] == pytest.approx(config.lr * (total - place - 1) / (total * 3 / 4))


def test_the_log_says_so_and_a_further_part_goes_on_from_there(faces: Faces, begun: Path, tmp_path: Path) -> None:
    config = going_on(faces, begun, tmp_path / "run", batch_size=8)

    class Stop(Exception):
        pass

    def stop(epoch: int) -> None:
        raise Stop

    with pytest.raises(Stop):
        train(config, on_epoch=stop)
    said = "batch_size x ranks was 16 and is now 8: the schedule goes on after 160 images, at step 20 of 40"
    log = (tmp_path / "run" / "training.log").read_text()
    assert said in log
    result = train(config)
    assert result.steps == 10 + 20
    assert (tmp_path / "run" / "training.log").read_text().count(said) == 1
    rates = read_scalars(tmp_path / "run" / "tensorboard")["learning_rate"]
    assert rates.x.tolist() == list(range(11, 31))
    assert rates.y.tolist() == pytest.approx([config.lr * left / 30 for left in range(19, -1, -1)], abs=1e-6)


def test_a_checkpoint_of_before_the_product_was_kept_is_read(faces: Faces, begun: Path, tmp_path: Path) -> None:
    config = going_on(faces, begun, tmp_path / "run")
    path = tmp_path / "run" / "checkpoint_gpu_0.pt"
    state = torch.load(path, weights_only=True)
    del state["settings"]
    torch.save(state, path)
    assert train(config).steps == 20


@pytest.mark.parametrize("fused", [True, None])
def test_an_optimiser_keeps_the_kernels_of_its_device(fused: bool | None) -> None:
    """A fused one leaves overflows to its kernel, and a scaler that counts on that must meet no other."""
    saved, own = (
        torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1, momentum=0.9, fused=each)
        for each in (None if fused else True, fused)
    )
    saved.param_groups[0]["params"][0].grad = torch.ones(2)
    saved.step()
    load_optimizer(own, saved.state_dict())
    assert own.param_groups[0]["fused"] is fused
    (momentum,) = own.state.values()
    assert torch.equal(momentum["momentum_buffer"], torch.ones(2))
