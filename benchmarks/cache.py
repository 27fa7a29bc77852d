"""Training with the teacher's embeddings in a cache, against the same student alone and against the online teacher.

All three run in one process, in turns, through the drop-ins of :mod:`arcface_kd.host.attach`: loader, student and head.

Providers, each with the names of teacher and student behind it:
    alone: the student with its learned classifier, no distillation.
    cached: AdaDistill from a filled cache.
    online: AdaDistill with the teacher in every step, in the narrow number format of the device.
"""

import itertools
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from easydict import EasyDict
from torch import nn

from arcface_kd.backbones import get_backbone
from arcface_kd.config.arcface_torch import BASE
from arcface_kd.config.kd import KDConfig
from arcface_kd.distillation.distiller import Distiller
from arcface_kd.distillation.drop_ins import drop_ins
from arcface_kd.losses.margin import Margin
from arcface_kd.system.device import autocast_dtype
from arcface_kd.teachers.base import Teacher, load_teacher
from arcface_kd.teachers.cache.embedding_cache import readable_size
from arcface_kd.teachers.cache.fill import fill_cache
from benchmarks.drawn_records import draw_records
from benchmarks.record import Recorder, Row, print_table, print_verdict, size
from benchmarks.timing import interleaved_seconds

MARGIN = Margin(64.0, 1.0, 0.45, 0.0)
LEAST_SHARE = 0.97
# Name, images, and the dimension that published teachers have.
DATA_SETS = (("MS1MV2", 5_822_653), ("MS1MV3", 5_179_510), ("Glint360K", 17_091_657), ("WebFace42M", 42_474_557))
DIMENSION = 512


@dataclass(frozen=True)
class Pair:
    """A teacher and a student.

    Attributes:
        teacher: a network's name; it gets random weights, which take as long as trained ones.
        student: a network's name.
        classes: C of the head.
        images: a round's images.
        batch: B.
        rounds: rounds that count.
    """

    teacher: str
    student: str
    classes: int
    images: int
    batch: int
    rounds: int


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        pairs: r50 to mbf at MS1MV2's classes, and the demo's.
        onnx_student: the student of the teacher that the demo is given on real faces, where the folder is at hand.
        dimension: D.
    """

    pairs: tuple[Pair, ...] = field(
        default=(
            Pair("r50", "mbf", 85_742, images=64, batch=32, rounds=5),
            Pair("thin_r18", "thin_r18", 300, images=512, batch=128, rounds=7),
        )
    )
    onnx_student: Pair | None = field(
        default=Pair("mobilefacenet_512.onnx", "thin_r18", 985, images=512, batch=128, rounds=5)
    )
    dimension: int = DIMENSION


TINY = Sizes((Pair("thin_r10", "thin_r10", 12, images=8, batch=4, rounds=1),), None, dimension=16)


def teacher_of(pair: Pair, dimension: int, device: torch.device) -> Teacher:
    """A pair's teacher: the file of its name, or the network with random weights, in the device's narrow format."""
    real = os.environ.get("ARCFACE_KD_REAL_DATA")
    if pair.teacher.endswith(".onnx"):
        assert real is not None
        options = {"channels": "bgr", "mean": 127, "std": 128}
        return load_teacher(Path(real) / "teachers" / pair.teacher, options, device=device)
    narrow = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(autocast_dtype(device) or torch.float32, "fp32")
    torch.manual_seed(0)
    network = get_backbone(pair.teacher, num_features=dimension)
    # With random weights the activations of a deep network grow from unit to unit until they are inf, unless its batch
    # norms have seen some.
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
    with torch.no_grad():
        network.train()(torch.rand(4, 3, 112, 112) * 2 - 1)
    return load_teacher(network, {"precision": narrow}, device=device)


def config_of(pair: Pair, dimension: int, folder: Path) -> EasyDict:
    """A config of a run of the pair's student over the records in a folder."""
    config = EasyDict(BASE)
    config.update(
        rec=str(folder),
        network=pair.student,
        embedding_size=dimension,
        num_classes=pair.classes,
        num_image=pair.images,
        batch_size=pair.batch,
        num_workers=0,
        frequent=10**9,
        output=str(folder),
    )
    return config


def epoch_of(config: EasyDict, distiller: Distiller, device: torch.device) -> Callable[[], None]:
    """One epoch of training, as the compact trainer's loop goes.

    Args:
        config: of the run.
        distiller: its wiring.
        device: where it trains.
    """
    made = drop_ins(lambda: config, distiller=distiller)
    loader = made.get_dataloader(config.rec, device.index or 0, config.batch_size, num_workers=config.num_workers)
    narrow = autocast_dtype(device) is not None
    student = made.get_model(config.network, dropout=0.0, fp16=narrow, num_features=config.embedding_size)
    student.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    head = made.PartialFC_V2(MARGIN, config.embedding_size, config.num_classes, 1.0, False).to(device)
    optimizer = torch.optim.SGD(
        [{"params": list(student.parameters())}, {"params": list(head.parameters())}], lr=1e-3, momentum=0.9
    )
    epochs = itertools.count()

    def epoch() -> None:
        student.train()
        loader.sampler.set_epoch(next(epochs))
        for images, labels in loader:
            loss = head(student(images.contiguous(memory_format=torch.channels_last)), labels)
            loss.backward()
            nn.utils.clip_grad_norm_(student.parameters(), 5.0)
            optimizer.step()
            optimizer.zero_grad()

    return epoch


def run(sizes: Sizes, device: torch.device) -> list[Row]:
    """Measure, print the tables and the verdict.

    Args:
        sizes: what to measure.
        device: where.

    Returns:
        The rows.
    """
    recorder = Recorder("cache", device)
    pairs = list(sizes.pairs)
    if sizes.onnx_student is not None and "ARCFACE_KD_REAL_DATA" in os.environ:
        pairs.append(sizes.onnx_student)
    for pair in pairs:
        with tempfile.TemporaryDirectory() as folder:
            _measure(recorder, pair, sizes.dimension, device, Path(folder))
    lines = []
    for name, images in DATA_SETS:
        count = 4.0 * images * DIMENSION
        recorder.add("cache", f"{name} N={images} D={DIMENSION}", "gigabytes", count / 1e9)
        lines.append((name, f"{images:,}", readable_size(count)))
    print_table(f"A cache of {DIMENSION} dimensions on the disk", ("data set", "images", "size"), lines)
    return recorder.rows


def _measure(recorder: Recorder, pair: Pair, dimension: int, device: torch.device, folder: Path) -> None:
    draw_records(folder, pair.images)
    teacher = teacher_of(pair, dimension, device)
    config = config_of(pair, dimension, folder)
    # One identity an image in the records; the head has as many classes as the run that is stood in for.
    config.num_classes = max(pair.classes, pair.images)
    fill_cache(EasyDict(config, kd_cache=str(folder / "rows")), teacher=teacher)
    kinds: dict[str, dict[str, Any]] = {
        "alone": {},
        "cached": {"methods": ("adadistill",), "cache": str(folder / "rows")},
        "online": {"methods": ("adadistill",)},
    }
    epochs = {
        name: epoch_of(config, Distiller(KDConfig(**keys), teacher if keys else None), device)
        for name, keys in kinds.items()
    }
    seconds = interleaved_seconds(epochs, pair.rounds, device)
    shown = pair.images // pair.batch * pair.batch
    speed = {name: shown / value for name, value in seconds.items()}
    whose, where = f"{pair.teacher}->{pair.student}", size(config.num_classes, pair.batch, dimension)
    for name, value in speed.items():
        recorder.add(f"{name} {whose}", where, "images_per_second", value)
    recorder.add(f"cached {whose}", where, "speed_over_alone", speed["cached"] / speed["alone"])
    recorder.add(f"cached {whose}", where, "speed_over_online", speed["cached"] / speed["online"])
    print_table(
        f"Training images/s, {whose}, {where}",
        ("provider", "images/s", "of alone"),
        [(name, f"{value:.1f}", f"{value / speed['alone']:.3f}") for name, value in speed.items()],
    )
    share = speed["cached"] / speed["alone"]
    print_verdict(
        f"distilling from a filled cache costs at most {1 - LEAST_SHARE:.0%}",
        f"{share:.3f} of the student alone, {speed['cached'] / speed['online']:.2f} of the online teacher",
        share >= LEAST_SHARE,
    )
