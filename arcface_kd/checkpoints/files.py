"""Checkpoints of all ranks, of one step even if the run is killed while it saves them.

Every rank of a run writes ``checkpoint_gpu_RANK.pt``. Ranks that each replaced their own file could be killed between
two of them and leave a run that nobody can go on with. So each first writes its new one beside the old, as
``checkpoint_gpu_RANK.pt.next``, and when all are there each moves its own into place. A file that still waits is in
force if any other rank's file of its step is in place already; otherwise the saving had not begun to count.
"""

import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from arcface_kd.checkpoints.tensor_file import archive_fault, refusal, save_tensors, tensor_fault
from arcface_kd.distributed.ranks import RankGroup
from arcface_kd.errors import CheckpointError, ResourceError
from arcface_kd.system.files import replace_file

HEAD = "state_dict_softmax_fc"
OPTIMIZER = "state_optimizer"

# What the entries of a checkpoint are, of those that it has.
_KINDS: Mapping[str, type] = {
    "epoch": int,
    "global_step": int,
    "state_dict_backbone": Mapping,
    OPTIMIZER: Mapping,
    "state_lr_scheduler": Mapping,
}

_NAME, _SUFFIX, _WAITING = "checkpoint_gpu_", ".pt", ".pt.next"


def checkpoint_file(folder: str | os.PathLike[str], rank: int) -> Path:
    """The file that a rank of a run writes its state to."""
    return Path(folder) / f"checkpoint_gpu_{rank}.pt"


def read_checkpoint(path: Path) -> Mapping[str, Any]:
    """A trainer's checkpoint, mapped into memory where its format allows.

    Its tensors are on the CPU and are read from the file when they are looked at. Copy what is to outlive the file as
    it is: arcface_torch writes over it in place.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; a run writes one for each rank with save_all_states=True")
    try:
        seen = path.stat()
        fault = _fault(path, seen.st_ino, seen.st_size, seen.st_mtime_ns) if _is_archive(path) else None
        if fault is not None:
            raise CheckpointError(f"{path} cannot be read as a checkpoint: {fault}")
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        # Files of torch < 1.6 cannot be mapped.
        except (RuntimeError, ValueError):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    # torch.load raises whatever its unpickler, its zip reader or a tensor constructor stumbles over.
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read as a checkpoint: it {refusal(error)}") from error
    if not isinstance(loaded, dict) or not isinstance(loaded.get(HEAD), Mapping):
        raise CheckpointError(f"{path} holds no {HEAD}: it is not a checkpoint of arcface_torch or of this package")
    unlike = next(
        (name for name, kind in _KINDS.items() if name in loaded and not isinstance(loaded[name], kind)), None
    )
    if unlike is not None:
        raise CheckpointError(f"{path} holds a {type(loaded[unlike]).__name__} as {unlike}: it is damaged")
    if not all(isinstance(name, str) for name in loaded[HEAD]):
        raise CheckpointError(f"{path} holds a {HEAD} whose entries are not named by text: it is damaged")
    fault = tensor_fault(loaded)
    if fault is not None:
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {fault}")
    return loaded


def _is_archive(path: Path) -> bool:
    """Whether torch takes a file for a zip archive; what it did not write in that form has no checksums."""
    with open(path, "rb") as stream:
        return stream.read(4) == b"PK\x03\x04"


@lru_cache(maxsize=4096)
def _fault(path: Path, inode: int, size: int, modified: int) -> str | None:
    """What is wrong with a file that was last changed then; it is read once, however often a run asks for it."""
    return archive_fault(path)


def save_checkpoint(folder: str | os.PathLike[str], state: Mapping[str, Any], ranks: RankGroup) -> None:
    """Save the state of every rank; after a kill at any moment, all that is in force is of one step.

    All ranks call. One rank alone replaces its file in one step.
    """
    path = checkpoint_file(folder, ranks.rank)
    if ranks.world_size == 1:
        save_tensors(path, state)
        return
    waiting = path.with_suffix(_WAITING)
    save_tensors(waiting, state)
    distributed.barrier(ranks.group)
    try:
        replace_file(waiting, path)
    except OSError as error:
        raise ResourceError(f"cannot write {path}: {error.strerror or error}") from error


def checkpoints_in_force(folder: str | os.PathLike[str]) -> dict[int, Path]:
    """The checkpoint of each rank that counts, by rank."""
    files, waiting = _saved(Path(folder), _SUFFIX), _saved(Path(folder), _WAITING)
    if waiting:
        steps = {_step_of(path) for path in files.values()}
        files.update({rank: path for rank, path in waiting.items() if _step_of(path) in steps})
    return files


def finish_saving(folder: str | os.PathLike[str], *, keep: bool = True) -> None:
    """Bring the files of an interrupted saving into place, or take away those that did not get so far.

    ``keep=False``, for a run that begins anew, takes them away in any case.
    """
    folder = Path(folder)
    in_force = checkpoints_in_force(folder) if keep else {}
    try:
        for rank, path in _saved(folder, _WAITING).items():
            if in_force.get(rank) == path:
                replace_file(path, checkpoint_file(folder, rank))
            else:
                path.unlink()
    except OSError as error:
        raise ResourceError(f"cannot write to {folder}: {error.strerror or error}") from error


def _saved(folder: Path, suffix: str) -> dict[int, Path]:
    paths = folder.glob(f"{_NAME}*{suffix}")
    found = {path.name.removeprefix(_NAME).removesuffix(suffix): path for path in paths}
    return {int(rank): found[rank] for rank in sorted(found) if rank.isdecimal()}


def _step_of(path: Path) -> object:
    return read_checkpoint(path).get("global_step")
