"""Settings that must match on all ranks and on resume.

Ranks of different settings wait for each other in collectives of different sizes and end with a time-out or a crash in
the middle of a library. A run that goes on with another teacher, other images or another seed ends with numbers that no
uninterrupted run has.
"""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from arcface_kd.distributed.ranks import RankGroup
from arcface_kd.errors import CheckpointError, ConfigError

_LONGEST_VALUE = 80
_ABSENT = "none"

# A trainer's schedule counts steps: with another product of the two it would go on elsewhere.
IMAGES_A_STEP = "batch_size x ranks"


def require_agreement(settings: Mapping[str, Any], ranks: RankGroup) -> None:
    """Refuse ranks that were started differently; all ranks call, None and no value are the same."""
    of_ranks = ranks.gather_objects(_plain(settings))
    for rank, found in enumerate(of_ranks):
        if differing := _differences(of_ranks[0], found):
            told = "; ".join(f"{name} is {first} on rank 0 and {own} on rank {rank}" for name, first, own in differing)
            raise ConfigError(f"the ranks were started differently: {told}; start all of them alike")


def require_same_run(before: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Refuse to resume a run with changed settings."""
    if told := changes(before, settings):
        raise CheckpointError(
            f"cannot resume with changed settings: {'; '.join(told)}; set them back, or give another output"
        )


def changes(before: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """Lines about settings that differ; one that either side does not know is not compared."""
    now = {name: value for name, value in _plain(settings).items() if value is not None}
    then = {name: value for name, value in _plain(before).items() if value is not None and name in now}
    found = _differences(then, {name: now[name] for name in then})
    return [f"{name} was {first} and is now {second}" for name, first, second in found]


def as_tensor(settings: Mapping[str, Any]) -> Tensor:
    """Settings as a module's state keeps them, which holds tensors only: their JSON, (N,) uint8 on the CPU."""
    return torch.frombuffer(bytearray(json.dumps(_plain(settings)).encode()), dtype=torch.uint8)


def from_tensor(state: object) -> dict[str, Any]:
    """What :func:`as_tensor` has kept."""
    try:
        if not isinstance(state, Tensor):
            raise TypeError(type(state).__name__)
        found = json.loads(bytes(state.flatten().to(torch.uint8).tolist()))
        if not isinstance(found, dict):
            raise TypeError(type(found).__name__)
    # The JSON reader answers deep nesting with a RecursionError.
    except (TypeError, ValueError, RecursionError, RuntimeError) as error:
        raise CheckpointError(
            f"the checkpoint's head does not hold the run's settings ({type(error).__name__}): it is damaged"
        ) from None
    return found


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives it back: tuples become lists."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(settings), default=str))
    return plain


def _differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    names = [name for name in dict.fromkeys([*one, *other]) if one.get(name) != other.get(name)]
    return [(name, _shown(one.get(name)), _shown(other.get(name))) for name in names]


def _shown(value: Any) -> str:
    if value is None:
        return _ABSENT
    text = value if isinstance(value, str) else json.dumps(value)
    if len(text) == 64 and set(text) <= set("0123456789abcdef"):
        return f"{text[:8]}..."
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 3] + "..."
