"""The distillation's scalars stand beside the trainer's and take nothing from them; wandb and the log have them too."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from arcface_kd.distillation.tensorboard_log import TensorBoardLog
from arcface_kd.evaluation.report.scalars import read_scalars


def test_the_trainers_scalars_survive(tmp_path: Path) -> None:
    log = TensorBoardLog(tmp_path, every=2, writes=True)
    with SummaryWriter(log_dir=str(tmp_path)) as trainer:
        for step in range(1, 9):
            trainer.add_scalar("loss", float(step), step)
            if log.due(step):
                log.write(step, {"ce": 0.5 * step})
    assert read_scalars(tmp_path)["kd/ce"].x.tolist() == [2, 4, 6, 8]
    assert read_scalars(tmp_path)["kd/ce"].y.tolist() == [1, 2, 3, 4]
    # As TensorBoard itself reads the folder, all files of it in one go.
    shown = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in shown.Scalars("loss")] == list(range(1, 9))


def test_a_rank_that_does_not_write_leaves_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    TensorBoardLog(tmp_path, every=1, writes=False).write(1, {"ce": 1.0})
    assert list(tmp_path.iterdir()) == []
    assert caplog.messages == []


def test_the_log_has_a_line_of_terms_and_observations(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    values = {"ce": 12.25, "kd/binary_kd": 0.5, "gradient_norm/ce": 3.0, "gradient_share/ce": 0.75, "alpha_mean": 0.1}
    TensorBoardLog(tmp_path, every=1, writes=True).write(7, values)
    assert caplog.messages == ["kd: ce 12.2500   kd/binary_kd 0.5000   alpha_mean 0.1000   Global Step: 7"]
    assert read_scalars(tmp_path)["kd/gradient_share/ce"].y.tolist() == [0.75]


def test_event_files_are_opened_late_enough_for_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``wandb.init(sync_tensorboard=True)`` puts a class of its own in the place of this one and hears of new files."""
    import torch.utils.tensorboard.writer as torch_writer

    heard: list[str] = []

    class Listening(torch_writer.EventFileWriter):
        def __init__(self, logdir: str, *arguments: object, **options: object) -> None:
            heard.append(logdir)
            super().__init__(logdir, *arguments, **options)

    log = TensorBoardLog(tmp_path / "tensorboard", every=1, writes=True)
    monkeypatch.setattr(torch_writer, "EventFileWriter", Listening)
    log.write(1, {"ce": 1.0})
    assert heard == [str(tmp_path / "tensorboard")]


_WANDB_RUN = """
import sys
import wandb
from arcface_kd.distillation.tensorboard_log import TensorBoardLog

folder = sys.argv[1]
log = TensorBoardLog(folder + "/tensorboard", 2, True)
run = wandb.init(project="p", sync_tensorboard=True, dir=folder)
for step in range(1, 9):
    if log.due(step):
        log.write(step, {"ce": 0.5 * step, "gradient_share/ce": 1.0})
    run.log({"Loss/Step Loss": 1.0, "Process/Step": step})
run.finish()
"""


@pytest.mark.slow
def test_wandb_itself_gets_the_terms(tmp_path: Path) -> None:
    """As the host calls it with ``using_wandb``, without a network."""
    pytest.importorskip("wandb", reason="wandb is not installed: pip install wandb")
    subprocess.run(
        [sys.executable, "-c", _WANDB_RUN, str(tmp_path)],
        check=True,
        env={**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true"},
        timeout=600,
    )
    (kept,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    content = kept.read_bytes()
    for name in (b"kd/ce", b"kd/gradient_share/ce", b"Loss/Step Loss"):
        assert content.count(name) >= 4, name
