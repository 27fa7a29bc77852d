"""What long runs may want: a cosine in place of the line, and the moving average of the student's weights."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from arcface_kd.distillation.drop_ins import drop_ins
from arcface_kd.training.resume import resume
from arcface_kd.training.run import MovingAverage, Run
from arcface_kd.training.schedule import decay_with_warmup
from arcface_kd.training.trainer import train
from tests.host.trainer.faces import Faces
from tests.training.runs import config_for, same_weights, saved, train_until


def test_the_cosine_has_the_line_s_warm_up_middle_and_end() -> None:
    rates: dict[str, list[float]] = {}
    for decay in ("linear", "cosine"):
        optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
        schedule = decay_with_warmup(optimizer, 4, 12, decay)
        rates[decay] = []
        for _ in range(14):
            rates[decay].append(float(schedule.get_last_lr()[0]))
            optimizer.step()
            schedule.step()
    line, cosine = rates["linear"], rates["cosine"]
    assert line[:5] == cosine[:5]
    assert cosine[6] > line[6]
    assert cosine[8] == pytest.approx(line[8])
    assert cosine[10] < line[10]
    assert cosine[12:] == line[12:] == [0, 0]


def _naive(states: list[dict[str, Tensor]], decay: float, name: str) -> Tensor:
    average = states[0][name]
    for state in states[1:]:
        average = decay * average + (1 - decay) * state[name]
    return average


def test_the_average_is_what_is_judged_and_written_and_goes_on_when_resumed(faces: Faces, tmp_path: Path) -> None:
    keys = {"num_epoch": 2, "val_targets": [], "save_all_states": True, "ema": 0.8, "lr_decay": "cosine"}
    config = config_for(faces, tmp_path / "steps", **keys)
    run = Run(config, drop_ins(lambda: config), 0, 0, 1)
    run.backbone.train()
    states = []
    for images, labels in run.loader:
        run._train_step(images, labels)
        states.append({name: value.clone() for name, value in run.student.state_dict().items()})
    for name, value in run.judged.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, _naive(states, 0.8, name), msg=name)
    whole = train(config_for(faces, tmp_path / "whole", **keys))
    assert same_weights(whole.student.state_dict(), saved(tmp_path / "whole"))
    assert not same_weights(
        saved(tmp_path / "whole"), saved(tmp_path / "whole", "checkpoint_gpu_0.pt")["state_dict_backbone"]
    )
    train_until(1, config_for(faces, tmp_path / "half", **keys))
    train(config_for(faces, tmp_path / "half", **keys, resume=True))
    assert same_weights(saved(tmp_path / "half"), saved(tmp_path / "whole"))


def test_a_run_that_had_ended_without_an_average_is_judged_by_its_student(faces: Faces, tmp_path: Path) -> None:
    keys = {"num_epoch": 1, "val_targets": [], "save_all_states": True}
    train(config_for(faces, tmp_path, **keys))
    again = train(config_for(faces, tmp_path, **keys, ema=0.9, resume=True))
    assert same_weights(again.student.state_dict(), saved(tmp_path))


def test_a_run_that_is_made_longer_has_its_new_rate_from_the_first_step_on(faces: Faces, tmp_path: Path) -> None:
    keys = {"val_targets": [], "save_all_states": True}
    train(config_for(faces, tmp_path, **keys, num_epoch=1))
    config = config_for(faces, tmp_path, **keys, num_epoch=3, lr_decay="cosine")
    run = Run(config, drop_ins(lambda: config), 0, 0, 1)
    resume(run)
    # A third of the run is behind it: 0.1 (1 + cos(pi / 3)) / 2.
    assert [group["lr"] for group in run.optimizer.param_groups] == pytest.approx([0.075, 0.075])


def test_what_is_not_trained_is_not_averaged() -> None:
    """As the axes that tcs drops, whose scale it sets to 0."""
    student = nn.BatchNorm1d(3)
    student.weight.requires_grad_(False)
    average = MovingAverage(student, 0.5)
    average.update_parameters(student)
    with torch.no_grad():
        student.weight.copy_(torch.tensor([1.0, 0.0, 2.0]))
        student.bias.add_(1)
    average.update_parameters(student)
    met = average.module.state_dict()
    assert met["weight"].tolist() == [1, 0, 2]
    assert met["bias"].tolist() == [0.5] * 3


def test_an_average_copies_nothing_to_the_device_in_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the number of steps, as torch's own update makes one, waits for a GPU."""
    layer = nn.Linear(3, 4)
    student = nn.Sequential(layer, nn.BatchNorm1d(4))
    average = MovingAverage(student, 0.5)
    before = [value.clone() for value in student.state_dict().values()]

    def copied(*arguments: object, **keywords: object) -> None:
        raise AssertionError("a copy")

    monkeypatch.setattr(Tensor, "to", copied)
    average.update_parameters(student)
    student(torch.randn(5, 3))
    with torch.no_grad():
        layer.weight.add_(1)
    average.update_parameters(student)
    for old, new, met in zip(before, student.state_dict().values(), average.module.state_dict().values(), strict=True):
        assert torch.allclose(met, (old + new) / 2 if new.is_floating_point() else new)
