"""One command for a method of several runs: all of them one after the other, here or in arcface_torch."""

from collections.abc import Callable

from easydict import EasyDict

from arcface_kd.distributed.process_group import process_group
from arcface_kd.errors import ConfigError
from arcface_kd.methods.shkd.stages import MOST_RUNS, Stage, next_stage
from arcface_kd.training.trainer import TrainResult, train


def train_stages(
    config: EasyDict,
    on_stage: Callable[[Stage], None] | None = None,
    on_epoch: Callable[[int], None] | None = None,
) -> TrainResult:
    """Train all runs of a method that takes several, with the compact trainer.

    Args:
        config: a merged arcface_torch config with ``kd`` = ``shkd``.
        on_stage: called on every rank before each run.
        on_epoch: called on every rank with the number of a run's epochs that are done, after their files are written.

    Returns:
        The last run's result.

    Raises:
        ConfigError: a bad key, or all runs are done.
        TeacherError: a teacher that is missing or does not fit.
        DataError: records that cannot be read.
    """
    result: TrainResult | None = None
    # One process group for all runs: the ranks meet in it between them.
    with process_group():
        while (stage := next_stage(config)) is not None:
            if on_stage is not None:
                on_stage(stage)
            result = train(
                EasyDict({**config, **stage.changes}), title=f"run {stage.number}/{MOST_RUNS}", on_epoch=on_epoch
            )
    if result is None:
        raise ConfigError(f"all three runs are done, see {config['output']}; give another output to begin anew")
    return result
