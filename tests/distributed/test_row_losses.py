"""Losses over rows, and over frozen classes of a file, on several ranks: what one process has, and its log."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from arcface_kd.config.kd import KDConfig
from arcface_kd.distillation.distiller import Distiller
from arcface_kd.distillation.head import DistillationHead
from arcface_kd.distillation.tensorboard_log import TensorBoardLog
from arcface_kd.distributed.ranks import RankGroup
from arcface_kd.evaluation.report.scalars import read_scalars
from arcface_kd.losses.embedding_losses import squared_distance
from arcface_kd.teachers.base import Teacher, load_teacher
from arcface_kd.teachers.options import TeacherOptions
from tests.distributed.pool import RankPool
from tests.reference.ekd import ekd_step
from tests.reference.margin_softmax import dense_margin_softmax
from tests.reference.margindistillation import margindistillation_loss
from tests.reference.problems import ARCFACE, Problem, random_problem
from tests.reference.proxylesskd import proxylesskd_loss
from tests.reference.rkd import rkd_angle, rkd_distance

CLASSES, DIMENSION = 11, 6
# Alone, together with another loss over rows, and beside class centers that are split.
METHODS = ["embedding", "rkd", "ekd", "proxylesskd", "margindistillation", "margindistillation+embedding+rkd"]
SIZES = [[8], [5, 3], [0, 7], [1, 5, 2], [3, 0, 5]]


class Answer(NamedTuple):
    """One rank's two steps on the same batch."""

    losses: list[Tensor]
    in_embeddings: list[Tensor]
    thresholds: Tensor | None


def _problem(sizes: list[int]) -> tuple[Problem, Tensor]:
    """A batch whose labels repeat, and what the teacher says of it."""
    problem = random_problem(sum(sizes), sum(sizes), CLASSES, DIMENSION)
    generator = torch.Generator().manual_seed(99)
    noise = torch.randn(sum(sizes), DIMENSION, generator=generator, dtype=torch.float64)
    teacher = torch.nn.functional.normalize(problem.centers[problem.labels.clamp_min(0)] + noise)
    return problem, teacher


class _Silent(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.new_ones(len(images), DIMENSION)


def _teacher() -> Teacher:
    return load_teacher(_Silent(), TeacherOptions(size=8))


def _steps(ranks: RankGroup, methods: str, sizes: list[int], file: Path, log: Path | None = None) -> Answer:
    problem, teacher = _problem(sizes)
    kd = KDConfig(tuple(methods.split("+")), classifier=str(file))
    distiller = Distiller(kd, _teacher())
    head = DistillationHead(
        distiller,
        ARCFACE,
        DIMENSION,
        CLASSES,
        ranks=ranks,
        log=None if log is None else TensorBoardLog(log, 1, ranks.rank == 0),
    ).double()
    if methods == "proxylesskd":
        assert len(head.methods["proxylesskd"].get_buffer("centers.weight")) == ranks.shard(CLASSES).size
    if "classifier" in head.methods:
        shard = ranks.shard(CLASSES)
        with torch.no_grad():
            weight = head.methods["classifier"].get_parameter("weight")
            weight.copy_(problem.centers[shard.start : shard.start + shard.size])
    answer = Answer([], [], None)
    for _ in range(2):
        embeddings = ranks.own_rows(problem.embeddings, sizes).clone().requires_grad_()
        distiller._seen = ranks.own_rows(teacher, sizes)
        loss = head(embeddings, ranks.own_rows(problem.labels, sizes))
        loss.backward()
        assert embeddings.grad is not None
        answer.losses.append(loss.detach())
        answer.in_embeddings.append(embeddings.grad)
    return answer._replace(thresholds=head.state_dict().get("methods.ekd.student_thresholds"))


def _twin_terms(methods: str, problem: Problem, teacher: Tensor) -> dict[str, Tensor]:
    student, labels = problem.embeddings, problem.labels
    # The frozen rows of the file are fp32.
    classifier = problem.centers.float().double()
    terms: dict[str, Tensor] = {}
    if "margindistillation" in methods:
        terms["ce"] = margindistillation_loss(student, teacher, labels, classifier, ARCFACE.scale)
    elif methods == "proxylesskd":
        terms["ce"] = proxylesskd_loss(student, labels, classifier, ARCFACE)
    else:
        terms["ce"] = dense_margin_softmax(student, labels, problem.centers, ARCFACE)
    if "embedding" in methods:
        terms["embedding"] = 64 * squared_distance(student, teacher)
    if "rkd" in methods:
        terms["rkd_distance"] = 25 * rkd_distance(student, teacher)
        terms["rkd_angle"] = 50 * rkd_angle(student, teacher)
    if "ekd" in methods:
        step = ekd_step(student, teacher, labels)
        terms["ekd_positive"], terms["ekd_negative"] = step.positive, step.negative
    return terms


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("methods", METHODS)
def test_loss_and_gradient_are_those_of_one_process(
    ranks: RankPool, methods: str, sizes: list[int], tmp_path: Path
) -> None:
    problem, teacher = _problem(sizes)
    torch.save(problem.centers.float(), tmp_path / "head.pt")
    answers = ranks.run(len(sizes), _steps, methods, sizes, tmp_path / "head.pt")
    problem.embeddings.requires_grad_()
    wanted = torch.stack(list(_twin_terms(methods, problem, teacher).values())).sum()
    wanted.backward()
    assert problem.embeddings.grad is not None
    for step in (0, 1):
        for answer in answers:
            # The norms of the frozen rows are found once, in fp32.
            torch.testing.assert_close(answer.losses[step], wanted.detach(), rtol=1e-6, atol=1e-6)
            assert torch.equal(answer.losses[step], answers[0].losses[step])
        met = torch.cat([answer.in_embeddings[step] for answer in answers])
        torch.testing.assert_close(met, problem.embeddings.grad * len(sizes), rtol=1e-5, atol=1e-5)
    if methods == "ekd":
        thresholds = [answer.thresholds for answer in answers if answer.thresholds is not None]
        assert len(thresholds) == len(answers)
        assert all(torch.equal(met, thresholds[0]) for met in thresholds)


@pytest.mark.parametrize("sizes", [[8], [5, 3], [1, 5, 2]], ids=str)
def test_the_log_holds_the_whole_batch_s_gradient_norms_and_their_shares(
    ranks: RankPool, sizes: list[int], tmp_path: Path
) -> None:
    methods = METHODS[-1]
    problem, teacher = _problem(sizes)
    torch.save(problem.centers.float(), tmp_path / "head.pt")
    ranks.run(len(sizes), _steps, methods, sizes, tmp_path / "head.pt", tmp_path / "log")
    problem.embeddings.requires_grad_()
    norms = {
        name: float(torch.autograd.grad(term, problem.embeddings)[0].norm())
        for name, term in _twin_terms(methods, problem, teacher).items()
    }
    scalars = read_scalars(tmp_path / "log")
    for name, norm in norms.items():
        assert scalars[f"kd/gradient_norm/{name}"].y.tolist() == pytest.approx([norm] * 2, rel=1e-4)
        assert scalars[f"kd/gradient_share/{name}"].y[-1] == pytest.approx(norm / sum(norms.values()), rel=1e-4)
    shares = [scalars[f"kd/gradient_share/{name}"].y[-1] for name in norms]
    assert sum(shares) == pytest.approx(1.0, abs=1e-5)
    assert min(shares) > 1e-3
