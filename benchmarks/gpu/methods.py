"""Check 3: every method's loss and gradient against the same method in fp64 on the CPU."""

import itertools
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from arcface_kd import registry
from arcface_kd.distillation.image_quality import ImageQuality
from arcface_kd.distributed.ranks import RankGroup
from arcface_kd.losses.margin import AdaFaceMargin, Margin
from arcface_kd.methods.base import Batch, Method, RunContext
from arcface_kd.methods.learned_classifier import LearnedClassifier
from arcface_kd.teachers.cache.embedding_cache import EmbeddingCache
from benchmarks.gpu.checks import Findings, Place

# shkd is three runs and no loss of its own.
_NO_LOSS = ("shkd",)
_CLASSIFIER = "the learned classifier"
_ADAFACE = "adadistill under AdaFace's margin"
# Relative, of loss and gradient: two steps, one after the other. A logit of 64 in 16 bits is off by 2^-11 of it.
_TOLERANCE = {torch.float32: 2e-4, torch.float16: 2e-2}
_IMAGES = 64
_PROCESSES = 5


def against_fp64(place: Place, found: Findings) -> None:
    """Each method in fp32 and fp16, with all classes and with a sample and a filter, two steps each."""
    names = [_CLASSIFIER, _ADAFACE, *(name for name in registry.entry_points(registry.METHODS) if name not in _NO_LOSS)]
    if place.tiny:
        outcomes = [_of_method(name, place) for name in names]
    else:
        # The first step of each compiles its kernels.
        with ProcessPoolExecutor(_PROCESSES, multiprocessing.get_context("spawn"), torch.set_num_threads, (2,)) as pool:
            outcomes = list(pool.map(_of_method, names, itertools.repeat(place)))
    for numbers, faults in outcomes:
        for name, number in numbers.items():
            found.add(name, number)
        for fault in faults:
            found.expect(False, fault)


def _of_method(name: str, place: Place) -> tuple[dict[str, float], list[str]]:
    """Numbers and faults of one method."""
    rows, classes, dimension = (12, 40, 16) if place.tiny else (256, 5000, 128)
    cache = _filled_cache(place.scratch / f"methods_rows_{name.replace(' ', '_')}", dimension)
    numbers, faults = {}, []
    for dtype, tolerance in _TOLERANCE.items():
        worst = 0.0
        for sample_rate, threshold in ((0.3, 0.4),) if place.tiny else ((1.0, 0.0), (0.3, 0.4)):
            # As in a run, which has one of each: what is compiled for several shares a limit.
            torch.compiler.reset()
            context = _context(classes, dimension, sample_rate, threshold, cache)
            if name == _ADAFACE:
                context = replace(context, margin=AdaFaceMargin(64.0, filter_threshold=threshold))
            expected = _steps(name, context, rows, torch.device("cpu"), torch.float64)
            narrow = replace(context, product_dtype=None if dtype is torch.float32 else dtype)
            try:
                met = _steps(name, narrow, rows, place.device, torch.float32)
            except Exception as error:
                faults.append(f"{name}, {dtype}, sample_rate {sample_rate}: {type(error).__name__}: {error}")
                continue
            difference = max(_difference(a, b) for a, b in zip(met, expected, strict=True))
            worst = max(worst, difference)
            if not difference <= tolerance:
                faults.append(
                    f"{name}, {dtype}, sample_rate {sample_rate}, filter {threshold}: differs by {difference:.1e}"
                )
        numbers[f"{name}, {str(dtype).removeprefix('torch.')}: largest relative difference"] = worst
    return numbers, faults


def _difference(met: Tensor, expected: Tensor) -> float:
    return float((met.double().cpu() - expected).norm() / expected.norm().clamp_min(1e-12))


def method_of(name: str, context: RunContext) -> Method:
    """A method with its default options, or one of two that have no name of their own."""
    if name == _CLASSIFIER:
        return LearnedClassifier(context)
    kind: Any = registry.load(registry.METHODS, "adadistill" if name == _ADAFACE else name)
    config = kind.Config(geometry=3.0) if name == _ADAFACE else kind.Config()
    if context.student is not None:
        kind.prepare_student(config, context.student)
    made: Method = kind(config, context)
    return made


def _steps(name: str, context: RunContext, rows: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Losses of two steps and their gradients in what comes from the student; class centers move between the steps."""
    torch.manual_seed(0)
    size = context.embedding_size
    student = nn.Sequential(nn.AvgPool2d(14), nn.Flatten(), nn.Linear(192, size), nn.BatchNorm1d(size))
    method = method_of(name, replace(context, student=student)).to(device, dtype)
    margin = context.margin
    quality = ImageQuality(margin).to(device, dtype) if isinstance(margin, AdaFaceMargin) else None
    met = []
    for step in range(2):
        batch = _batch(context, rows, step, device, dtype)
        if quality is not None:
            rated, row_m2 = quality(batch.embeddings, batch.labels)
            batch = replace(batch, quality=rated, row_m2=row_m2)
        with _drawn_on_the_cpu():
            loss = torch.stack(list(method(batch).values())).sum()
        loss.backward()
        leaves = (batch.embeddings, batch.student_map)
        met += [loss.detach(), *(leaf.grad for leaf in leaves if leaf is not None and leaf.grad is not None)]
    return met


def _batch(context: RunContext, rows: int, step: int, device: torch.device, dtype: torch.dtype) -> Batch:
    """A half-learned batch with two rows of one class and one row without a label."""
    generator = torch.Generator().manual_seed(1 + step)
    size = context.embedding_size
    classifier = context.teacher_classifier
    assert classifier is not None

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    labels = torch.randint(context.num_classes, (rows,), generator=generator)
    labels[2], labels[3] = labels[1], -1
    known = normalize(classifier[labels.clamp_min(0)])
    student_map, teacher_map = draw(rows, 6, 7, 7), normalize(draw(rows, 8, 7, 7), dim=1)
    embeddings = normalize(draw(rows, size)) + known
    teacher = normalize(normalize(draw(rows, size)) + known)
    own, theirs, own_map, their_map = (
        values.to(device, dtype) for values in (embeddings, teacher, student_map, teacher_map)
    )
    for leaf in (own, own_map):
        leaf.requires_grad_()
    return Batch(own, own, labels.to(device), theirs, [rows], step, student_map=own_map, teacher_map=their_map)


def _context(classes: int, dimension: int, sample_rate: float, threshold: float, cache: EmbeddingCache) -> RunContext:
    classifier = torch.randn(classes, dimension, generator=torch.Generator().manual_seed(3))
    mixing = torch.randn(8, dimension, generator=torch.Generator().manual_seed(4))
    return RunContext(
        num_classes=classes,
        embedding_size=dimension,
        teacher_embedding_size=dimension,
        margin=Margin(64.0, 1.0, 0.5, 0.0, filter_threshold=threshold),
        ranks=RankGroup(alone=True),
        sample_rate=sample_rate,
        teacher_classifier=classifier,
        total_steps=100,
        cache=cache,
        teacher_tail=lambda maps: maps.mean((2, 3)) @ mixing.to(maps),
        teacher_map_shape=(8, 7, 7),
        student_map_shape=(6, 7, 7),
    )


def _filled_cache(path: Path, dimension: int) -> EmbeddingCache:
    """A cache of made-up embeddings."""
    identity = {"format": 1, "teacher": "0", "preprocessing": "0", "precision": "fp32", "data": "0"}
    cache = EmbeddingCache(path, {**identity, "images": _IMAGES, "embedding_size": dimension})
    generator = torch.Generator().manual_seed(5)
    for flipped in (False, True):
        rows = torch.randn(_IMAGES, dimension, generator=generator)
        cache.store(torch.arange(_IMAGES), torch.full((_IMAGES,), flipped), rows)
    return cache


@contextmanager
def _drawn_on_the_cpu() -> Iterator[None]:
    """Let a GPU's generator draw what the CPU's would, so that both sample the same classes."""
    plain: Callable[..., Tensor] = torch.rand

    def rand(*size: Any, generator: torch.Generator | None = None, device: Any = None, **keys: Any) -> Tensor:
        if generator is None:
            return plain(*size, device=device, **keys)
        twin = torch.Generator().manual_seed(generator.initial_seed())
        return plain(*size, generator=twin, **keys).to(generator.device)

    with mock.patch.object(torch, "rand", rand):
        yield
