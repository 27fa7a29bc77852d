"""What a model costs: parameters, multiply-adds of one image, its file, and how fast it is on this machine."""

import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from arcface_kd.backbones import FaceBackbone
from arcface_kd.system.device import synchronize
from arcface_kd.teachers.base import Teacher

BATCH_SIZE = 32
_ROUNDS = 5
_SECONDS = 2.0
_FEWEST_RUNS = 20
_MOST_RUNS = 50
_NUMPY_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(uint8)": np.uint8}


class Latency(NamedTuple):
    """How long one image takes, alone, in milliseconds."""

    p50: float  # the median
    p95: float  # 95 of 100 images take no longer


@dataclass(frozen=True)
class Cost:
    """A model's cost in use, for one view of an image (no mirrored one)."""

    parameters: int | None  # number of weights; None where the model does not tell
    # Of the convolutions and matrix products for one image; None where they run outside torch.
    multiply_adds: int | None
    # In batches of ``BATCH_SIZE`` and in the model's own number format, on the machine that :func:`machine` describes.
    images_per_second: float
    latency: Latency | None  # of one image alone; None for a file that onnxruntime does not run as it is
    file_bytes: int | None  # size of the file that it was read from; None where it is none


def machine(device: torch.device) -> str:
    """One line about where the speed was measured: processor or GPU, threads, torch."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    threads = torch.get_num_threads()
    return f"{_processor()}, {threads} thread{'s' if threads > 1 else ''}, torch {torch.__version__}"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or f"{os.cpu_count()} processors"


def _inputs(model: nn.Module, batch: int, size: int, device: torch.device) -> torch.Tensor:
    images = torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1
    weight = next(chain(model.parameters(), model.buffers()), None)
    channels_last = weight is not None and any(
        parameter.dim() == 4 and parameter.is_contiguous(memory_format=torch.channels_last)
        for parameter in model.parameters()
    )
    return images.to(device, memory_format=torch.channels_last if channels_last else torch.contiguous_format)


@torch.no_grad()
def multiply_adds(model: nn.Module, size: int = 112, device: torch.device | str = "cpu") -> int | None:
    """Multiply-adds of one image, as torch's own counter finds them in convolutions and matrix products.

    Batch norms, activations and additions are not counted, as is the custom of the field. None where torch sees none of
    the work, as with a model that onnxruntime runs.
    """
    with FlopCounterMode(display=False) as counter:
        model(_inputs(model, 1, size, torch.device(device)))
    # One multiplication and one addition are two operations to the counter.
    return counter.get_total_flops() // 2 or None


def size_line(model: nn.Module, size: int = 112) -> str:
    """A network's parameters and multiply-adds in words: ``2.06 M parameters, 438 M multiply-adds an image``.

    Of a network that does not take (1, 3, size, size) images, the parameters alone are told. Its mode stays.
    """
    words = f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.2f} M parameters"
    training, half = model.training, isinstance(model, FaceBackbone) and model.fp16
    if isinstance(model, FaceBackbone):
        # Some processors take seconds for a large network in 16 bits.
        model.fp16 = False
    try:
        counted = multiply_adds(model.eval(), size)
    # A trainer's own network may take other images, and says so in its own way.
    except Exception:
        counted = None
    model.train(training)
    if isinstance(model, FaceBackbone):
        model.fp16 = half
    return words if counted is None else f"{words}, {counted / 1e6:.0f} M multiply-adds an image"


@torch.no_grad()
def images_per_second(
    models: Mapping[str, nn.Module],
    size: int = 112,
    device: torch.device | str = "cpu",
    *,
    batch_size: int = BATCH_SIZE,
    rounds: int = _ROUNDS,
    seconds: float = _SECONDS,
) -> dict[str, float]:
    """How fast models embed images that are already in memory, by name.

    They are timed in turns and the fastest pass of each counts: other work of the machine can only slow one down. No
    further pass of a model begins after so many ``seconds`` of it; one pass is always timed.
    """
    where = torch.device(device)
    durations: dict[str, list[float]] = {name: [] for name in models}
    for model in models.values():
        # One image, since a whole batch of a large model takes long on a small machine.
        model(_inputs(model, 1, size, where))
    for _ in range(rounds):
        for name, model in models.items():
            if durations[name] and sum(durations[name]) >= seconds:
                continue
            images = _inputs(model, batch_size, size, where)
            synchronize(where)
            began = time.perf_counter()
            model(images)
            synchronize(where)
            durations[name].append(time.perf_counter() - began)
    return {name: batch_size / min(taken) for name, taken in durations.items()}


def costs(
    models: Mapping[str, nn.Module],
    device: torch.device | str = "cpu",
    *,
    parameters: Mapping[str, int | None] = MappingProxyType({}),
    files: Mapping[str, Path | None] = MappingProxyType({}),
) -> dict[str, Cost]:
    """Everything above of several models.

    ``parameters`` are those of models that torch does not see into, ``files`` what the models were read from.
    """
    speeds = images_per_second(models, device=device)
    found = {}
    for name, model in models.items():
        counted = sum(parameter.numel() for parameter in model.parameters())
        file = files.get(name)
        found[name] = Cost(
            parameters.get(name) or counted or None,
            multiply_adds(model, device=device),
            speeds[name],
            latency(model, file, model.preprocessing.size if isinstance(model, Teacher) else 112, device),
            None if file is None else file.stat().st_size,
        )
    return found


@torch.no_grad()
def latency(
    model: nn.Module,
    file: Path | None = None,
    size: int = 112,
    device: torch.device | str = "cpu",
    *,
    seconds: float = _SECONDS / 2,
) -> Latency | None:
    """Time single images (1, 3, size, size) of a model in evaluation mode.

    An ONNX ``file`` is run as it is, by onnxruntime on the CPU with its own defaults, and ``model`` is not; None where
    onnxruntime does not run it, or only on several images at once. 20 images are always timed, no further one after so
    many ``seconds``, and 50 at most.
    """
    where = torch.device(device)
    if file is not None and file.suffix.lower() == ".onnx":
        try:
            run = _onnx_image(file, size)
            run()
        # onnxruntime's exceptions share no base class; a teacher's file may have been mended before it was run.
        except Exception:
            return None
    else:
        image = _inputs(model, 1, size, where)

        def run() -> None:
            model(image)
            synchronize(where)

        run()
    taken: list[float] = []
    while len(taken) < _FEWEST_RUNS or (len(taken) < _MOST_RUNS and sum(taken) < seconds):
        began = time.perf_counter()
        run()
        taken.append(time.perf_counter() - began)
    return Latency(*(float(value) for value in 1e3 * np.percentile(taken, (50, 95))))


def _onnx_image(file: Path, size: int) -> Callable[[], None]:
    """One image through an ONNX file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session: Any = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    (taken,) = session.get_inputs()
    usual = (1, 3, size, size)
    shape = [side if isinstance(side, int) else usual[axis] for axis, side in enumerate(taken.shape)]
    if shape[0] != 1:
        raise ValueError(f"the file takes {shape[0]} images at a time")
    image = np.random.default_rng(0).random(shape).astype(_NUMPY_TYPES[taken.type])
    return lambda: session.run(None, {taken.name: image})
