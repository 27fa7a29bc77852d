"""A training step of each method against the same student alone: what distilling costs once the teacher is cached.

All students train in one process, in turns, through the drop-ins of :mod:`arcface_kd.host.attach`, as in
:mod:`benchmarks.cache`. Methods that compare embeddings read the teacher's from a filled cache; those that want a
classifier get the class means.

Providers:
    alone: the student with its learned classifier, no distillation.
    METHOD: each installed method with its default knobs, and AdaDistill joined with ``embedding``. ``shkd`` is three
        runs and has no row: its first costs what ``alone`` does, its third what the method that it distils with does.
"""

import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from easydict import EasyDict

from arcface_kd import registry
from arcface_kd.config.kd import CLASS_MEANS, KDConfig
from arcface_kd.distillation.distiller import Distiller
from arcface_kd.methods.shkd.stages import NAME as THREE_RUNS
from arcface_kd.teachers.cache.fill import fill_cache
from benchmarks.cache import DIMENSION, Pair, config_of, epoch_of, teacher_of
from benchmarks.drawn_records import draw_records
from benchmarks.record import Recorder, Row, print_table, size
from benchmarks.timing import interleaved_seconds

JOINED = ("adadistill+embedding",)


def _teacher() -> str:
    return "mobilefacenet_512.onnx" if "ARCFACE_KD_REAL_DATA" in os.environ else "mobilefacenet"


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        pair: a teacher that ``crosskd`` can cut, and a student, at the size of the README's runs on real faces.
        dimension: D, of both.
    """

    pair: Pair = field(default_factory=lambda: Pair(_teacher(), "thin_r18", 985, images=985, batch=128, rounds=5))
    dimension: int = DIMENSION


TINY = Sizes(Pair("thin_r10", "thin_r10", 8, images=8, batch=4, rounds=1), dimension=16)


def names() -> list[str]:
    """What ``--kd`` is given, one after the other."""
    return [name for name in registry.entry_points(registry.METHODS) if name != THREE_RUNS] + [*JOINED]


def run(sizes: Sizes, device: torch.device) -> list[Row]:
    """Measure and print the table.

    Args:
        sizes: what to measure.
        device: where.

    Returns:
        The rows.
    """
    recorder = Recorder("methods", device)
    pair = sizes.pair
    with tempfile.TemporaryDirectory() as folder:
        draw_records(Path(folder), pair.images)
        teacher = teacher_of(pair, sizes.dimension, device)
        config = config_of(pair, sizes.dimension, Path(folder))
        # With the round that does not count: some methods go by how far the run is.
        config.num_epoch = pair.rounds + 1
        cache = str(Path(folder) / "rows")
        fill_cache(EasyDict(config, kd_cache=cache), teacher=teacher)
        epochs = {"alone": epoch_of(config, Distiller(KDConfig()), device)}
        for name in names():
            kd = KDConfig(methods=tuple(name.split("+")), cache=cache, classifier=CLASS_MEANS)
            epochs[name] = epoch_of(config, Distiller(kd, teacher), device)
        seconds = interleaved_seconds(epochs, pair.rounds, device)
    where = size(pair.classes, pair.batch, sizes.dimension)
    for name, value in seconds.items():
        recorder.add(name, where, "step_over_alone", value / seconds["alone"])
    print_table(
        f"A training step from a filled cache, {pair.teacher}->{pair.student}, {where}",
        ("method", "of alone"),
        [(name, f"{value / seconds['alone']:.2f}") for name, value in seconds.items()],
    )
    return recorder.rows
