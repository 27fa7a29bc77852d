"""The thirteen checks, in order, each with its own time limit, and what one of them is handed and hands back."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch


class Check(NamedTuple):
    """One check.

    Attributes:
        number: as ``ONLY`` takes it.
        title: what it looks at.
        seconds: its time limit.
        function: ``module:function`` of this package; takes a :class:`Place` and a :class:`Findings`.
        alone: whether it measures speed and wants the machine for itself; all others run side by side after it.
    """

    number: int
    title: str
    seconds: int
    function: str
    alone: bool = False


# Most of a check's time goes into starting processes and compiling kernels. Those that run side by side are thirty
# processes that share the cores, and have what the others leave of eight minutes: three at least.
CHECKS = (
    Check(1, "versions and products with fp32 results", 60, "environment:versions"),
    Check(2, "tests marked gpu", 250, "environment:marked_tests"),
    Check(3, "every method against fp64 on the CPU", 250, "methods:against_fp64"),
    Check(4, "no wait for the GPU after the first step", 250, "steps:waits"),
    Check(5, "NaN and bad labels are named", 190, "steps:bad_numbers"),
    Check(6, "an ONNX teacher against onnxruntime on the CPU", 40, "teachers:onnx", alone=True),
    Check(7, "arcface_torch's train_v2.py", 250, "host:trainer"),
    Check(8, "the compact trainer: resume, CPU and back, merge-head", 250, "compact:trainer"),
    Check(9, "two ranks on one GPU over gloo", 190, "two_ranks:same_gradients"),
    Check(10, "a cache: rows, speed, kill and go on", 190, "teachers:cache"),
    Check(11, "training speed, and a profile of five steps", 150, "speed:training", alone=True),
    Check(12, "the head against PartialFC_V2 and two products", 60, "speed:head", alone=True),
    Check(13, "the loader, by workers", 30, "speed:loader", alone=True),
)


@dataclass(frozen=True)
class Place:
    """Where and how large.

    Attributes:
        device: ``cuda`` or ``cpu``.
        tiny: sizes that show that it runs and nothing about speed.
        scratch: a folder that all checks of a run share.
        host: a checkout of arcface_torch, patched or not; None where none was given.
    """

    device: torch.device
    tiny: bool
    scratch: Path
    host: Path | None = None


class Skipped(Exception):
    """A check that cannot be made here; the message says what is missing."""


@dataclass
class Findings:
    """What a check has found; written to its file at once, so that a check that hangs leaves what it had.

    Attributes:
        file: a JSON file.
        numbers: measured numbers and names of things, by what they are.
        faults: what is wrong; a check without faults has passed.
        goals: goals of speed, and whether they were met; one that was missed is no fault.
    """

    file: Path
    numbers: dict[str, object] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    goals: dict[str, bool] = field(default_factory=dict)

    def add(self, name: str, value: object) -> None:
        """Keep a number."""
        self.numbers[name] = float(f"{value:.4g}") if isinstance(value, float) else value
        self.save()

    def expect(self, held: bool, fault: str) -> None:
        """Note a fault unless something holds."""
        if not held:
            self.faults.append(fault)
            self.save()

    def goal(self, claim: str, held: bool) -> None:
        """Note whether a goal was met."""
        self.goals[claim] = held
        self.save()

    def save(self) -> None:
        """Write the file, in one step: a check may be ended at any moment."""
        content = {"numbers": self.numbers, "faults": self.faults, "goals": self.goals}
        unfinished = self.file.with_suffix(".new")
        unfinished.write_text(json.dumps(content), encoding="utf-8")
        unfinished.replace(self.file)
