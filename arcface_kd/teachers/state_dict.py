"""State dicts in whatever file a trainer has left: read without running anything, found under any key."""

import contextlib
import os
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from arcface_kd.checkpoints.tensor_file import archive_fault, refusal, tensor_fault
from arcface_kd.errors import TeacherError, first_line
from arcface_kd.teachers.base import existing_file
from arcface_kd.teachers.file_type import describe, signature

# Where trainers put the network that they train, arcface_torch's save_all_states first; copies of it lie elsewhere.
_TRAINED = (
    *("state_dict_backbone", "backbone", "backbone_state_dict", "state_dict", "model_state_dict", "net_state_dict"),
    *("model", "net", "network"),
)
# What thop leaves in every layer that it has looked at.
_PROFILED = ("total_ops", "total_params")
# Below the file itself: {"checkpoint": {"model": {"state_dict": ...}}}.
_DEPTH = 3


class _PassedOver:
    """Stands where a file has a plain value of a class that torch does not read: a score, a path, the arguments."""

    def __new__(cls, *_: object) -> "_PassedOver":
        return object.__new__(cls)

    def __setstate__(self, _: object) -> None: ...


class _PassedOverMapping:
    """The same for a mapping: torch fills and builds an OrderedDict."""

    def __new__(cls, *_: object) -> "OrderedDict[object, object]":  # type: ignore[misc]
        return OrderedDict()


# Nothing of these classes is imported or called: the stand-ins take what the file says of them and keep nothing.
_STAND_INS = [
    *(
        (_PassedOver, f"numpy.{core}.multiarray.{name}")
        for core in ("core", "_core")
        for name in ("scalar", "_reconstruct")
    ),
    *((_PassedOver, name) for name in ("numpy.dtype", "numpy.ndarray", "argparse.Namespace")),
    *((_PassedOver, f"pathlib.{place}{kind}Path") for place in ("", "_local.") for kind in ("Posix", "Windows")),
    *((_PassedOverMapping, name) for name in ("easydict.EasyDict", "yacs.config.CfgNode")),
    *(
        (_PassedOverMapping, f"{package}.utilities.{module}.AttributeDict")
        for package, module in (("pytorch_lightning", "parsing"), ("lightning_fabric", "data"))
    ),
]


def read_content(path: str | os.PathLike[str]) -> object:
    """What a file of tensors holds, without running anything that the file brings.

    Args:
        path: written by ``torch.save`` or as safetensors.

    Returns:
        Tensors, on the CPU and mapped into memory where the format allows, in whatever they were saved in. Numpy's
        numbers, paths and arguments beside them are passed over.

    Raises:
        TeacherError: the file is missing, damaged, a TorchScript archive, or holds other Python objects.
    """
    place = existing_file(Path(path))
    kind = signature(place)
    if kind == "safetensors":
        return _read_safetensors(place)
    if kind == "zip":
        _check_archive(place)
    elif kind != "pickle":
        raise TeacherError(f"teacher {place} is {describe(place)}; wanted a PyTorch checkpoint")
    try:
        with torch.serialization.safe_globals(_STAND_INS):  # type: ignore[arg-type]
            # Mapped: a checkpoint with optimiser state and head shards is read only where the backbone lies.
            content: object = torch.load(place, map_location="cpu", weights_only=True, mmap=kind == "zip")
    # torch.load raises whatever its unpickler, its zip reader or a tensor constructor stumbles over.
    except Exception as error:
        raise TeacherError(f"teacher {place} {refusal(error)}") from error
    fault = tensor_fault(content)
    if fault is not None:
        raise TeacherError(f"teacher {place}: {fault}")
    return content


def _read_safetensors(path: Path) -> object:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise TeacherError(f"teacher {path} is damaged or no safetensors file: {first_line(error)}") from error


def _check_archive(path: Path) -> None:
    """Refuse what torch would read without a word, and zip archives of other kinds."""
    names: list[str] = []
    with contextlib.suppress(Exception), zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
        fault: str | None = (
            "it is a TorchScript archive, a program and not only weights; call torch.save(torch.jit.load(FILE)."
            "state_dict(), NEW) and name NEW, or load_teacher(torch.jit.load(FILE)) from the library"
        )
    else:
        fault = archive_fault(path)
    if fault is not None and any(name.endswith(".onnx") for name in names):
        fault = "it is a zip archive: an InsightFace pack? unpack it and name the folder"
    if fault is not None:
        raise TeacherError(f"teacher {path}: {fault}")


def state_dicts(content: object) -> dict[str, dict[str, Tensor]]:
    """Every mapping of a file that holds tensors by name, without what a profiler has left in it.

    Args:
        content: as `read_content` returns it.

    Returns:
        Tensors by name, by the keys that lead there (``model/state_dict``; empty for the file itself): what is called
        as the trained network usually is comes first.
    """
    return dict(_walk(content, ()))


def is_trained(place: str) -> bool:
    """Whether a state dict is called as trainers call the network that they train; others may be copies of it.

    Args:
        place: the keys that lead there, as `state_dicts` gives them.
    """
    return all(key in _TRAINED for key in place.split("/") if key)


def _walk(value: object, place: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    if isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray):
        value = {str(position): each for position, each in enumerate(value) if isinstance(each, Mapping)}
    if not isinstance(value, Mapping):
        return
    named = {name: each for name, each in value.items() if isinstance(name, str)}
    tensors = {
        name: each
        for name, each in named.items()
        if isinstance(each, Tensor) and name.rpartition(".")[2] not in _PROFILED
    }
    if tensors:
        yield "/".join(place), tensors
    if len(place) < _DEPTH:
        rank = {name: position for position, name in enumerate(_TRAINED)}
        for name in sorted(named, key=lambda name: rank.get(name, len(rank))):
            yield from _walk(named[name], (*place, name))


def outlined(content: object) -> str:
    """What a file holds instead of tensors by name, in a few words.

    Args:
        content: as `read_content` returns it.
    """
    if not isinstance(content, Mapping):
        return f"a {_kind(content)}"
    entries = [f"{short(name)}: {_kind(value)}" for name, value in content.items()]
    more = f" and {len(entries) - 5} more" if len(entries) > 5 else ""
    return f"a {_kind(content)} of {', '.join(entries[:5]) or 'nothing'}{more}"


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"tensor {tuple(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    return "Python object" if isinstance(value, _PassedOver) else type(value).__name__


def short(name: object) -> str:
    """A name of a file's choosing, fit for a message of one line.

    Args:
        name: a key.
    """
    text = repr(name)
    return text if len(text) <= 100 else text[:97] + "..."
