"""Checks 11 to 13: images a second of training and loading, milliseconds of the head."""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from arcface_kd.data.dataset import open_dataset
from arcface_kd.data.loader import FaceLoader
from arcface_kd.losses import fused
from arcface_kd.teachers.base import Teacher
from benchmarks import head as head_benchmark
from benchmarks import learned
from benchmarks.gpu.checks import Findings, Place
from benchmarks.gpu.inputs import records
from benchmarks.gpu.runs import Runs, training_steps

# Classes of one of eight ranks: MS1MV2, Glint360K, WebFace42M.
_CLASSES = (10_718, 45_029, 257_489)


def _wait(place: Place) -> None:
    if place.device.type == "cuda":
        torch.cuda.synchronize()


def training(place: Place, found: Findings) -> None:
    """Students alone, with the teacher in each step, and from its cache; then a profile of five steps."""
    # Enough images that no epoch ends within the measured steps, and no more: they are drawn before the first one.
    teacher, identities, batch = ("thin_r18", 4, 8) if place.tiny else ("r50", 656, 128)
    warm, steps, rounds = (1, 1, 1) if place.tiny else (2, 10, 3)
    torch.backends.cudnn.benchmark = True
    loaded: dict[str, Teacher] = {}
    for student in ("thin_r18",) if place.tiny else ("mbf", "r18"):
        runs = Runs(place, teacher, student, identities, batch)
        loaded = loaded or {each: runs.teacher(each) for each in (("fp32",) if place.tiny else ("fp32", "fp16"))}
        cached = {"kd": "adadistill", "kd_cache": str(runs.cache)}
        made = {
            "alone": runs.run(f"{student}_alone"),
            "cached": runs.run(f"{student}_cached", loaded["fp32"], **cached),
        }
        for precision in () if place.tiny else ("fp32", "fp16"):
            made[f"{teacher} {precision}"] = runs.run(f"{student}_{precision}", loaded[precision], kd="adadistill")
        going = {name: training_steps(run) for name, run in made.items()}
        rates: dict[str, list[float]] = {name: [] for name in made}
        for _ in range(rounds):
            for name, stream in going.items():
                rates[name].append(batch / _seconds_a_step(place, stream, warm, steps))
                # After each round: a check that is ended has said what it had.
                found.add(f"{student}, {name}: images/s", statistics.median(rates[name]))
        speed = {name: statistics.median(values) for name, values in rates.items()}
        share = speed["cached"] / speed["alone"]
        found.add(f"{student}, cached: of the student alone", share)
        if not place.tiny:
            found.goal(f"{student}, cached: at least 0.98 of the student alone ({share:.3f})", share >= 0.98)
        profiled = training_steps(made["cached"])
        next(profiled)
        step = partial(next, profiled)
        _where_time_goes(place, f"{student}, cached", step, 1 if place.tiny else 5, 12, found)


def _seconds_a_step(place: Place, stream: Iterator[Tensor], warm: int, steps: int) -> float:
    for _ in itertools.islice(stream, warm):
        pass
    _wait(place)
    began = time.perf_counter()
    for _ in itertools.islice(stream, steps):
        pass
    _wait(place)
    return (time.perf_counter() - began) / steps


def _where_time_goes(
    place: Place, name: str, step: Callable[[], object], count: int, shown: int, found: Findings
) -> None:
    """Where some steps spend their time, and how many kernels they launch."""
    cuda = place.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiled:
        for _ in range(count):
            step()
        _wait(place)
    rows: Any = profiled.key_averages()

    def spent(row: Any) -> float:
        return float(row.self_device_time_total if cuda else row.self_cpu_time_total)

    if cuda:
        launches = sum(row.count for row in rows if "LaunchKernel" in row.key)
        found.add(f"{name}: kernel launches a step", launches / count)
        # An operation's row has its kernels' time too, as has that of a region that somebody has given a name.
        rows = [row for row in rows if row.device_type == DeviceType.CUDA and not row.is_user_annotation]
    found.add(f"{name}: {'GPU' if cuda else 'CPU'} ms a step", sum(map(spent, rows)) / 1000 / count)
    for row in sorted(rows, key=spent, reverse=True)[:shown]:
        found.add(f"{name}: ms a step in {row.key[:60]}", spent(row) / 1000 / count)


def head(place: Place, found: Findings) -> None:
    """A step of AdaDistill's head, of the host's PartialFC_V2, and of the two products that nobody can do without."""
    batch, dimension, repeats = (8, 16, 1) if place.tiny else (1024, 512, 10)
    narrow = torch.float16 if place.device.type == "cuda" else None
    with learned.no_process_group_left():
        _heads(place, found, narrow, batch, dimension, repeats)


def _heads(place: Place, found: Findings, narrow: torch.dtype | None, batch: int, dimension: int, repeats: int) -> None:
    for classes in (60,) if place.tiny else _CLASSES:
        ours = head_benchmark.adadistill_step(classes, batch, dimension, place.device, narrow)
        centers = torch.randn(classes, dimension, device=place.device, dtype=narrow)
        providers: dict[str, Callable[[], object]] = {
            "ours": ours,
            "two products": head_benchmark.floor_step(centers, batch),
        }
        if place.host is not None:
            sizes = learned.Sizes(classes, batch, dimension)
            providers["PartialFC_V2"] = learned.arcface_torch_step(sizes, place.device, place.host)
        milliseconds = {name: _milliseconds(place, step, repeats) for name, step in providers.items()}
        for name, value in milliseconds.items():
            found.add(f"C = {classes:,}, B = {batch:,}, {name}: ms", value)
        if not place.tiny:
            floor = milliseconds["ours"] / milliseconds["two products"]
            found.goal(f"C = {classes:,}: at most 1.5 times the two products ({floor:.2f})", floor <= 1.5)
            if "PartialFC_V2" in milliseconds:
                share = milliseconds["ours"] / milliseconds["PartialFC_V2"]
                found.goal(f"C = {classes:,}: at most 1/5 of PartialFC_V2 (1/{1 / share:.1f})", share <= 0.2)
        _where_time_goes(place, f"C = {classes:,}, ours", ours, 1 if place.tiny else 5, 6, found)
        del providers, centers, ours
        launched = head_benchmark.adadistill_step(classes, batch, dimension, place.device, narrow, replayed=False)
        found.add(f"C = {classes:,}, ours without a graph: ms", _milliseconds(place, launched, repeats))
        with mock.patch.object(fused, "_compiles", return_value=False):
            found.add(f"C = {classes:,}, and with torch's own kernels: ms", _milliseconds(place, launched, repeats))


def _milliseconds(place: Place, step: Callable[[], object], repeats: int) -> float:
    """The median of five means over steps that nobody waits between, behind those that compile and record."""
    for _ in range(5):
        step()
    times = []
    for _ in range(5 if repeats > 1 else 1):
        _wait(place)
        began = time.perf_counter()
        for _ in range(repeats):
            step()
        _wait(place)
        times.append((time.perf_counter() - began) / repeats)
    return 1000 * statistics.median(times)


def loader(place: Place, found: Findings) -> None:
    """Images a second onto the device, by the number of workers."""
    identities, batch = (4, 8) if place.tiny else (512, 128)
    faces = open_dataset(records(place, identities))
    for workers in (1,) if place.tiny else (1, 2, 4, 8):
        loader = FaceLoader(faces, batch_size=batch, num_workers=workers, device=place.device)
        batches = iter(loader)
        next(batches)
        began, images = time.perf_counter(), 0
        for pixels, _ in batches:
            images += len(pixels)
        _wait(place)
        found.add(f"{workers} workers: images/s", images / (time.perf_counter() - began))
