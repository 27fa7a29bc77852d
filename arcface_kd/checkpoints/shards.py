"""The head's state across numbers of ranks: a run's shards read as one, cut anew, or joined into a file.

Every rank of a run writes ``checkpoint_gpu_RANK.pt`` with its own classes. Files are mapped into memory and only the
rows that are asked for are read, so that a rank needs no more memory than its own shard takes.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arcface_kd.checkpoints.files import HEAD, checkpoint_file, checkpoints_in_force, read_checkpoint
from arcface_kd.checkpoints.run_settings import from_tensor
from arcface_kd.checkpoints.tensor_file import save_tensors
from arcface_kd.distributed.class_shard import ClassShard
from arcface_kd.errors import CheckpointError

# Where torch puts what a module's `get_extra_state` gives, and what in it names the entry with the class centers.
SETTINGS = "_extra_state"
CLASS_CENTERS = "class_centers"
# How that entry ends in states of before its name was in them.
_ENDINGS = (".classifier.weight", ".centers.weight")
# What arcface_torch's own PartialFC calls its shard; it does not save which classes they are.
_HOST_WEIGHT = "weight"


@dataclass(frozen=True)
class RunShards:
    """The checkpoints of a run's ranks, whose shards follow one another."""

    folder: Path  # the run's output folder
    checkpoints: tuple[Mapping[str, Any], ...]  # one of each rank, in order
    edges: tuple[int, ...]  # the first class of each rank, and the number of classes at the end

    @property
    def world_size(self) -> int:
        """Ranks that wrote the checkpoints."""
        return len(self.checkpoints)

    @property
    def num_classes(self) -> int:
        """Classes of all shards."""
        return self.edges[-1]

    def class_centers(self, start: int, stop: int) -> Tensor:
        """Some class centers that the student was scored against, as they were trained, a copy."""
        name = _classifier_entry(self.checkpoints[0][HEAD])
        centers = self.rows(start, stop, HEAD, name)
        if centers.ndim != 2 or not centers.is_floating_point():
            raise CheckpointError(
                f"{self.folder} holds {tuple(centers.shape)} of {centers.dtype} as {name}; wanted class centers "
                "(classes, dimension) in floating point"
            )
        return centers

    def rows(self, start: int, stop: int, *keys: Any) -> Tensor:
        """Rows of a tensor that is split over the ranks, a copy; ``keys`` lead to it in every checkpoint."""
        result: Tensor | None = None
        for rank, first in enumerate(self.edges[:-1]):
            last = self.edges[rank + 1]
            begin, end = max(start, first), min(stop, last)
            if begin >= end:
                continue
            part = self._shard(rank, last - first, keys)
            if result is None:
                result = part.new_empty((stop - start, *part.shape[1:]))
            if part.shape[1:] != result.shape[1:] or part.dtype != result.dtype:
                raise CheckpointError(
                    f"{checkpoint_file(self.folder, rank)} holds {tuple(part.shape)} of {part.dtype} where other ranks "
                    f"have rows of {tuple(result.shape[1:])} of {result.dtype}: it belongs to another run"
                )
            result[begin - start : end - start] = part[begin - first : end - first]
        if result is None:
            raise CheckpointError(f"{self.folder} holds none of the classes {start} to {stop - 1}")
        return result

    def _shard(self, rank: int, size: int, keys: tuple[Any, ...]) -> Tensor:
        value: Any = self.checkpoints[rank]
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        path = checkpoint_file(self.folder, rank)
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{path} holds no {'.'.join(map(str, keys))}, which other ranks have")
        if value.shape[:1] != (size,):
            raise CheckpointError(
                f"{path} holds {tuple(value.shape)} as {'.'.join(map(str, keys))} for {size} classes: it is damaged"
            )
        return value


def open_shards(folder: str | os.PathLike[str]) -> RunShards:
    """Open the checkpoints of a run: as many, from rank 0 on, as it takes to cover all classes.

    Files of higher ranks, which an earlier run on more ranks has left, are not looked at. arcface_torch's own PartialFC
    does not save how many classes there are: of its checkpoints, all must belong together.
    """
    folder = Path(folder)
    files = checkpoints_in_force(folder)
    first = read_checkpoint(files.get(0, checkpoint_file(folder, 0)))
    return _own_shards(folder, files, first) if "class_range" in first[HEAD] else _host_shards(folder, files, first)


def _own_shards(folder: Path, files: Mapping[int, Path], first: Mapping[str, Any]) -> RunShards:
    checkpoints, edges = [first], [0]
    num_classes = class_range(first[HEAD], checkpoint_file(folder, 0))[2]
    if not num_classes:
        # Every rank has saved the same; a file of another step is of an earlier run on more ranks.
        saved = [read_checkpoint(files[rank]) for rank in sorted(files)]
        own = tuple(each for each in saved if each.get("global_step") == first.get("global_step"))
        return RunShards(folder, own, (0,) * (len(own) + 1))
    while True:
        rank = len(checkpoints) - 1
        path, checkpoint = checkpoint_file(folder, rank), checkpoints[-1]
        met = checkpoint[HEAD].get("class_range")
        start, stop, total = (-1, -1, -1) if met is None else class_range(checkpoint[HEAD], path)
        if total != num_classes or start != edges[-1] or not start < stop <= num_classes:
            says = "no class_range" if met is None else f"classes {start} to {stop - 1} of {total}"
            raise CheckpointError(
                f"{path} holds {says}; wanted classes from {edges[-1]} on, of {num_classes}, as the lower ranks' files "
                "leave them: it belongs to another run"
            )
        _check_step(folder, rank, checkpoint, first)
        edges.append(stop)
        if stop == num_classes:
            return RunShards(folder, tuple(checkpoints), tuple(edges))
        checkpoints.append(read_checkpoint(files.get(rank + 1, checkpoint_file(folder, rank + 1))))


def class_range(head: Mapping[str, Any], where: object) -> list[int]:
    """A shard's first class, the one behind its last, and the number of all."""
    met = head["class_range"]
    if not isinstance(met, Tensor) or met.shape != (3,) or met.dtype != torch.int64:
        raise CheckpointError(f"{where} holds a class_range that is not three whole numbers: it is damaged")
    return [int(number) for number in met.tolist()]


def _host_shards(folder: Path, files: Mapping[int, Path], first: Mapping[str, Any]) -> RunShards:
    count = max(files) + 1
    checkpoints, edges = [first], [0]
    for rank in range(count):
        if rank:
            checkpoints.append(read_checkpoint(files.get(rank, checkpoint_file(folder, rank))))
        weight = checkpoints[rank][HEAD].get(_HOST_WEIGHT)
        if not isinstance(weight, Tensor) or weight.ndim != 2:
            raise CheckpointError(f"{checkpoint_file(folder, rank)} holds no classifier: {HEAD} has no matrix 'weight'")
        _check_step(folder, rank, checkpoints[rank], first)
        edges.append(edges[-1] + weight.shape[0])
    for rank in range(count):
        shard = ClassShard(edges[-1], rank, count)
        if edges[rank] != shard.start or edges[rank + 1] != shard.start + shard.size:
            raise CheckpointError(
                f"{checkpoint_file(folder, rank)} holds {edges[rank + 1] - edges[rank]} classes where rank {rank} of "
                f"{count} has {shard.size} of {edges[-1]}: files of several runs are mixed in {folder}"
            )
    return RunShards(folder, tuple(checkpoints), tuple(edges))


def _check_step(folder: Path, rank: int, checkpoint: Mapping[str, Any], first: Mapping[str, Any]) -> None:
    met, wanted = checkpoint.get("global_step"), first.get("global_step")
    if met != wanted:
        raise CheckpointError(
            f"{checkpoint_file(folder, rank)} was written at step {met}, {checkpoint_file(folder, 0).name} at step "
            f"{wanted}: they are of different runs, or writing was interrupted"
        )


def _classifier_entry(head: Mapping[str, Any]) -> str:
    """The entry of a head's state that holds the class centers which the student is scored against."""
    if "class_range" not in head:
        return _HOST_WEIGHT
    settings = from_tensor(head[SETTINGS]) if SETTINGS in head else {}
    if CLASS_CENTERS in settings:
        name = settings[CLASS_CENTERS]
    else:
        name = next((key for key in head if key.startswith("methods.") and key.endswith(_ENDINGS)), None)
    if isinstance(name, str):
        return name
    methods = dict.fromkeys(key.split(".")[1] for key in head if key.startswith("methods."))
    whose = f"the head of {', '.join(methods)}" if methods else "the run's head"
    raise CheckpointError(
        f"{whose} holds no class centers that could be joined: a frozen classifier stays in the file or folder that "
        "kd_classifier named, and a run without labels has none"
    )


def merge_head(run_folder: str | os.PathLike[str], out_file: str | os.PathLike[str]) -> tuple[int, int]:
    """Join the class centers of a run's ranks, ours or those of arcface_torch's PartialFC, into one file.

    The file holds ``{"weight": (C, D) tensor, "num_classes": C}``; centers are as they were trained, not normalised. It
    is replaced in one step. ``(C, D)`` is returned.
    """
    shards = open_shards(run_folder)
    weight = shards.class_centers(0, shards.num_classes)
    save_tensors(out_file, {"weight": weight, "num_classes": shards.num_classes})
    return weight.shape[0], weight.shape[1]
