"""The measured peak: what a step takes, and nothing that the set-up has left."""

from collections.abc import Callable

import pytest
import torch

from benchmarks.peak_memory import can_measure, peak_mb

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not can_measure(CPU), reason="no /proc/self/clear_refs: not Linux")


def _step_that_takes(megabytes: int, *, before: int = 0) -> Callable[[], object]:
    """A set-up that keeps ``before`` MB and has freed as much again, and a step."""
    kept = torch.ones(before * 250_000)
    freed = [torch.ones(25_000) for _ in range(before * 10)]
    del freed
    return lambda: float(torch.ones(megabytes * 250_000).sum() + kept.numel())


@pytest.mark.slow
def test_the_peak_of_a_step_is_what_it_allocates() -> None:
    small, large = (peak_mb(_step, CPU, megabytes, 100) for megabytes in (1, 81))
    assert 70 < large - small < 90
    assert small < 30


def _step(megabytes: int, before: int) -> Callable[[], object]:
    return _step_that_takes(megabytes, before=before)
