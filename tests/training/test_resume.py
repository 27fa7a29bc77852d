"""Resuming: to the same bits, with other settings, with another product of ranks and batch size."""

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from easydict import EasyDict

from arcface_kd.checkpoints.shards import merge_head
from arcface_kd.cli.main import main
from arcface_kd.distillation.drop_ins import drop_ins
from arcface_kd.errors import ArcfaceKDError, CheckpointError
from arcface_kd.evaluation.report.scalars import read_scalars
from arcface_kd.training.resume import load_optimizer, resume
from arcface_kd.training.run import Run
from arcface_kd.training.trainer import train
from tests.forked import start_ranks, wait
from tests.host.trainer.faces import Faces, draw_faces
from tests.training.runs import config_file, config_for, loss_trace, same_weights, saved, train_until


@pytest.fixture(scope="module")
def begun(faces: Faces, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two of four epochs, batch 16: ten of twenty steps."""
    folder = tmp_path_factory.mktemp("begun")
    train_until(2, config_for(faces, folder, **KEYS))
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
    train_until(3, config)
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


def test_the_momentum_of_a_run_of_the_host_lies_as_the_parameters_do() -> None:
    weight, gradient = torch.randn(2, 8, 4, 3, 3).unbind()
    saved, own = (
        torch.optim.SGD([torch.nn.Parameter(each)], lr=0.1, momentum=0.9, fused=True)
        for each in (weight.clone(), weight.to(memory_format=torch.channels_last))
    )
    parameters = [optimizer.param_groups[0]["params"][0] for optimizer in (saved, own)]
    parameters[0].grad = gradient.clone()
    saved.step()
    load_optimizer(own, saved.state_dict())
    with torch.no_grad():
        parameters[1].copy_(parameters[0])
    parameters[1].grad = gradient.to(memory_format=torch.channels_last)
    for optimizer in (saved, own):
        optimizer.step()
    torch.testing.assert_close(parameters[1], parameters[0])


def test_a_resumed_run_gives_the_same_bits(faces: Faces, teacher_file: Path, tmp_path: Path) -> None:
    keys: dict[str, Any] = {
        "kd": "adadistill",
        "kd_teacher": str(teacher_file),
        # With statistics of its own and a weight that rises.
        "kd_option": {"head.margin": "adaface", "adadistill.geometry": 3.0},
        "num_epoch": 4,
        "save_all_states": True,
    }
    train(config_for(faces, tmp_path / "whole", **keys))
    train_until(2, config_for(faces, tmp_path / "parts", **keys))
    train(config_for(faces, tmp_path / "parts", resume=True, **keys))
    assert loss_trace(tmp_path / "parts") == loss_trace(tmp_path / "whole")
    assert same_weights(saved(tmp_path / "parts"), saved(tmp_path / "whole"))
    heads = [saved(tmp_path / name, "checkpoint_gpu_0.pt")["state_dict_softmax_fc"] for name in ("parts", "whole")]
    assert same_weights(*heads)


@pytest.fixture
def ended(faces: Faces, tmp_path: Path) -> dict[str, Any]:
    """A run of one epoch; the keys that take it up for another."""
    keys = {"num_epoch": 1, "save_all_states": True, "val_targets": []}
    train(config_for(faces, tmp_path, **keys))
    return {**keys, "resume": True, "num_epoch": 2}


def test_only_a_run_of_the_same_settings_is_gone_on_with(faces: Faces, ended: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "others").mkdir()
    others = draw_faces(tmp_path / "others", identities=faces.num_classes, images=8, seed=9)
    for change, said in (
        ({"batch_size": 1, "network": "thin_r10"}, "batch_size is 1, and thin_r10 normalises"),
        ({"network": "mbf"}, "of another student than mbf of 32 dimensions"),
        ({"embedding_size": 16}, "of another student than .*tiny of 16 dimensions"),
        ({"optimizer": "adamw"}, "left by another optimizer than adamw"),
        ({"kd": "nosuch"}, "no method named 'nosuch'"),
        # What the optimiser's state brings along, so that the config's would have no effect.
        (
            {"lr": 0.5, "weight_decay": 0.1},
            r"changed settings: lr was \S+ and is now 0.5; weight_decay was 0.0005 and is now 0.1",
        ),
        ({"seed": 7}, "changed settings: seed was 2048 and is now 7; set them back, or give another output"),
        ({"margin_list": (1.0, 0.25, 0.0)}, "m2 was 0.5 and is now 0.25"),
        ({"rec": str(others.folder)}, r"data was \w{8}... and is now \w{8}..."),
    ):
        with pytest.raises(ArcfaceKDError, match=said) as error:
            train(config_for(faces, tmp_path, **ended, **change))
        assert "\n" not in str(error.value)
    state = saved(tmp_path, "checkpoint_gpu_0.pt")
    torch.save({name: value for name, value in state.items() if name != "epoch"}, tmp_path / "checkpoint_gpu_0.pt")
    with pytest.raises(CheckpointError, match="holds no epoch"):
        train(config_for(faces, tmp_path, **ended))


def test_a_first_saving_that_was_cut_short_is_gone_on_with(faces: Faces, ended: dict[str, Any], tmp_path: Path) -> None:
    """Killed between two ranks' renames: rank 1's file is in place, rank 0's own waits."""
    own = tmp_path / "checkpoint_gpu_0.pt"
    shutil.copy(own, tmp_path / "checkpoint_gpu_1.pt")
    own.rename(own.with_suffix(".pt.next"))
    assert train(config_for(faces, tmp_path, **ended, gradient_acc=2)).steps == 2 * (faces.num_image // 16)
    told = (tmp_path / "training.log").read_text()
    assert "-gradient_acc was 1 and is now 2\n" in told
    assert "-num_epoch was 1 and is now 2\n" in told


def test_a_checkpoint_whose_entries_are_something_else_is_named(
    faces: Faces, ended: dict[str, Any], tmp_path: Path
) -> None:
    good = saved(tmp_path, "checkpoint_gpu_0.pt")
    optimizer = good["state_optimizer"]
    damages: list[dict[str, Any]] = [
        {"state_optimizer": {**optimizer, "param_groups": optimizer["param_groups"][:1]}},
        {"state_random": [1]},
        {"settings": [1]},
    ]
    for entries in damages:
        torch.save({**good, **entries}, tmp_path / "checkpoint_gpu_0.pt")
        with pytest.raises(CheckpointError, match=r"checkpoint_gpu_0\.pt cannot be resumed from: ") as caught:
            train(config_for(faces, tmp_path, **ended))
        assert "\n" not in str(caught.value)


def test_a_run_begun_without_a_loss_scale_goes_on_with_one(
    faces: Faces, ended: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rehearsed on a CPU, resumed on a GPU in fp16."""
    assert saved(tmp_path, "checkpoint_gpu_0.pt")["state_scaler"] == {}
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    monkeypatch.setattr("torch.amp.GradScaler", lambda *_, **__: scaler)
    assert train(config_for(faces, tmp_path, **ended)).steps == 2 * (faces.num_image // 16)
    assert scaler.get_scale() == 64.0


def _train_strictly(words: list[str]) -> int:
    """Of a warning in a rank's own process pytest knows nothing."""
    warnings.simplefilter("error", FutureWarning)
    return main(words)


@pytest.mark.slow
def test_two_ranks_agree_and_one_goes_on(faces: Faces, teacher_file: Path, tmp_path: Path) -> None:
    keys = {"kd": "adadistill", "kd_teacher": str(teacher_file), "save_all_states": True, "batch_size": 8}
    config = config_file(faces, tmp_path / "run", **keys, num_epoch=1)
    assert wait(start_ranks(2, _train_strictly, ["train", str(config)], logs=tmp_path), 600) == [0, 0]
    both = [saved(tmp_path / "run", f"checkpoint_gpu_{rank}.pt") for rank in (0, 1)]
    assert same_weights(
        *({key: value for key, value in state["state_dict_backbone"].items() if "running" not in key} for state in both)
    )
    ranges = [state["state_dict_softmax_fc"]["class_range"].tolist() for state in both]
    assert ranges == [[0, 5, 10], [5, 10, 10]]
    assert len(loss_trace(tmp_path / "run")) == 40 // 8
    # One rank takes up what two have left, and their shards make its centers.
    assert merge_head(tmp_path / "run", tmp_path / "head.pt") == (10, 32)
    assert train(config_for(faces, tmp_path / "run", **keys, num_epoch=2, resume=True)).steps == 5 + 80 // 8
    log = (tmp_path / "run" / "training.log").read_text()
    assert "x ranks was 16 and is now 8: the schedule goes on after 80 images, at step 10 of 20" in log
    alone = saved(tmp_path / "run", "checkpoint_gpu_0.pt")["state_dict_softmax_fc"]
    assert alone["class_range"].tolist() == [0, 10, 10]
    assert alone["step"] == 5 + 80 // 8
    before = torch.load(tmp_path / "head.pt", weights_only=True)["weight"]
    after = alone["methods.adadistill.centers.weight"]
    assert (torch.nn.functional.cosine_similarity(before, after) > 0.8).all()
