"""Teachers from PyTorch checkpoints: ``model.pt`` and ``checkpoint_gpu_*.pt`` of arcface_torch, and their relatives."""

import contextlib
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from arcface_kd.backbones import NETWORKS, FaceBackbone
from arcface_kd.backbones.vit import HOST_NAMES, VITS
from arcface_kd.checkpoints.tensor_file import archive_fault, tensor_fault
from arcface_kd.errors import ConfigError, TeacherError, first_line
from arcface_kd.teachers.base import Teacher, existing_file, local_path, tensors_digest
from arcface_kd.teachers.file_type import describe, signature
from arcface_kd.teachers.options import Preprocessing, TeacherOptions

# Where trainers put the backbone's tensors: arcface_torch's save_all_states first, then what others are used to.
_CONTAINERS = ("state_dict_backbone", "backbone", "state_dict", "model_state_dict", "model")
_STUDENT = "model.pt"
_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
_WEIGHTS = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))
_T = TypeVar("_T")
_KNOWN = {**NETWORKS, **VITS}
_PREFIXES = ("module.", "_orig_mod.", "backbone.", "model.")


@dataclass(frozen=True)
class NetworkCheckpoint:
    """A backbone rebuilt from a checkpoint.

    Attributes:
        network: the backbone with its weights, in evaluation mode, on the CPU.
        name: its name among ``arcface_kd.backbones.NETWORKS`` or ``arcface_kd.backbones.vit.VITS``.
        num_features: dimension of its embeddings.
        digest: SHA-256 over its name and weights.
    """

    network: FaceBackbone
    name: str
    num_features: int
    digest: str


def is_run_folder(source: object) -> bool:
    """Whether this is what a run of arcface_torch or of ``arcface-kd train`` leaves: a folder with ``model.pt``.

    Args:
        source: a path or anything else.
    """
    path = local_path(source)
    return path is not None and (path / _STUDENT).is_file()


def _check_archive(path: Path) -> None:
    """Refuse what torch would read without a word, and an InsightFace pack that nobody has unpacked."""
    fault = archive_fault(path)
    if fault is None:
        return
    with contextlib.suppress(Exception), zipfile.ZipFile(path) as archive:
        if any(name.endswith(".onnx") for name in archive.namelist()):
            fault = "it is a zip archive: an InsightFace pack? unpack it and name the folder"
    raise TeacherError(f"teacher {path}: {fault}")


def read_content(path: str | os.PathLike[str]) -> object:
    """What a PyTorch file holds, without running anything that the file brings.

    Args:
        path: written by ``torch.save``.

    Returns:
        Tensors, on the CPU and mapped into memory where the format allows, in whatever they were saved in.

    Raises:
        TeacherError: the file is missing, damaged, or holds Python objects.
    """
    place = existing_file(Path(path))
    kind = signature(place)
    if kind == "zip":
        _check_archive(place)
    elif kind != "pickle":
        raise TeacherError(f"teacher {place} is {describe(place)}; wanted a PyTorch checkpoint")
    try:
        # Mapped: a checkpoint with optimiser state and head shards is read only where the backbone lies.
        content: object = torch.load(place, map_location="cpu", weights_only=True, mmap=kind == "zip")
    # torch.load raises whatever its unpickler, its zip reader or a tensor constructor stumbles over.
    except Exception as error:
        if "weights_only" in str(error) or "Unsupported" in str(error):
            raise TeacherError(
                f"teacher {place} holds more than tensors, and loading it could run code; save its state_dict() and "
                f"name that file ({first_line(error)})"
            ) from error
        raise TeacherError(f"teacher {place} is damaged or not a PyTorch checkpoint: {first_line(error)}") from error
    fault = tensor_fault(content)
    if fault is not None:
        raise TeacherError(f"teacher {place}: {fault}")
    return content


def read_state(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The backbone's tensors in a PyTorch file.

    Args:
        path: a state dict, or a dict that holds one (``state_dict_backbone``, ``state_dict``, ...); prefixes that DDP,
            ``torch.compile`` or a wrapping module put before every name are taken off.

    Returns:
        Names and tensors, on the CPU.

    Raises:
        TeacherError: the file is missing, damaged, holds Python objects, or no tensors by name.
    """
    return _named_tensors(read_content(path), Path(path))


def _named_tensors(content: object, path: Path) -> dict[str, Tensor]:
    for key in _CONTAINERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not content:
        raise TeacherError(f"teacher {path} holds a {type(content).__name__}, wanted a state dict: tensors by name")
    state: dict[str, Tensor] = {}
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise TeacherError(
                f"teacher {path}: entry {_short(name)} is a {type(value).__name__}; wanted a state dict: tensors by "
                "name"
            )
        state[name] = value
    while True:
        prefix = next((prefix for prefix in _PREFIXES if all(name.startswith(prefix) for name in state)), None)
        if prefix is None:
            return state
        state = {name.removeprefix(prefix): value for name, value in state.items()}


def _short(name: object) -> str:
    """A name of a file's choosing, fit for a message of one line."""
    text = repr(name)
    return text if len(text) <= 100 else text[:97] + "..."


def _shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def _without_counters(entries: Mapping[str, _T]) -> dict[str, _T]:
    # Old checkpoints lack BatchNorm's num_batches_tracked, and torch fills it in.
    return {name: entry for name, entry in entries.items() if not name.endswith("num_batches_tracked")}


@cache
def _outline(name: str, num_features: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a network's tensors, without making them."""
    with torch.device("meta"):
        return _without_counters(_shapes(_KNOWN[name](num_features=num_features)))


def _num_features(name: str, state: Mapping[str, tuple[int, ...]]) -> int | None:
    """The embedding dimension that makes network ``name`` fit these shapes exactly, if there is one."""
    outline = _outline(name, 512)
    if outline.keys() != state.keys():
        return None
    other = _outline(name, 513)
    for key, shape in outline.items():
        if shape != other[key] and len(shape) == len(state[key]):
            axis = next(axis for axis, size in enumerate(shape) if size != other[key][axis])
            size = state[key][axis]
            return size if 0 < size <= 65536 and _outline(name, size) == state else None
    return None


def _misfit(path: Path, name: str, state: dict[str, tuple[int, ...]]) -> str:
    outline = _outline(name, 512)
    missing = sorted(outline.keys() - state.keys())
    foreign = sorted(state.keys() - outline.keys())
    words = []
    if missing:
        words.append(f"{len(missing)} tensors missing, such as {_short(missing[0])}")
    if foreign:
        words.append(f"{len(foreign)} foreign, such as {_short(foreign[0])}")
    if not words:
        other = _outline(name, 513)
        wrong = next((key for key in outline if outline[key] == other[key] != state[key]), next(iter(outline)))
        words.append(f"{wrong!r} has shape {state[wrong]}, wanted {outline[wrong]}")
    return f"teacher {path} does not fit network {name!r}: {'; '.join(words)}"


def load_network(path: str | os.PathLike[str], name: str | None = None) -> NetworkCheckpoint:
    """Rebuild the backbone whose weights a checkpoint holds; every tensor has to fit.

    Args:
        path: an arcface_torch ``model.pt`` or ``checkpoint_gpu_*.pt``, the folder of the run that wrote them, or
            another state dict of a known network.
        name: the network; inferred from the names and shapes of the tensors when None.

    Returns:
        The network with its weights.

    Raises:
        TeacherError: unreadable, damaged, with NaN or inf among the weights, or of none of the known networks.
        ConfigError: ``name`` is no known network.
    """
    place = Path(path) / _STUDENT if is_run_folder(path) else Path(path)
    if name is not None:
        name = HOST_NAMES.get(name, name)
        if name not in _KNOWN:
            raise ConfigError(f"teacher.network={name!r}: no such network; there are {', '.join(_KNOWN)}")
    state = read_state(place)
    shapes = _without_counters({key: tuple(value.shape) for key, value in state.items()})
    candidates = [name] if name is not None else list(_KNOWN)
    fitting = {candidate: size for candidate in candidates if (size := _num_features(candidate, shapes)) is not None}
    if not fitting and name is not None:
        raise TeacherError(_misfit(place, name, shapes))
    if not fitting:
        key, shape = next(iter(shapes.items()), ("none", ()))
        raise TeacherError(
            f"teacher {place}: its {len(state)} tensors (the first: {_short(key)} {shape}) are those of none of the "
            f"networks {', '.join(_KNOWN)}; load a network of your own with load_teacher(module)"
        )
    if len(fitting) > 1:
        raise TeacherError(f"teacher {place} fits several networks: {', '.join(fitting)}; name one as teacher.network")
    ((network_name, num_features),) = fitting.items()
    for key, tensor in state.items():
        if key in shapes and tensor.dtype not in _WEIGHTS:
            raise TeacherError(
                f"teacher {place}: tensor {key!r} is of {tensor.dtype}; wanted float16, bfloat16, float32 or float64"
            )
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise TeacherError(f"teacher {place}: tensor {key!r} holds NaN or inf")
    network = _KNOWN[network_name](num_features=num_features)
    try:
        network.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise TeacherError(f"teacher {place} does not fit network {network_name!r}: {first_line(error)}") from error
    # Digested as loaded and without counters: a file in float16 or from an old torch is no other teacher.
    computing = _without_counters(network.state_dict())
    digest = tensors_digest({f"{network_name}.{key}": value for key, value in computing.items()})
    return NetworkCheckpoint(network.eval(), network_name, num_features, digest)


def _autocast(dtype: torch.dtype, tensor: Tensor, *, half: bool) -> torch.autocast:
    """A backbone's context for its convolutions in the type asked for; its own rule goes by the device."""
    return torch.autocast(tensor.device.type, dtype=dtype, enabled=half)


class CheckpointSource:
    """PyTorch checkpoints of the networks in ``arcface_kd.backbones``, ViTs included, fed RGB as (x - 127.5) / 127.5.

    A run's folder stands for its ``model.pt``.
    """

    description: ClassVar[str] = "a PyTorch checkpoint (.pt, .pth) or a run's folder, of " + ", ".join(_KNOWN)

    @staticmethod
    def accepts(source: object) -> bool:
        """Whether this is a PyTorch file by its content, or by its name where the content says nothing."""
        if is_run_folder(source):
            return True
        path = local_path(source)
        if path is None or not path.is_file():
            return False
        kind = signature(path)
        return kind in ("zip", "pickle") or (kind is None and path.suffix.lower() in (".pt", ".pth", ".ckpt"))

    @staticmethod
    def load(source: str | os.PathLike[str], options: TeacherOptions) -> Teacher:
        """Load the checkpoint's backbone as a teacher.

        Args:
            source: the file, or the run's folder.
            options: ``network`` names the architecture where it cannot be inferred.

        Raises:
            TeacherError: see `load_network`.
            ConfigError: ``network`` is unknown.
        """
        path = local_path(source)
        assert path is not None
        checkpoint = load_network(path, options.network)
        if options.precision in _HALF:
            checkpoint.network.fp16 = True
            setattr(checkpoint.network, "autocast", partial(_autocast, _HALF[options.precision]))  # noqa: B010
        return Teacher(
            checkpoint.network,
            preprocessing=options.preprocessing(Preprocessing()),
            description=f"{checkpoint.name} from {path}",
            weights=checkpoint.digest,
            precision=options.precision,
            embedding_size=options.embedding_size,
            channels_last=True,
        )
