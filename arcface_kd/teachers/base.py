"""The teacher of a run, a frozen network that takes the student's images, and `load_teacher`, which loads any kind."""

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from arcface_kd import registry
from arcface_kd.errors import TeacherError, first_line
from arcface_kd.teachers.file_type import describe, signature
from arcface_kd.teachers.options import Precision, Preprocessing, TeacherOptions
from arcface_kd.teachers.preparation import TOLERANCE, as_rows, autocast, prepared, probe_images

logger = logging.getLogger(__name__)

LARGEST_FILE = 1 << 31
"""What one protobuf message, and so an ONNX file, can hold; MXNet's largest face networks have a tenth of it."""
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9_+.-]+:")


def local_path(source: object) -> Path | None:
    """The path that a source names, existing or not; None where it is no path.

    ``scheme:name`` is a path only if there is a file of that name.
    """
    if isinstance(source, str):
        if not source or "\0" in source or (_SCHEME.match(source) and not os.path.exists(source)):
            return None
    elif not isinstance(source, os.PathLike):
        return None
    path = Path(source).expanduser()
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise TeacherError(f"teacher {str(path)[:200]}: cannot be read: {error.strerror}") from error
    return path


def existing_file(path: Path) -> Path:
    """Raise unless a path is a regular file; return it."""
    if not path.is_file():
        raise TeacherError(f"teacher {path}: {describe(path)}; wanted a file")
    return path


def read_bytes(path: Path, most: int = LARGEST_FILE) -> bytes:
    """A whole regular file of at most ``most`` bytes."""
    try:
        size = existing_file(path).stat().st_size
        if size > most:
            raise TeacherError(f"teacher {path} has {size} bytes; no face network has more than {most}")
        if signature(path) in ("git-lfs", "html"):
            raise TeacherError(f"teacher {path} is {describe(path)}")
        return path.read_bytes()
    except OSError as error:
        raise TeacherError(f"teacher {path}: cannot be read: {error.strerror or first_line(error)}") from error


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """A SHA-256 of weights, whatever their order, device or memory layout."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()


def fingerprint_of(weights: str, precision: Precision, preprocessing: Preprocessing) -> str:
    """A teacher's fingerprint from the digest of its weights."""
    identity = {"weights": weights, "precision": precision, **vars(preprocessing)}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


class Teacher(nn.Module):
    """A frozen network that embeds the images the student sees.

    The network is no submodule: a module that a teacher is attached to does not have its weights in ``state_dict``,
    optimiser or DDP. ``to(device)`` moves it all the same, and a network with weights follows its images to their
    device.

    Attributes:
        embedding_size: dimension D of the embeddings.
        description: what it is and where it came from, in one line.
        preprocessing: how the network wants its input.
        precision: ``fp32``, or the type of autocast.
        parameter_count: number of weights; None for a callable.
    """

    def __init__(
        self,
        network: Callable[[Tensor], Tensor],
        *,
        preprocessing: Preprocessing,
        description: str,
        weights: str,
        precision: str | None = None,
        embedding_size: int | str | None = None,
        parameter_count: int | None = None,
        channels_last: bool = False,
    ) -> None:
        """Freeze a network and try it on two images.

        Args:
            network: from prepared images (B, 3, S, S) float32 to (B, D); further axes of length 1 are dropped.
            preprocessing: what the network expects; S is its size.
            description: for messages and reports.
            weights: digest of everything that the network computes with.
            precision: ``fp32`` (default), ``bf16`` or ``fp16``.
            embedding_size: the dimension that it must have, if any.
            parameter_count: number of weights; by default a module's parameters are counted.
            channels_last: run the network in channels_last memory format, which is faster for convolutions.

        Raises:
            TeacherError: the network cannot embed such images, or embeds them as NaN, inf or another dimension.
        """
        super().__init__()
        if isinstance(network, nn.Module):
            network.eval()
            # A TorchScript module has no requires_grad_ of its own.
            for parameter in network.parameters():
                parameter.requires_grad_(False)
            if channels_last:
                network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            if parameter_count is None:
                parameter_count = sum(parameter.numel() for parameter in network.parameters())
        # A tuple, since nn.Module registers any module that is an attribute.
        self._held = (network,)
        self._memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self._weights = weights
        self.preprocessing = preprocessing
        self.precision: Precision = precision or "fp32"  # type: ignore[assignment]
        self.description = description
        self.parameter_count = parameter_count
        self.training = False
        self._tried_on: set[torch.device] = set()
        self.embedding_size = self._probed_size()
        if embedding_size is not None and self.embedding_size != int(embedding_size):
            raise TeacherError(f"teacher {description} has dimension {self.embedding_size}, wanted {embedding_size}")

    @property
    def network(self) -> Callable[[Tensor], Tensor]:
        """The frozen network behind the preprocessing."""
        return self._held[0]

    @property
    def device(self) -> torch.device | None:
        """Where the network's weights are; None where torch holds none: an ONNX session, a callable."""
        if not isinstance(self.network, nn.Module):
            return None
        weight = next(chain(self.network.parameters(), self.network.buffers()), None)
        return None if weight is None else weight.device

    @property
    def fingerprint(self) -> str:
        """SHA-256 over weights, preprocessing and precision, in hexadecimal; equal in every process."""
        return fingerprint_of(self._weights, self.precision, self.preprocessing)

    @property
    def precisions(self) -> list[Precision]:
        """The precision of each of the teachers that it is made of, one as a rule."""
        return [self.precision]

    @property
    def fingerprint_in_fp32(self) -> str:
        """The fingerprint that it would have in fp32: the same on a CPU and a GPU, whose default precisions differ."""
        return fingerprint_of(self._weights, "fp32", self.preprocessing)

    def with_preprocessing(self, preprocessing: Preprocessing) -> "Teacher":
        """The same network behind another preprocessing; nothing is copied."""
        return Teacher(
            self.network,
            preprocessing=preprocessing,
            description=self.description,
            weights=self._weights,
            precision=self.precision,
            parameter_count=self.parameter_count,
            channels_last=self._memory_format == torch.channels_last,
        )

    def prepare(self, images: Tensor) -> Tensor:
        """Turn the student's images into what the network expects, see :func:`.preparation.prepared`."""
        return prepared(images, self.preprocessing).contiguous(memory_format=self._memory_format)

    def autocast(self, device: torch.device) -> torch.autocast:
        """The teacher's own precision; autocast of the student's step does not reach into it."""
        return autocast(self.precision, device)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Embed images as the student sees them.

        Args:
            images: (B, 3, H, W), RGB in [-1, 1], on any device.

        Returns:
            (B, D) float32 embeddings, not normalised, without gradient, on the device of ``images``.

        Raises:
            TeacherError: the images are not of that shape, or the network returns something else than embeddings.
        """
        if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
            met = f"{tuple(images.shape)} {images.dtype}"
            raise TeacherError(f"a teacher takes (B, 3, H, W) floating-point images in [-1, 1], got {met}")
        if len(images) == 0:
            return images.new_zeros((0, self.embedding_size), dtype=torch.float32)
        self._go_to(images.device)
        return self._embed(images)

    def _go_to(self, device: torch.device) -> None:
        """Move the network to its images; on a GPU it must embed two test images as it did on the CPU."""
        network = self.network
        if not isinstance(network, nn.Module):
            return
        if network.training:
            network.eval()
        if self.device not in (None, device):
            network.to(device)
        if device.type == "cuda" and device not in self._tried_on:
            self._tried_on.add(device)
            met = normalize(self._embed(probe_images(self.preprocessing.size).to(device))).cpu()
            # A GPU's fp32 may be TF32, which rounds as fp16 does.
            if not (met - self._reference).abs().max() < max(TOLERANCE[self.precision], TOLERANCE["fp16"]):
                raise TeacherError(
                    f"teacher {self.description} embeds test images on {device} in {self.precision} otherwise than on "
                    "the CPU in fp32: give --kd-option teacher.precision=fp32"
                )

    def _embed(self, images: Tensor) -> Tensor:
        network = self.network
        with self.autocast(images.device):
            embeddings = network(self.prepare(images.float()))
        wanted = f"for {len(images)} images; wanted ({len(images)}, D) embeddings"
        if not isinstance(embeddings, Tensor):
            raise TeacherError(f"teacher {self.description} returns {type(embeddings).__name__} {wanted}")
        embeddings = as_rows(embeddings, len(images))
        if embeddings.dim() != 2 or len(embeddings) != len(images) or embeddings.shape[1] == 0:
            raise TeacherError(f"teacher {self.description} returns {tuple(embeddings.shape)} {wanted}")
        return embeddings.to(images.device, torch.float32)

    def train(self, mode: bool = True) -> "Teacher":
        """Stay in evaluation mode."""
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Teacher":
        if isinstance(self.network, nn.Module):
            self.network._apply(fn, recurse)
        return self

    def extra_repr(self) -> str:
        """One line for ``print(teacher)``."""
        return f"{self.description}, embedding_size={self.embedding_size}, input={self.preprocessing}"

    def _probed_size(self) -> int:
        images = probe_images(self.preprocessing.size).to(self.device or "cpu")
        # Rows are counted by `forward`; the dimension is what the probe is for.
        self.embedding_size = 0
        self._tried_on.add(images.device)
        try:
            embeddings = self(images)
        except TeacherError:
            raise
        # The network may be anybody's code or file: whatever it raises means that it cannot be a teacher.
        except Exception as error:
            size = f"{self.preprocessing.size}x{self.preprocessing.size}"
            raise TeacherError(f"teacher {self.description} cannot embed {size} images: {first_line(error)}") from error
        if not torch.isfinite(embeddings).all():
            raise TeacherError(
                f"teacher {self.description} embeds test images as NaN or inf in {self.precision}: its weights are "
                "damaged, or the precision is too low for it"
            )
        self._reference = normalize(embeddings).cpu()
        return int(embeddings.shape[1])


@runtime_checkable
class TeacherSource(Protocol):
    """A kind of teacher and how to load it: an entry point of the group ``arcface_kd.teachers``."""

    description: ClassVar[str]

    @staticmethod
    def accepts(source: object) -> bool:
        """Whether ``source`` exists and is of this kind; quick, reads no more than a file's beginning."""

    @staticmethod
    def load(source: Any, options: TeacherOptions) -> Teacher:
        """Load an accepted source.

        Raises:
            TeacherError: it cannot be read or is not what it should be.
            ConfigError: an option that this kind cannot honour.
        """


def load_teacher(
    source: object,
    options: TeacherOptions | Mapping[str, object] | None = None,
    *,
    device: torch.device | str | None = None,
) -> Teacher:
    """Load a teacher of any kind.

    Args:
        source: a file, a folder, ``insightface:NAME``, ``timm:NAME``, ``hf:OWNER/NAME``, an ``nn.Module`` or a
            callable: what an entry point of the group ``arcface_kd.teachers`` accepts. A list of them is one teacher,
            see :func:`arcface_kd.teachers.merged.merge_teachers`.
        options: the ``teacher.*`` options.
        device: where the teacher computes; by default wherever its images are.

    Returns:
        The teacher, frozen, tried on two images.

    Raises:
        TeacherError: the source is missing, of no known kind, damaged, or cannot embed faces. No teacher has random
            weights.
        ConfigError: an option is unknown, out of range or without meaning for this source.
    """
    if isinstance(source, list | tuple):
        # That module imports this one.
        from arcface_kd.teachers.merged import merge_teachers

        return merge_teachers(source, options, device=device)
    checked = TeacherOptions.of(options)
    if device is not None and torch.device(device).type == "cpu" and checked.precision is None:
        checked = replace(checked, precision="fp32")
    sources = registry.load_all(registry.TEACHERS)
    willing = {name: kind for name, kind in sources.items() if _accepts(name, kind, source)}
    if len(willing) > 1:
        raise TeacherError(f"teacher {source!s} is claimed by several sources: {', '.join(willing)}; uninstall one")
    if not willing:
        raise TeacherError(_nobody_accepts(source, sources))
    (kind,) = willing.values()
    teacher: Teacher = kind.load(source, checked)  # type: ignore[attr-defined]
    if device is not None:
        teacher.to(device)
    return teacher


def _accepts(name: str, kind: Any, source: object) -> bool:
    try:
        return bool(kind.accepts(source))
    except TeacherError:
        raise
    # A broken plug-in breaks only its own kind.
    except Exception as error:
        logger.warning("teacher source %r is passed over: %s", name, first_line(error))
        return False


def _nobody_accepts(source: object, sources: Mapping[str, object]) -> str:
    kinds = "; ".join(f"{name}: {getattr(kind, 'description', 'no description')}" for name, kind in sources.items())
    path = local_path(source)
    if path is None:
        found = repr(source) if isinstance(source, str) else f"a {type(source).__name__}"
        return f"no teacher source takes {found}; there are {kinds}"
    if not path.exists():
        return f"teacher {path} does not exist (looked from {Path.cwd()})"
    return f"teacher {path} is {describe(path)}, which no teacher source takes; there are {kinds}"
