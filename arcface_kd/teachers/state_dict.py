"""State dicts in the files of any trainer: read without running anything, found under any key."""

import contextlib
import os
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from arcface_kd.backbones.network_name import carried_names
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
# What torch puts into the names of modules that it has compiled, sharded or checkpointed, wherever they are.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


class _PassedOver:
    """Stands where a file has a plain value of a class that torch does not read: a score, a path, the arguments."""

    def __new__(cls, *_: object) -> "_PassedOver":
        return object.__new__(cls)

    def __setstate__(self, _: object) -> None: ...


class _PassedOverMapping:
    """The same for a mapping: torch fills and builds an OrderedDict."""

    def __new__(cls, *_: object) -> "OrderedDict[object, object]":  # type: ignore[misc]
        return OrderedDict()


# Packages whose objects lie beside weights: scores, arguments, settings, times, places. The stand-ins import and call
# nothing of them.
_PLAIN = (
    *("argparse", "datetime", "easydict", "lightning", "lightning_fabric", "numpy", "omegaconf", "pathlib"),
    *("pytorch_lightning", "types", "typing", "yacs", "collections.defaultdict"),
)
_MAPPINGS = ("AttributeDict", "CfgNode", "EasyDict", "defaultdict")
_BUILTINS = ("bool", "dict", "float", "int", "list", "str", "tuple")
_MOST_CLASSES = 100


def read_content(path: str | os.PathLike[str]) -> object:
    """What a file of ``torch.save`` or safetensors holds, without running anything from the file.

    Tensors are on the CPU, mapped into memory where the format allows. Scores, arguments and settings beside them are
    passed over.
    """
    place = existing_file(Path(path))
    kind = signature(place)
    if kind == "safetensors":
        return _read_safetensors(place)
    if kind == "zip":
        _check_archive(place)
    elif kind != "pickle":
        raise TeacherError(f"teacher {place} is {describe(place)}; wanted a PyTorch checkpoint")
    content = _load(place, mapped=kind == "zip")
    fault = tensor_fault(content)
    if fault is not None:
        raise TeacherError(f"teacher {place}: {fault}")
    return content


def _load(path: Path, *, mapped: bool) -> object:
    """``torch.load`` of tensors and plain values, with a stand-in for each class of the latter that it meets."""
    stand_ins: dict[str, type] = {}
    while True:
        try:
            with torch.serialization.safe_globals([(kind, name) for name, kind in stand_ins.items()]):
                # Mapped: a checkpoint with optimiser state and head shards is read only where the backbone lies.
                return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        # torch.load raises whatever its unpickler, its zip reader or a tensor constructor stumbles over.
        except Exception as error:
            found = re.search(r"GLOBAL ([\w.]+) was not an allowed", str(error))
            name = found[1] if found else ""
            name = f"builtins.{name}" if name in _BUILTINS else name
            known = name in _PLAIN or name.partition(".")[0] in (*_PLAIN, "builtins")
            if not known or name in stand_ins or len(stand_ins) == _MOST_CLASSES:
                raise TeacherError(f"teacher {path} {refusal(error)}") from error
            stand_ins[name] = _PassedOverMapping if name.rpartition(".")[2] in _MAPPINGS else _PassedOver


def _read_safetensors(path: Path) -> object:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise TeacherError(f"teacher {path} is damaged or no safetensors file: {first_line(error)}") from error


def _check_archive(path: Path) -> None:
    """Refuse damage that torch would not report, and zip archives of other kinds."""
    names: list[str] = []
    with contextlib.suppress(Exception), zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
        fault: str | None = (
            "it is a TorchScript archive, a program and not only weights; call torch.save(torch.jit.load(FILE)."
            "state_dict(), NEW) and name NEW, or load_teacher(torch.jit.load(FILE)) from the library"
        )
    elif any(name.endswith("/models/model.json") for name in names):
        fault = (
            "it is a program of torch.export and not only weights; call torch.save(torch.export.load(FILE).state_dict, "
            "NEW) and name NEW"
        )
    else:
        fault = archive_fault(path)
    if fault is not None and any(name.endswith(".onnx") for name in names):
        fault = "it is a zip archive: an InsightFace pack? unpack it and name the folder"
    if fault is not None:
        raise TeacherError(f"teacher {path}: {fault}")


def state_dicts(content: object) -> dict[str, dict[str, Tensor]]:
    """Every mapping of a file that holds tensors by name, without what a profiler has left in it.

    By the keys that lead there (``model/state_dict``; empty for the file itself); trainers' usual keys come first.
    """
    return dict(_walk(content, ()))


def carried_networks(content: object) -> list[str]:
    """Names of networks that a file's state dicts carry, as this package writes them, in the order of `state_dicts`."""
    return list(dict.fromkeys(_carried(content, 0)))


def _carried(value: object, depth: int) -> Iterator[str]:
    if not isinstance(value, Mapping):
        return
    yield from carried_names(value)
    if depth < _DEPTH:
        for name in _in_order(value):
            yield from _carried(value[name], depth + 1)


def is_trained(place: str) -> bool:
    """Whether trainers use these keys for the network that they train; under others may be copies of it."""
    return all(key in _TRAINED for key in place.split("/") if key)


def _in_order(names: Iterable[object]) -> list[str]:
    """Those that are words, the keys of trained networks first."""
    rank = {name: position for position, name in enumerate(_TRAINED)}
    return sorted((name for name in names if isinstance(name, str)), key=lambda name: rank.get(name, len(rank)))


def _walk(value: object, place: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    if isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray):
        value = {str(position): each for position, each in enumerate(value) if isinstance(each, Mapping)}
    if not isinstance(value, Mapping):
        return
    named = {name: each for name, each in value.items() if isinstance(name, str)}
    tensors = {
        _WRAPPERS.sub("", name): each
        for name, each in named.items()
        if isinstance(each, Tensor) and name.rpartition(".")[2] not in _PROFILED
    }
    if tensors:
        yield "/".join(place), tensors
    if len(place) < _DEPTH:
        for name in _in_order(named):
            yield from _walk(named[name], (*place, name))


def outlined(content: object) -> str:
    """What a file holds instead of tensors by name, in a few words."""
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
    """A name of a file's choosing, fit for a message of one line."""
    text = repr(name)
    return text if len(text) <= 100 else text[:97] + "..."
