"""AdaDistill's whole step on several ranks: student under DDP, teacher, head and centers against one process."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel

from arcface_kd.config.kd import KDConfig
from arcface_kd.distillation.distiller import Distiller
from arcface_kd.distillation.head import DistillationHead
from arcface_kd.distributed.ranks import RankGroup
from arcface_kd.methods.class_centers import DistilledCenters
from arcface_kd.teachers.base import load_teacher
from arcface_kd.teachers.options import TeacherOptions
from tests.distributed.pool import RankPool
from tests.reference.adadistill import adadistill_step
from tests.reference.problems import MARGINS

PIXELS = 3 * 8 * 8
CLASSES = 11  # divides by no number of ranks but 1
LEARNING_RATE = 1e-3


class Case(NamedTuple):
    """One run of a few steps."""

    sizes: list[int]
    alpha: str = "weighted"
    repeated: str = "mean"
    margin: str = "arcface"
    teacher_dimension: int = 6
    student_dimension: int = 6


class StepResult(NamedTuple):
    """What one rank has after a step."""

    loss: Tensor
    in_embeddings: Tensor
    in_student: Tensor
    in_projection: Tensor | None
    centers: Tensor
    inverse_norms: Tensor
    alpha: Tensor
    drift: Tensor


class Linear(nn.Module):
    """Embeds (B, 3, 8, 8) images by one matrix."""

    def __init__(self, dimension: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(dimension, PIXELS, generator=generator) / PIXELS**0.5)

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.weight.T


def networks(case: Case) -> tuple[Linear, Linear]:
    """A teacher in fp32 and a student in fp64 that is somewhat like it, so that alpha is neither 0 nor 1."""
    teacher, student = Linear(case.teacher_dimension, seed=1), Linear(case.student_dimension, seed=2).double()
    rows = min(case.teacher_dimension, case.student_dimension)
    with torch.no_grad():
        student.weight[:rows] = teacher.weight[:rows].double() + 0.5 * student.weight[:rows]
    return teacher, student


def batches(case: Case, steps: int = 3) -> list[tuple[Tensor, Tensor]]:
    """Images and labels of all ranks; one class occurs on the first and the last row, one row has no label."""
    generator = torch.Generator().manual_seed(sum(case.sizes))
    faces = torch.rand(CLASSES, 3, 8, 8, generator=generator, dtype=torch.float64) * 2 - 1
    made = []
    for _ in range(steps):
        total = sum(case.sizes)
        # Few classes for the batch, so that all of them come again in the next step.
        labels = torch.randint(4, (total,), generator=generator) * 3
        labels[-1] = labels[0]
        if total >= 4:
            labels[2] = -1
        noise = torch.rand(total, 3, 8, 8, generator=generator, dtype=torch.float64) * 2 - 1
        images = (faces[labels] + 0.6 * noise) / 1.6
        made.append((images, labels))
    return made


def _run(ranks: RankGroup, case: Case) -> tuple[Tensor, Tensor | None, list[StepResult]]:
    network, student = networks(case)
    options = {
        "adadistill": {"alpha": case.alpha, "repeated": case.repeated},
        "student": {"projection": "linear" if case.teacher_dimension != case.student_dimension else "none"},
    }
    teacher = load_teacher(network, TeacherOptions(size=8))
    distiller = Distiller(KDConfig(("adadistill",), options=options), teacher)
    head = DistillationHead(
        distiller, MARGINS[case.margin], case.student_dimension, CLASSES, seed=3, ranks=ranks
    ).double()
    method: Any = head.methods["adadistill"]
    assert isinstance(method.centers, DistilledCenters)
    method.centers.refresh()
    backbone: nn.Module = distiller.watch(student)
    if ranks.world_size > 1:
        backbone = DistributedDataParallel(student, process_group=ranks.group)
    optimizer = torch.optim.SGD([*student.parameters(), *head.parameters()], lr=LEARNING_RATE)
    first_centers = method.centers.weight.clone()
    projection = None if head.projection is None else head.projection.weight
    first_projection = None if projection is None else projection.detach().clone()
    results = []
    for images, labels in batches(case):
        embeddings = backbone(ranks.own_rows(images, case.sizes))
        embeddings.retain_grad()
        loss = head(embeddings, ranks.own_rows(labels, case.sizes).unsqueeze(1))
        loss.backward()
        assert student.weight.grad is not None
        results.append(
            StepResult(
                loss.detach(),
                embeddings.grad,
                student.weight.grad.clone(),
                None if projection is None or projection.grad is None else projection.grad.clone(),
                method.centers.weight.clone(),
                method.centers.inverse_norms.clone(),
                torch.where(method._seen.valid, method._seen.alpha, torch.nan),
                method.observations()["center_drift"],
            )
        )
        optimizer.step()
        optimizer.zero_grad()
    return first_centers, first_projection, results


def _compare(ranks: RankPool, case: Case) -> None:
    """Run a case on its ranks and step by step through the twin."""
    world_size = len(case.sizes)
    answers = ranks.run(world_size, _run, case)
    network, student = networks(case)
    centers = torch.cat([first for first, _, _ in answers])
    projection = answers[0][1]
    if projection is not None:
        projection = projection.clone().requires_grad_()
    for step, (images, labels) in enumerate(batches(case)):
        parts = [results[step] for _, _, results in answers]
        # Rank by rank and in fp32, as the teacher works: the last digit of a product depends on how many rows it has.
        teacher = torch.cat([normalize(network(part.float())) for part in images.split(case.sizes)]).detach().double()
        embeddings = student(images)
        embeddings.retain_grad()
        wanted = adadistill_step(
            embeddings if projection is None else embeddings @ projection.T,
            teacher,
            labels,
            centers,
            MARGINS[case.margin],
            alpha=case.alpha,
            repeated=case.repeated,
        )
        wanted.loss.backward()
        valid = labels >= 0
        assert sum(case.sizes) < 6 or step == 0 or ((wanted.alpha > 0.05) & (wanted.alpha < 0.95)).any(), wanted.alpha

        def same(met: Tensor, right: Tensor | None, what: str, step: int = step) -> None:
            assert right is not None
            off = (met - right).abs().max() if right.numel() else 0.0
            assert met.shape == right.shape, f"{case}, step {step}, {what}: {met.shape} and {right.shape}"
            assert off <= 1e-10 * max(1.0, float(right.abs().max())), f"{case}, step {step}, {what}: off by {off:.1e}"

        turned = torch.nn.functional.cosine_similarity(centers[labels[valid]], wanted.centers[labels[valid]])
        for part in parts:
            same(part.drift, 1 - turned.mean(), "drift")
            same(part.loss, wanted.loss.detach(), "loss")
            same(part.alpha[valid], wanted.alpha[valid], "alpha")
            assert part.alpha[~valid].isnan().all()
            same(part.in_student, student.weight.grad, "student's gradient behind DDP")
            if projection is not None:
                assert part.in_projection is not None
                same(part.in_projection, projection.grad, "projection's gradient")
        assert embeddings.grad is not None
        same(torch.cat([p.in_embeddings for p in parts]), embeddings.grad * world_size, "embeddings' gradient")
        same(torch.cat([p.centers for p in parts]), wanted.centers, "centers")
        same(torch.cat([p.inverse_norms for p in parts]), 1 / wanted.centers.norm(dim=1), "inverse norms")
        assert (wanted.centers != centers).any()

        centers = wanted.centers
        with torch.no_grad():
            for parameter in (student.weight, projection):
                if parameter is not None and parameter.grad is not None:
                    parameter -= LEARNING_RATE * parameter.grad
                    parameter.grad = None


SIZES = [[8], [1], [4, 4], [7, 2], [1, 1], [0, 5], [3, 3, 3], [1, 6, 2], [1, 1, 1], [2, 0, 3], [2, 3, 1, 4]]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_three_steps_equal_the_twin_however_the_batch_is_split(ranks: RankPool, sizes: list[int]) -> None:
    _compare(ranks, Case(sizes))


@pytest.mark.parametrize("repeated", ["mean", "last"])
@pytest.mark.parametrize("alpha", ["weighted", "plain"])
@pytest.mark.parametrize("sizes", [[7], [4, 3], [1, 6, 2]], ids=str)
def test_both_alphas_and_both_ways_with_repeated_labels(
    ranks: RankPool, sizes: list[int], alpha: str, repeated: str
) -> None:
    _compare(ranks, Case(sizes, alpha, repeated))


@pytest.mark.parametrize("margin", ["cosface", "combined-filtered"])
def test_other_margins(ranks: RankPool, margin: str) -> None:
    _compare(ranks, Case([4, 5], margin=margin))


@pytest.mark.parametrize("dimensions", [(6, 4), (4, 6)], ids=str)
@pytest.mark.parametrize("sizes", [[7], [3, 4], [1, 6, 2], [0, 5]], ids=str)
def test_a_projection_learns_from_all_ranks(ranks: RankPool, sizes: list[int], dimensions: tuple[int, int]) -> None:
    _compare(ranks, Case(sizes, teacher_dimension=dimensions[0], student_dimension=dimensions[1]))
