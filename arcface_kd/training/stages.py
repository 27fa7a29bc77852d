"""Train a config with the compact trainer: one run, or all runs of a recipe one after the other."""

from collections.abc import Callable

from easydict import EasyDict

from arcface_kd.distributed.process_group import process_group
from arcface_kd.methods.recipe import Stage, all_done, recipe_of
from arcface_kd.training.trainer import TrainResult, train


def train_stages(
    config: EasyDict,
    on_stage: Callable[[Stage], None] | None = None,
    on_epoch: Callable[[int], None] | None = None,
) -> TrainResult:
    """Train what a config asks for; started again, it resumes where it stood. The last run's result.

    ``on_stage`` is called on every rank before each run of a recipe, ``on_epoch`` with the number of a run's epochs
    that are done, after their files are written.
    """
    recipe = recipe_of(config)
    if recipe is None:
        return train(config, on_epoch=on_epoch)
    result: TrainResult | None = None
    # One process group for all runs: the ranks meet in it between them.
    with process_group():
        while (stage := recipe.next_run(config)) is not None:
            if on_stage is not None:
                on_stage(stage)
            settings = EasyDict({**config, **stage.changes})
            result = train(settings, title=f"run {stage.number}/{stage.runs}", on_epoch=on_epoch)
    if result is None:
        raise all_done(config)
    return result
