"""Checks 4 and 5: nobody waits for the GPU, and numbers that are no numbers are named."""

import itertools
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from arcface_kd.errors import NumberError
from arcface_kd.losses import fused
from arcface_kd.teachers.base import Teacher
from benchmarks.gpu.bare_machine import ROOT
from benchmarks.gpu.checks import Findings, Place
from benchmarks.gpu.runs import Runs, training_steps

_STEPS = 20
_METHODS = ("", "adadistill", "proxylesskd", "embedding", "ekd", "rkd", "kd", "gkd", "thkd", "crosskd", "tcs", "bank")
_TINY = ("alone", "proxylesskd", "adadistill, cached", "adadistill, degraded images")


@contextmanager
def _noted_waits(place: Place) -> Iterator[list[str]]:
    """Where the host has waited for the device, as ``file:line``."""
    found: list[str] = []
    cuda = place.device.type == "cuda"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if cuda:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            if cuda:
                torch.cuda.set_sync_debug_mode("default")
    for warning in caught:
        if "synchroniz" in str(warning.message) and "prototype" not in str(warning.message):
            path = Path(warning.filename)
            name = path.relative_to(ROOT) if path.is_relative_to(ROOT) else Path(*path.parts[-3:])
            found.append(f"{name}:{warning.lineno}")


def waits(place: Place, found: Findings) -> None:
    """Twenty steps of the compact trainer, teacher and optimiser included, for several methods and a cache."""
    teacher, student, identities, batch = ("thin_r18", "thin_r18", 4, 8) if place.tiny else ("r18", "mbf", 100, 40)
    # The narrow precision that a GPU's default is, for the cache as well: one of another is refused.
    runs = Runs(place, teacher, student, identities, batch, precision="bf16" if place.tiny else "fp16")
    shown = runs.teacher()
    kinds = {name or "alone": runs.kd(name) if name else {} for name in _METHODS}
    kinds["adadistill, cached"] = {"kd": "adadistill", "kd_cache": str(runs.cache)}
    kinds["adadistill, degraded images"] = {"kd": "adadistill", "kd_option": "student.augment=quality"}
    kinds["an average of weights"] = {"ema": 0.999}
    for name, keys in kinds.items():
        if place.tiny and name not in _TINY:
            continue
        try:
            places = _waits_of(name, runs, shown, place, keys)
        except Exception as error:
            # The other kinds say something all the same.
            found.expect(False, f"{name}: {type(error).__name__}: {error}")
            continue
        found.add(f"{name}: waits after the first step", len(places))
        for where, times in Counter(places).most_common():
            found.expect(False, f"{name}: {times} waits at {where}")


def _waits_of(name: str, runs: Runs, teacher: Teacher, place: Place, keys: dict[str, Any]) -> list[str]:
    # One method shows what compiled kernels do; what waits in the others does so with torch's own, and at once.
    compiles = fused._compiles if name.startswith("adadistill") else lambda: False
    with mock.patch.object(fused, "_compiles", compiles):
        run = runs.run(f"waits_{name}", teacher, **keys)
        steps = training_steps(run)
        next(steps)
        with _noted_waits(place) as places:
            for _ in itertools.islice(steps, 2 if place.tiny else _STEPS - 1):
                pass
        run.head.monitor.settle()
    return places


def bad_numbers(place: Place, found: Findings) -> None:
    """NaN in an image and a label that is no class end the run within three steps, in words, and leave CUDA alive."""
    teacher, student, identities, batch = ("thin_r18", "thin_r18", 4, 8) if place.tiny else ("r18", "mbf", 100, 40)
    runs = Runs(place, teacher, student, identities, batch)
    for name, words in {"NaN in an image": "NaN", "a label that is no class": f"num_classes={identities}"}.items():
        # Without a loss scale; with one, steps whose gradients overflow are passed over.
        run = runs.run(f"bad_{words}", runs.teacher(), kd="adadistill", fp16=False)
        message = "nothing"
        try:
            for step, (images, labels) in enumerate(itertools.islice(run.loader, 5), start=1):
                if step == 2 and words == "NaN":
                    images[3] = float("nan")
                elif step == 2:
                    labels[3] = identities + 5
                run._train_step(images, labels)
        except NumberError as error:
            message = str(error)
        found.add(name, message)
        found.expect(bool(re.search("step 2", message)) and words in message, f"{name}: met {message!r}")
        alive = float(torch.ones(3, device=place.device).sum())
        found.expect(alive == 3, f"{name}: the device does not compute any more")
