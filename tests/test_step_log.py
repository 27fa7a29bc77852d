"""The distillation's scalars stand beside the trainer's and take nothing from them."""

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from arcface_kd.evaluation.scalars import read_scalars
from arcface_kd.step_log import StepLog


def test_the_trainers_scalars_survive(tmp_path: Path) -> None:
    log = StepLog(tmp_path, every=2, writes=True)
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


def test_a_rank_that_does_not_write_leaves_nothing(tmp_path: Path) -> None:
    StepLog(tmp_path, every=1, writes=False).write(1, {"ce": 1.0})
    assert list(tmp_path.iterdir()) == []
