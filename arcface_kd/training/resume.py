"""Save a run's checkpoint, and resume from it."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from arcface_kd.checkpoints.files import checkpoint_file, finish_saving, save_checkpoint
from arcface_kd.checkpoints.run_settings import IMAGES_A_STEP, changes, require_same_run
from arcface_kd.checkpoints.shards import open_shards
from arcface_kd.checkpoints.tensor_file import save_tensors
from arcface_kd.distributed.ranks import on_first_rank_first
from arcface_kd.errors import ArcfaceKDError, CheckpointError, ConfigError, first_line
from arcface_kd.system.memory import out_of_memory_message
from arcface_kd.training.run import Run

# The optimizer's state brings them along, so that a changed config would have no effect.
_MUST_MATCH = ("lr", "momentum", "weight_decay")

# These may change on resume; the log says so.
_MAY_CHANGE = ("batch_size", "gradient_acc", "fp16", "num_image", "num_epoch", "warmup_epoch", "lr_decay", "ema")


def save(run: Run) -> None:
    """Write the host's files: this rank's checkpoint where the config wants it, and the student on rank 0."""
    run.head.monitor.settle()
    if run.writer is not None:
        # A resumed run begins after the last saved step: what came before must be in the log.
        run.writer.flush()
    if run.rank == 0:
        # Before the checkpoints: where they say that an epoch is done, its student is there.
        save_tensors(run.folder / "model.pt", run.judged.state_dict())
    if run.config.save_all_states:
        save_checkpoint(run.folder, _state(run), run.ranks)


def _state(run: Run) -> dict[str, Any]:
    settings = {key: run.config.get(key) for key in (*_MUST_MATCH, *_MAY_CHANGE)}
    state = {
        "epoch": run.epoch,
        "global_step": run.step,
        "state_dict_backbone": run.student.state_dict(),
        "state_dict_softmax_fc": run.head.state_dict(),
        "state_optimizer": run.optimizer.state_dict(),
        "state_lr_scheduler": run.schedule.state_dict(),
        "state_scaler": run.scaler.state_dict(),
        "state_random": torch.get_rng_state(),
        "settings": {**settings, IMAGES_A_STEP: run.images_a_step},
    }
    if run.average is not None:
        state["state_average"] = run.average.state_dict()
    if run.step % run.config.gradient_acc:
        # An epoch may end between two steps of the optimizer.
        state["state_gradients"] = [p.grad for group in run.optimizer.param_groups for p in group["params"]]
    return state


def resume(run: Run) -> None:
    """Resume after the last saved epoch; ranks and batch size may differ from before."""
    # First, since a kill may have left even rank 0's file under its waiting name.
    on_first_rank_first(lambda: finish_saving(run.folder), run.ranks)
    path = checkpoint_file(run.folder, 0)
    if not path.is_file():
        raise ConfigError(f"resume is on but there is no {path}; set resume=False, or save_all_states=True before")
    # All but the class shards is the same in every file; a new rank takes the first one's.
    saved_by = open_shards(run.folder).world_size
    if run.rank < saved_by:
        path = checkpoint_file(run.folder, run.rank)
    state = torch.load(path, map_location=run.device, weights_only=True)
    with _named_damage(path):
        _check_state(run, path, state)
        before = state.get("settings", {})
        require_same_run(before, {key: run.config[key] for key in _MUST_MATCH})
        run.epoch, run.step = state["epoch"], state["global_step"]
        run.first_step = run.step
        run.student.load_state_dict(state["state_dict_backbone"])
        if run.average is not None and "state_average" in state:
            run.average.load_state_dict(state["state_average"])
        elif run.average is not None:
            # Off until now, it begins with the next step; a run that has ended has none.
            run.average.module.load_state_dict(run.student.state_dict())
        run.head.load_state_dict(state["state_dict_softmax_fc"])
        load_optimizer(run.optimizer, state["state_optimizer"])
        run.logger.info("resumed after epoch %d, step %d", run.epoch, run.step)
        _load_schedule(run, state["state_lr_scheduler"], before)
        # Off, as on a CPU, it has no state.
        if state.get("state_scaler"):
            run.scaler.load_state_dict(state["state_scaler"])
        if "state_random" in state:
            torch.set_rng_state(state["state_random"].cpu())
        if saved_by == run.world_size:
            parameters = [p for group in run.optimizer.param_groups for p in group["params"]]
            for parameter, gradient in zip(parameters, state.get("state_gradients", ()), strict=False):
                parameter.grad = gradient
    now = {key: run.config.get(key) for key in _MAY_CHANGE}
    for change in changes({**before, "ranks": saved_by}, {**now, "ranks": run.world_size}):
        run.logger.info(change)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load an optimiser's state, but for its kernels and memory formats: they are those of the run as it is now."""
    fused = [group.get("fused") for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, own in zip(optimizer.param_groups, fused, strict=True):
        group["fused"] = own
    # Fused kernels go through the memory of parameter and momentum as it lies; the host's is not channels_last.
    for parameter, entries in optimizer.state.items():
        for name, value in entries.items():
            if (
                isinstance(value, torch.Tensor)
                and value.shape == parameter.shape
                and value.stride() != parameter.stride()
            ):
                entries[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _load_schedule(run: Run, state: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    """Load the schedule at the same image, whatever the batch size and the number of ranks are now."""
    done, then = state["last_epoch"], before.get(IMAGES_A_STEP, run.images_a_step)
    place = done
    if then != run.images_a_step:
        # Measured in epochs, since an epoch drops its last batch when that is not full.
        place = round(done * run.steps_per_epoch / max(1, before.get("num_image", run.config.num_image) // then))
        run.logger.info(
            "%s was %d and is now %d: the schedule goes on after %d images, at step %d of %d",
            *(IMAGES_A_STEP, then, run.images_a_step, done * then, place, run.steps_per_epoch * run.config.num_epoch),
        )
    run.schedule.load_state_dict({**state, "last_epoch": place})
    # The optimizer has brought the rate of the run as it was, which may have ended here or gone down otherwise.
    schedule = zip(run.optimizer.param_groups, run.schedule.base_lrs, run.schedule.lr_lambdas, strict=True)
    for group, rate, share in schedule:
        group["lr"] = rate * share(place)
    run.head.schedule_offset = place - run.step


@contextlib.contextmanager
def _named_damage(path: Path) -> Iterator[None]:
    """Name a checkpoint whose entries a run cannot load."""
    try:
        yield
    except (ArcfaceKDError, torch.OutOfMemoryError):
        raise
    # What torch's optimizers, schedules and generators raise.
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if out_of_memory_message(error, "") is not None:
            raise
        raise CheckpointError(
            f"{path} cannot be resumed from: {type(error).__name__} {first_line(error)}; it is damaged, or of another "
            "trainer"
        ) from error


def _check_state(run: Run, path: Path, state: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of another network or optimizer before anything of it is loaded."""
    parts = ("epoch", "global_step", "state_dict_backbone", "state_optimizer", "state_lr_scheduler")
    missing = [name for name in parts if name not in state]
    if missing:
        raise CheckpointError(f"{path} holds no {', '.join(missing)}: it cannot be resumed from")
    met, own = state["state_dict_backbone"], run.student.state_dict()
    other = [
        name for name in {**met, **own} if name not in met or name not in own or met[name].shape != own[name].shape
    ]
    if other:
        raise CheckpointError(
            f"{path} is of another student than {run.config.network} of {run.config.embedding_size} dimensions, "
            f"see {other[0]}: set network and embedding_size as the run began, or another output"
        )
    if ("momentum" in state["state_optimizer"]["param_groups"][0]) != (run.config.optimizer == "sgd"):
        raise CheckpointError(
            f"{path} was left by another optimizer than {run.config.optimizer}: set optimizer as the run began, or "
            "another output"
        )
