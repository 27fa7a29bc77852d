"""Training with TCS against the same student alone and against embedding distillation with the teacher in every step.

All three go through :func:`arcface_kd.drop_ins`: speed in one process, in turns; memory each in a process of its own,
from before the first network is made, so that the teacher's weights count.

Providers, each with the names of teacher and student behind it:
    alone: the student with its learned classifier, no distillation.
    tcs: TCS from a filled cache; no teacher is loaded.
    online: embedding distillation with the teacher in every step, in the narrow number format of the device.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from easydict import EasyDict

from arcface_kd.config.kd import KDConfig
from arcface_kd.distillation.distiller import Distiller
from arcface_kd.teachers.cache.fill import fill_cache
from benchmarks.cache import Pair, config_of, epoch_of, teacher_of
from benchmarks.drawn_records import draw_records
from benchmarks.peak_memory import can_measure, peak_mb
from benchmarks.record import Recorder, Row, print_table, print_verdict, size
from benchmarks.timing import interleaved_seconds

LEAST_SHARE, MOST_MEMORY = 0.95, 1.05
KINDS = ("alone", "tcs", "online")


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        pairs: r50 to mbf at MS1MV2's classes, and r50 to the demo's student.
        dimension: D.
    """

    pairs: tuple[Pair, ...] = field(
        default=(
            Pair("r50", "mbf", 85_742, images=64, batch=32, rounds=5),
            Pair("r50", "thin_r18", 985, images=256, batch=128, rounds=7),
        )
    )
    dimension: int = 512


TINY = Sizes((Pair("thin_r10", "thin_r10", 12, images=8, batch=4, rounds=1),), dimension=16)


def _distiller(kind: str, pair: Pair, dimension: int, device: torch.device, cache: Path) -> Distiller:
    if kind == "alone":
        return Distiller(KDConfig())
    if kind == "tcs":
        return Distiller(KDConfig(methods=("tcs",), cache=str(cache)))
    return Distiller(KDConfig(methods=("embedding",)), teacher_of(pair, dimension, device))


def _first_epoch(
    kind: str, pair: Pair, dimension: int, device: torch.device, config: dict[str, Any], cache: Path
) -> Callable[[], None]:
    """A run's beginning, from nothing: the networks, the optimiser and an epoch."""
    epoch: list[Callable[[], None]] = []

    def step() -> None:
        if not epoch:
            distiller = _distiller(kind, pair, dimension, device, cache)
            epoch.append(epoch_of(EasyDict(config), distiller, device))
        epoch[0]()

    return step


def run(sizes: Sizes, device: torch.device) -> list[Row]:
    """Measure, print the tables and the verdicts.

    Args:
        sizes: what to measure.
        device: where.

    Returns:
        The rows.
    """
    recorder = Recorder("tcs", device)
    for pair in sizes.pairs:
        with tempfile.TemporaryDirectory() as folder:
            _measure(recorder, pair, sizes.dimension, device, Path(folder))
    return recorder.rows


def _measure(recorder: Recorder, pair: Pair, dimension: int, device: torch.device, folder: Path) -> None:
    draw_records(folder, pair.images)
    config = config_of(pair, dimension, folder)
    # One identity an image in the records; the head has as many classes as the run that is stood in for.
    config.num_classes = max(pair.classes, pair.images)
    # Axes are dropped by shares of a run's length: in the middle of a long one, all that TCS does is done.
    config.num_epoch = 2 * (pair.rounds + 1)
    cache = folder / "rows"
    fill_cache(EasyDict(config, kd_cache=str(cache)), teacher=teacher_of(pair, dimension, device))
    epochs = {kind: epoch_of(config, _distiller(kind, pair, dimension, device, cache), device) for kind in KINDS}
    seconds = interleaved_seconds(epochs, pair.rounds, device)
    del epochs
    shown = pair.images // pair.batch * pair.batch
    speed = {kind: shown / value for kind, value in seconds.items()}
    memory: dict[str, float] = {}
    if can_measure(device):
        for kind in KINDS:
            memory[kind] = peak_mb(_first_epoch, device, kind, pair, dimension, device, dict(config), cache)
    whose, where = f"{pair.teacher}->{pair.student}", size(config.num_classes, pair.batch, dimension)
    for kind in KINDS:
        recorder.add(f"{kind} {whose}", where, "images_per_second", speed[kind])
        if kind in memory:
            recorder.add(f"{kind} {whose}", where, "peak_mb", memory[kind])
    for other in ("alone", "online"):
        recorder.add(f"tcs {whose}", where, f"speed_over_{other}", speed["tcs"] / speed[other])
        if memory:
            recorder.add(f"tcs {whose}", where, f"memory_over_{other}", memory["tcs"] / memory[other])
    print_table(
        f"Training, {whose}, {where}",
        ("provider", "images/s", "of alone", "peak MB", "of alone"),
        [
            (
                kind,
                f"{speed[kind]:.1f}",
                f"{speed[kind] / speed['alone']:.3f}",
                f"{memory[kind]:.0f}" if memory else "-",
                f"{memory[kind] / memory['alone']:.3f}" if memory else "-",
            )
            for kind in KINDS
        ],
    )
    share = speed["tcs"] / speed["alone"]
    print_verdict(
        f"TCS trains at least at {LEAST_SHARE:.0%} of the student alone",
        f"{share:.3f} of it, {speed['tcs'] / speed['online']:.2f} of online embedding distillation",
        share >= LEAST_SHARE,
    )
    if memory:
        more = memory["tcs"] / memory["alone"]
        print_verdict(
            f"TCS takes at most {MOST_MEMORY - 1:.0%} more memory than the student alone",
            f"{more:.3f} of it, {memory['tcs'] / memory['online']:.2f} of online embedding distillation",
            more <= MOST_MEMORY,
        )
