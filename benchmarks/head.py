"""The head with frozen centers: an AdaDistill step against two plain products and against the published head.

A step is everything behind the student's backbone: alpha, the moving average, loss and gradient in the embeddings.

Providers:
    floor: ``z = e @ W.T; g = p @ W`` with p a (B, C) matrix of softmax's shape. Whoever computes logits and an
        embedding gradient needs these two products.
    arcface_kd: :class:`arcface_kd.methods.adadistill.AdaDistill`, forward and backward.
    arcface_kd_bf16: the same with the products' factors in bf16, where the processor multiplies them.
    dense_reference: :class:`benchmarks.dense_heads.DenseAdaDistill`, forward and backward.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import normalize

from arcface_kd.distillation.frozen_step import FrozenStep
from arcface_kd.distributed.ranks import RankGroup
from arcface_kd.losses.margin import Margin
from arcface_kd.methods.adadistill import AdaDistill, AdaDistillConfig
from arcface_kd.methods.base import Batch, RunContext
from arcface_kd.system.device import autocast_dtype
from benchmarks.dense_heads import DenseAdaDistill
from benchmarks.peak_memory import can_measure, peak_mb
from benchmarks.record import Recorder, Row, print_table, print_verdict, size
from benchmarks.timing import interleaved_seconds

MARGIN = Margin(64.0, 1.0, 0.45, 0.0)
MEMORY_LIMIT_MB = 96.0


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        classes: C of the comparison with floor and dense reference: MS1MV2.
        memory_classes: C whose peak memory is measured, rising: MS1MV2, Glint360K, a million.
        cost_classes: C of the log-log plot, rising.
        dense_up_to: largest C at which the dense reference's memory is measured too.
        batch: B.
        dimension: D.
        rounds: rounds of the comparison.
        cost_rounds: rounds of the log-log plot.
    """

    classes: int = 85_742
    memory_classes: tuple[int, ...] = (85_742, 360_232, 1_000_000)
    cost_classes: tuple[int, ...] = (10_000, 20_000, 50_000, 85_742, 200_000, 500_000, 1_000_000, 2_000_000)
    dense_up_to: int = 100_000
    batch: int = 256
    dimension: int = 512
    rounds: int = 9
    cost_rounds: int = 5


TINY = Sizes(600, (300, 600), (300, 600, 1200), 300, batch=16, dimension=8, rounds=1, cost_rounds=1)


def _inputs(classes: int, batch: int, dimension: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(student embeddings, unit teacher embeddings, labels)."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(batch, dimension, generator=generator)
    teacher = normalize(torch.randn(batch, dimension, generator=generator))
    labels = torch.randint(classes, (batch,), generator=generator)
    return student.to(device).requires_grad_(), teacher.to(device), labels.to(device)


def _adadistill(
    classes: int, dimension: int, device: torch.device, product_dtype: torch.dtype | None = None
) -> AdaDistill:
    context = RunContext(
        num_classes=classes,
        embedding_size=dimension,
        teacher_embedding_size=dimension,
        margin=MARGIN,
        ranks=RankGroup(alone=True),
        product_dtype=product_dtype,
    )
    return AdaDistill(AdaDistillConfig(), context).to(device)


def _step_of(
    head: AdaDistill, classes: int, batch: int, dimension: int, device: torch.device, *, replayed: bool = True
) -> Callable[[], None]:
    student, teacher, labels = _inputs(classes, batch, dimension, device)
    # As the trainer's head calls it.
    terms = FrozenStep(head) if replayed and device.type == "cuda" else head

    def step() -> None:
        student.grad = None
        (loss,) = terms(Batch(student, student, labels, teacher, [batch], 0, observed=False)).values()
        loss.backward()

    return step


def adadistill_step(
    classes: int,
    batch: int,
    dimension: int,
    device: torch.device,
    product_dtype: torch.dtype | None = None,
    *,
    replayed: bool = True,
) -> Callable[[], None]:
    """Provider ``arcface_kd``; on a GPU as one CUDA graph unless ``replayed`` is off."""
    head = _adadistill(classes, dimension, device, product_dtype)
    return _step_of(head, classes, batch, dimension, device, replayed=replayed)


def dense_step(classes: int, batch: int, dimension: int, device: torch.device) -> Callable[[], None]:
    """Provider ``dense_reference``."""
    head = DenseAdaDistill(classes, dimension, MARGIN.scale, MARGIN.m2).to(device)
    student, teacher, labels = _inputs(classes, batch, dimension, device)

    def step() -> None:
        student.grad = None
        head(student, teacher, labels).backward()

    return step


def floor_step(centers: Tensor, batch: int) -> Callable[[], Tensor]:
    """Provider ``floor``, in the number format of the centers."""
    embeddings = torch.randn(batch, centers.shape[1], device=centers.device, dtype=centers.dtype)
    softmax = torch.rand(batch, centers.shape[0], device=centers.device).softmax(1).to(centers.dtype)

    def step() -> Tensor:
        logits = embeddings @ centers.T
        gradient = softmax @ centers
        return logits[0, 0] + gradient[0, 0]

    return step


def _slope(points: dict[int, float]) -> float:
    """Slope of the least-squares line through log seconds over log classes."""
    x = torch.tensor([math.log(classes) for classes in points], dtype=torch.float64)
    y = torch.tensor([math.log(seconds) for seconds in points.values()], dtype=torch.float64)
    x = x - x.mean()
    return float((x * y).sum() / (x * x).sum())


def _compare(sizes: Sizes, device: torch.device, recorder: Recorder) -> None:
    classes, batch, dimension = sizes.classes, sizes.batch, sizes.dimension
    head = _adadistill(classes, dimension, device)
    providers: dict[str, Callable[[], object]] = {
        "floor": floor_step(head.centers.weight, batch),
        "arcface_kd": _step_of(head, classes, batch, dimension, device),
        "dense_reference": dense_step(classes, batch, dimension, device),
    }
    narrow = autocast_dtype(device)
    if narrow is not None:
        narrow_head = _adadistill(classes, dimension, device, narrow)
        name = f"arcface_kd_{'bf16' if narrow == torch.bfloat16 else 'fp16'}"
        providers[name] = _step_of(narrow_head, classes, batch, dimension, device)
    seconds = interleaved_seconds(providers, sizes.rounds, device)
    where = size(classes, batch, dimension)
    for provider, value in seconds.items():
        recorder.add(provider, where, "seconds", value)
    floor, ours = seconds["floor"], seconds["arcface_kd"]
    print_table(
        f"head: one step, {where}, median of {sizes.rounds} rounds",
        ["provider", "seconds", "/ floor", "/ arcface_kd"],
        [[name, f"{value:.4f}", f"{value / floor:.2f}", f"{value / ours:.2f}"] for name, value in seconds.items()],
    )
    print_verdict("no longer than the two products", f"{ours / floor:.3f} of floor", ours <= floor)
    dense = seconds["dense_reference"]
    print_verdict("a tenth of the dense reference", f"1/{dense / ours:.1f} of dense", ours * 10 <= dense)


def _memory(sizes: Sizes, device: torch.device, recorder: Recorder) -> None:
    if not can_measure(device):
        print("\nhead: peak memory is not measured, this system has no /proc/self/clear_refs")
        return
    batch, dimension = sizes.batch, sizes.dimension
    ours: dict[int, float] = {}
    lines = []
    for classes in sizes.memory_classes:
        peaks = {"arcface_kd": peak_mb(adadistill_step, device, classes, batch, dimension, device)}
        ours[classes] = peaks["arcface_kd"]
        if classes <= sizes.dense_up_to:
            peaks["dense_reference"] = peak_mb(dense_step, device, classes, batch, dimension, device)
        for provider, value in peaks.items():
            recorder.add(provider, size(classes, batch, dimension), "peak_mb", value)
            lines.append([provider, f"{classes:,}", f"{classes * dimension * 4 / 1e6:.0f}", f"{value:.1f}"])
    print_table(
        "head: peak memory of a step above the centers, each in a fresh process",
        ["provider", "classes", "centers MB", "peak MB"],
        lines,
    )
    smallest, largest = min(ours.values()), max(ours.values())
    print_verdict(f"at most {MEMORY_LIMIT_MB:.0f} MB", f"{largest:.1f} MB", largest <= MEMORY_LIMIT_MB)
    # Which pages of libraries are touched differs by a few MB from process to process.
    print_verdict("does not grow with C", f"{smallest:.1f} to {largest:.1f} MB", largest - smallest <= 8)


def _cost(sizes: Sizes, device: torch.device, recorder: Recorder) -> None:
    batch, dimension = sizes.batch, sizes.dimension
    largest = _adadistill(sizes.cost_classes[-1], dimension, device)
    providers = {}
    for classes in sizes.cost_classes:
        head = _adadistill(1, dimension, device)
        # A prefix of the largest one's centers: all of them at once would not fit into an ordinary machine.
        head.centers.weight = largest.centers.weight[:classes]
        head.centers.inverse_norms = largest.centers.inverse_norms[:classes]
        head.context = replace(head.context, num_classes=classes)
        head.centers.shard = head.context.shard
        providers[str(classes)] = _step_of(head, classes, batch, dimension, device)
    seconds = interleaved_seconds(providers, sizes.cost_rounds, device)
    points = {int(name): value for name, value in seconds.items()}
    for classes, value in points.items():
        recorder.add("arcface_kd", size(classes, batch, dimension), "seconds", value)
    print_table(
        f"head: cost over classes, median of {sizes.cost_rounds} rounds",
        ["classes", "seconds", "ns a class"],
        [[f"{classes:,}", f"{value:.4f}", f"{value / classes * 1e9:.0f}"] for classes, value in points.items()],
    )
    slope = _slope(points)
    steepest = max(math.log(b[1] / a[1]) / math.log(b[0] / a[0]) for a, b in itertools.pairwise(points.items()))
    print_verdict("slope 1.0 +- 0.05", f"{slope:.3f}, steepest piece {steepest:.3f}", abs(slope - 1) <= 0.05)


def run(sizes: Sizes, device: torch.device) -> list[Row]:
    """Comparison, memory and cost over classes: print their tables and return their rows.

    The cost over classes goes under the benchmark's name ``head_cost``: another run than the comparison's.
    """
    head, cost = Recorder("head", device), Recorder("head_cost", device)
    _compare(sizes, device, head)
    _memory(sizes, device, head)
    _cost(sizes, device, cost)
    return head.rows + cost.rows
