"""A head's saved state: what is in it, and how it is fitted to a run's ranks and classes."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from arcface_kd.checkpoints.files import HEAD, OPTIMIZER, checkpoint_file
from arcface_kd.checkpoints.shards import class_range, open_shards
from arcface_kd.distributed.class_shard import ClassShard
from arcface_kd.errors import CheckpointError

# What an optimiser keeps for the rows of this rank's classes, by parameter and name.
Momentum = dict[nn.Parameter, dict[str, Tensor]]


def fit_head_state(
    state: Mapping[str, Any], shard: ClassShard, sharded: Iterable[str], folder: Path | None
) -> Mapping[str, Any]:
    """Turn the state of whichever rank into that of this one, reading other shards from ``folder``.

    ``sharded`` names the entries whose rows are classes. A state that is this rank's already is returned as it is.
    """
    if "class_range" not in state:
        raise CheckpointError(
            f"the checkpoint's head has {', '.join(state) or 'nothing'} and no class_range: it is not one of this "
            "package, so the run began without --kd; begin anew, in another output folder, from its student if you "
            "like: --kd-option student.init=RUN/model.pt"
        )
    wanted = shard.range
    given = class_range(state, "the checkpoint's head")
    if given[2] != shard.num_classes:
        raise CheckpointError(f"the checkpoint's head has {given[2]} classes, the run {shard.num_classes}")
    if folder is None or not checkpoint_file(folder, 0).is_file():
        if given == wanted:
            return state
        raise CheckpointError(
            f"the checkpoint's head holds classes {given[0]} to {given[1] - 1}, this rank takes {wanted[0]} to "
            f"{wanted[1] - 1}, and the other ranks' checkpoints are not there: {folder or 'no run folder is known'}"
        )
    shards = open_shards(folder)
    met, known = state.get("step"), shards.checkpoints[0][HEAD].get("step")
    if met is not None and known is not None and int(met) != int(known):
        raise CheckpointError(
            f"the head's state is of step {int(met)}, those in {folder} of step {int(known)}: remove the "
            f"checkpoint_gpu_*.pt of ranks from {shards.world_size} on, which an earlier run has left"
        )
    if given == wanted and shards.world_size == shard.world_size:
        return state
    own = {name: shards.rows(wanted[0], wanted[1], HEAD, name) for name in sharded}
    return {**state, **own, "class_range": torch.tensor(wanted)}


def require_same_entries(state: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Refuse the state of a head with other methods."""
    has, wants = set(state), set(own)
    if has != wants:
        raise CheckpointError(
            f"the checkpoint's head lacks {', '.join(sorted(wants - has)) or 'nothing'} and has "
            f"{', '.join(sorted(has - wants)) or 'nothing'} beside: go on with the kd* keys that the run began with"
        )


def reshard_momentum(
    parameters: Sequence[nn.Parameter], sharded: Sequence[nn.Parameter], shard: ClassShard, folder: Path
) -> Momentum:
    """Read the momentum of this rank's classes from a run that was saved by another number of ranks.

    A trainer loads the optimiser's state after the head's, into an optimiser that the head never sees. So the rows are
    read now, while the run's checkpoints are what they were; :func:`place_momentum` puts them in place of those that
    were loaded. ``parameters`` are the head's, in order, the last ones of the optimiser; ``sharded`` those among them
    whose rows are this rank's classes.
    """
    if not parameters:
        return {}
    shards = open_shards(folder)
    saved = shards.checkpoints[0].get(OPTIMIZER)
    if not isinstance(saved, Mapping):
        return {}
    places = [place for group in saved["param_groups"] for place in group["params"]][-len(parameters) :]
    found: Momentum = {}
    for parameter, place in zip(parameters, places, strict=True):
        if any(parameter is one for one in sharded):
            # An optimiser keeps nothing for a parameter that has had no gradient yet.
            entries = saved["state"].get(place, {})
            found[parameter] = {
                name: shards.rows(shard.start, shard.start + shard.size, OPTIMIZER, "state", place, name)
                for name, value in entries.items()
                if isinstance(value, Tensor) and value.ndim == parameter.ndim
            }
    return found


def place_momentum(optimizer: torch.optim.Optimizer, momentum: Momentum) -> None:
    """Put rows in place of what an optimiser has loaded for the same parameters, and forget them."""
    if not momentum:
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            loaded = optimizer.state.get(parameter, {})
            for name, rows in momentum.pop(parameter, {}).items():
                if isinstance(loaded.get(name), Tensor):
                    loaded[name] = rows.to(loaded[name])
