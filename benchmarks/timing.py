"""Wall-clock seconds of several providers side by side."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping

import torch

from arcface_kd.system.device import synchronize


def interleaved_seconds(
    providers: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, *, warm_ups: int = 1
) -> dict[str, float]:
    """The median seconds of each provider over rounds in which all of them run, one after the other.

    A machine that grows slower or busier meanwhile does so for all of them. Every other round goes backwards, so that
    nobody always runs behind the same neighbour.

    Args:
        providers: functions by name; each runs one step.
        rounds: how many rounds count, at least 1.
        device: waited for before and after each step where it is a GPU.
        warm_ups: rounds before them that do not count.

    Returns:
        Seconds by name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in providers}
    for number in range(warm_ups + rounds):
        order = list(providers)
        for name in order if number % 2 == 0 else reversed(order):
            gc.collect()
            gc.disable()
            synchronize(device)
            begin = time.perf_counter()
            providers[name]()
            synchronize(device)
            elapsed = time.perf_counter() - begin
            gc.enable()
            if number >= warm_ups:
                seconds[name].append(elapsed)
    return {name: statistics.median(values) for name, values in seconds.items()}
