"""A step of Grouped KD against its four matrix products and against the published way of doing it.

A step is everything behind the two backbones: both logits, the groups, all losses and the gradients in the student's
embeddings and its classifier.

Providers, the last two for each rule that says how large a group is (``batch``, ``sample``, ``fixed``; the published
code knows the first and the last):
    floor: ``z_s = W_s @ e_s.T; z_t = W_t @ e_t.T; g_e = p.T @ W_s; g_W = p @ e_s``. Whoever computes logits of both
        sides and the gradients needs these four products.
    arcface_kd: :class:`arcface_kd.methods.gkd.GKD`, forward and backward.
    dense_reference: :class:`benchmarks.dense_heads.DenseGKD`, forward and backward.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from arcface_kd.distributed.ranks import RankGroup
from arcface_kd.losses.margin import Margin
from arcface_kd.methods.base import Batch, RunContext
from arcface_kd.methods.gkd import GKD, GKDConfig, Group
from benchmarks.dense_heads import DenseGKD
from benchmarks.peak_memory import can_measure, peak_mb
from benchmarks.record import Recorder, Row, print_table, print_verdict, size
from benchmarks.timing import interleaved_seconds

MARGIN = Margin(64.0, 1.0, 0.0, 0.4)
GROUPS: tuple[Group, ...] = ("batch", "sample", "fixed")


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        classes: C: MS1MV2.
        batch: B: of one GPU.
        dimension: D, of student and teacher.
        group_size: K of the fixed group.
        rounds: rounds of the comparison.
    """

    classes: int = 85_742
    batch: int = 128
    dimension: int = 512
    group_size: int = 10_000
    rounds: int = 5


TINY = Sizes(600, 16, 8, 60, 1)


@dataclass(frozen=True)
class _Problem:
    """A batch of a student that has half learned its classes, and its teacher, which knows them."""

    student: Tensor
    teacher: Tensor
    labels: Tensor
    student_centers: Tensor
    teacher_centers: Tensor


def _problem(sizes: Sizes, device: torch.device) -> _Problem:
    generator = torch.Generator().manual_seed(0)
    shape = (sizes.batch, sizes.dimension)
    teacher_centers = torch.randn(sizes.classes, sizes.dimension, generator=generator)
    student_centers = teacher_centers + torch.randn(sizes.classes, sizes.dimension, generator=generator)
    labels = torch.randint(sizes.classes, (sizes.batch,), generator=generator)
    teacher = normalize(teacher_centers[labels] + 0.8 * torch.randn(shape, generator=generator))
    student = normalize(student_centers[labels]) + normalize(1.5 * torch.randn(shape, generator=generator))
    moved = (each.to(device) for each in (student, teacher, labels, student_centers, teacher_centers))
    return _Problem(*moved)


def _config(group: Group, sizes: Sizes) -> GKDConfig:
    return GKDConfig(group=group, size=sizes.group_size, ramp_epochs=0)


def arcface_kd_step(sizes: Sizes, device: torch.device, group: Group) -> Callable[[], float]:
    """Provider ``arcface_kd``; the step returns the loss."""
    problem = _problem(sizes, device)
    context = RunContext(
        num_classes=sizes.classes,
        embedding_size=sizes.dimension,
        margin=MARGIN,
        ranks=RankGroup(alone=True),
        teacher_embedding_size=sizes.dimension,
        teacher_classifier=problem.teacher_centers,
    )
    head = GKD(_config(group, sizes), context).to(device)
    head.classifier.weight.data = problem.student_centers
    student = problem.student.requires_grad_()

    def step() -> float:
        student.grad = head.classifier.weight.grad = None
        terms = head(Batch(student, student, problem.labels, problem.teacher, [sizes.batch], 0))
        loss = torch.stack(list(terms.values())).sum()
        loss.backward()
        return loss.item()

    return step


def dense_step(sizes: Sizes, device: torch.device, group: Group) -> Callable[[], float]:
    """Provider ``dense_reference``; the step returns the loss."""
    problem = _problem(sizes, device)
    config = _config(group, sizes)
    primary_weight, _, _ = config.weights(0)
    head = DenseGKD(
        problem.student_centers,
        problem.teacher_centers,
        MARGIN.scale,
        MARGIN.m3,
        config.temperature,
        sizes.group_size if group == "fixed" else None,
        config.mass,
        primary_weight,
    ).to(device)
    student = problem.student.requires_grad_()

    def step() -> float:
        student.grad = head.weight.grad = None
        loss = head(student, problem.teacher, problem.labels)
        loss.backward()
        return float(loss.item())

    return step


def floor_step(sizes: Sizes, device: torch.device) -> Callable[[], Tensor]:
    """Provider ``floor``."""
    problem = _problem(sizes, device)
    softmax = torch.rand(sizes.classes, sizes.batch, device=device).softmax(0)

    def step() -> Tensor:
        student_logits = problem.student_centers @ problem.student.T
        teacher_logits = problem.teacher_centers @ problem.teacher.T
        in_embeddings = softmax.T @ problem.student_centers
        in_centers = softmax @ problem.student
        return student_logits[0, 0] + teacher_logits[0, 0] + in_embeddings[0, 0] + in_centers[0, 0]

    return step


def run(sizes: Sizes, device: torch.device) -> list[Row]:
    """Compare seconds and peak memory, print the table and return the rows.

    Raises:
        RuntimeError: ours and the dense reference find different losses, so that they cannot be compared.
    """
    recorder = Recorder("gkd", device)
    where = size(sizes.classes, sizes.batch, sizes.dimension)
    dense_groups: list[Group] = [group for group in GROUPS if group != "sample"]
    ours = {f"arcface_kd, {group}": arcface_kd_step(sizes, device, group) for group in GROUPS}
    dense = {f"dense_reference, {group}": dense_step(sizes, device, group) for group in dense_groups}
    for group in dense_groups:
        losses = ours[f"arcface_kd, {group}"](), dense[f"dense_reference, {group}"]()
        if abs(losses[0] - losses[1]) > 1e-3 * (1 + abs(losses[1])):
            raise RuntimeError(f"the heads do not compute the same: with group={group} their losses are {losses}")
    seconds = interleaved_seconds({"floor": floor_step(sizes, device), **ours, **dense}, sizes.rounds, device)
    del ours, dense
    peaks: dict[str, float] = {}
    if can_measure(device):
        for group in GROUPS:
            peaks[f"arcface_kd, {group}"] = peak_mb(arcface_kd_step, device, sizes, device, group)
        for group in dense_groups:
            peaks[f"dense_reference, {group}"] = peak_mb(dense_step, device, sizes, device, group)
    for provider, value in seconds.items():
        recorder.add(provider, where, "seconds", value)
    for provider, value in peaks.items():
        recorder.add(provider, where, "peak_mb", value)
    floor = seconds["floor"]
    print_table(
        f"gkd: one step, {where}, median of {sizes.rounds} rounds; peak above both classifiers, with the gradient",
        ["provider", "seconds", "/ floor", "peak MB"],
        [
            [name, f"{value:.4f}", f"{value / floor:.2f}", f"{peaks[name]:.0f}" if name in peaks else "-"]
            for name, value in seconds.items()
        ],
    )
    for group in GROUPS:
        value = seconds[f"arcface_kd, {group}"]
        print_verdict(f"{group}: at most 2.5 times the products", f"{value / floor:.2f} of floor", value <= 2.5 * floor)
    for group in dense_groups:
        value, other = seconds[f"arcface_kd, {group}"], seconds[f"dense_reference, {group}"]
        print_verdict(
            f"{group}: a quarter of the dense reference", f"1/{other / value:.1f} of dense", value * 4 <= other
        )
    return recorder.rows
