"""How much memory a step takes above what stands before it, measured in a process of its own."""

import ctypes
import gc
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

# What a benchmark measures: a function that sets everything up and returns the step.
MakeStep = Callable[..., Callable[[], object]]

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_STEPS = 2


def can_measure(device: torch.device) -> bool:
    """Whether this system tells a process its own peak: Linux, or any with a GPU to ask."""
    return device.type == "cuda" or (_STATUS.exists() and _CLEAR.exists())


def peak_mb(make_step: MakeStep, device: torch.device, *arguments: Any) -> float:
    """Peak memory of two steps above what ``make_step`` has set up, in MB (1e6 bytes).

    On a CPU it is resident memory of a fresh process, pages of libraries that the step is the first to touch
    included; on a GPU, what torch has allocated.

    Args:
        make_step: function of a module; called in the fresh process.
        device: where the step runs.
        arguments: its arguments, picklable.
    """
    # A process that was forked would inherit memory that its step could use for nothing.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(_measure, make_step, device, torch.get_num_threads(), arguments).result()


def _measure(make_step: MakeStep, device: torch.device, threads: int, arguments: tuple[Any, ...]) -> float:
    torch.set_num_threads(threads)
    step = make_step(*arguments)
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    else:
        _give_back_free_memory()
        before = _status("VmRSS")
        _CLEAR.write_text("5")  # sets VmHWM to VmRSS
    for _ in range(_STEPS):
        step()
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")
    return (peak - before) / 1e6


def _give_back_free_memory() -> None:
    """Without it the step could live on what the set-up has freed, and seem to need nothing."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS} has no line {name}")
