"""Interleaved rounds, with a clock that the providers themselves move."""

import pytest
import torch

from benchmarks import timing
from benchmarks.timing import interleaved_seconds


def test_medians_of_rounds_that_go_to_and_fro(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = [0.0], ""
    lasts = {"a": iter([50.0, 1.0, 9.0, 2.0]), "b": iter([60.0, 3.0, 3.0, 4.0])}
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def step(name: str) -> None:
        nonlocal calls
        calls += name
        clock[0] += next(lasts[name])

    seconds = interleaved_seconds({"a": lambda: step("a"), "b": lambda: step("b")}, 3, torch.device("cpu"))
    assert seconds == {"a": 2.0, "b": 3.0}
    assert calls == "abbaabba"
