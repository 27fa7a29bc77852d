"""The trainer's own classification on several ranks: classifier shards, class sampling, logging."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from arcface_kd.config.kd import KDConfig
from arcface_kd.distillation.distiller import Distiller
from arcface_kd.distillation.head import DistillationHead
from arcface_kd.distillation.tensorboard_log import TensorBoardLog
from arcface_kd.distributed.class_shard import ClassShard
from arcface_kd.distributed.ranks import RankGroup
from arcface_kd.methods.base import RunContext
from arcface_kd.methods.class_centers import initial_centers
from tests.distributed.drawn_classes import drawn_classes
from tests.distributed.pool import RankPool
from tests.reference.margin_softmax import dense_margin_softmax
from tests.reference.problems import ARCFACE, random_problem

CLASSES = 103
SIZES = {
    1: [[9], [1]],
    2: [[5, 4], [1, 8], [0, 6]],
    3: [[3, 3, 3], [1, 6, 2], [4, 0, 4]],
    4: [[2, 2, 2, 2], [1, 5, 2, 1]],
}


class Answer(NamedTuple):
    """One rank's result of two steps on the same batch."""

    losses: list[Tensor]
    in_embeddings: list[Tensor]
    in_classifier: list[Tensor]


def _run(ranks: RankGroup, sizes: list[int], sample_rate: float, log: Path | None = None) -> Answer:
    problem = random_problem(sum(sizes), sum(sizes), CLASSES)
    head = DistillationHead(
        Distiller(KDConfig()),
        ARCFACE,
        problem.embeddings.shape[1],
        CLASSES,
        sample_rate,
        seed=5,
        ranks=ranks,
        log=None if log is None else TensorBoardLog(log, 1, ranks.rank == 0),
    ).double()
    classifier: Any = head.methods["classifier"]
    answer = Answer([], [], [])
    for _ in range(2):
        embeddings = ranks.own_rows(problem.embeddings, sizes).clone().requires_grad_()
        loss = head(embeddings, ranks.own_rows(problem.labels, sizes))
        loss.backward()
        assert embeddings.grad is not None
        answer.losses.append(loss.detach())
        answer.in_embeddings.append(embeddings.grad)
        answer.in_classifier.append(classifier.weight.grad.clone())
        head.zero_grad()
    return answer


def _twin(sizes: list[int], index: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    problem = random_problem(sum(sizes), sum(sizes), CLASSES)
    weight = initial_centers(ClassShard(CLASSES), problem.embeddings.shape[1], 5).double().requires_grad_()
    embeddings = problem.embeddings.requires_grad_()
    loss = dense_margin_softmax(embeddings, problem.labels, weight, ARCFACE, index)
    in_embeddings, in_weight = torch.autograd.grad(loss, [embeddings, weight])
    return loss.detach(), in_embeddings, in_weight


def _sampled(sizes: list[int], sample_rate: float, step: int) -> Tensor | None:
    labels = random_problem(sum(sizes), sum(sizes), CLASSES).labels
    context = RunContext(CLASSES, 6, ARCFACE, RankGroup(), sample_rate=sample_rate, seed=5)
    return drawn_classes(context, labels, len(sizes), step)


@pytest.mark.parametrize("sample_rate", [1.0, 0.3])
@pytest.mark.parametrize("world_size", SIZES)
def test_classifier_shards_and_embeddings_get_the_gradients_of_one_process(
    ranks: RankPool, world_size: int, sample_rate: float
) -> None:
    for sizes in SIZES[world_size]:
        answers = ranks.run(world_size, _run, sizes, sample_rate)
        for step in range(2):
            index = _sampled(sizes, sample_rate, step)
            loss, in_embeddings, in_classifier = _twin(sizes, index)
            for answer in answers:
                torch.testing.assert_close(answer.losses[step], loss, rtol=1e-10, atol=1e-10)
            met = torch.cat([answer.in_embeddings[step] for answer in answers])
            torch.testing.assert_close(met, in_embeddings * world_size, rtol=1e-10, atol=1e-10)
            met = torch.cat([answer.in_classifier[step] for answer in answers])
            # Class centers start short: their gradients are large.
            torch.testing.assert_close(met, in_classifier, rtol=1e-10, atol=1e-8)
            if index is not None:
                assert len(index) < CLASSES
                assert (met[~torch.isin(torch.arange(CLASSES), index)] == 0).all()


def test_another_step_draws_other_classes() -> None:
    first, second = (_sampled([3, 3], 0.5, step) for step in (0, 1))
    assert first is not None
    assert second is not None
    assert not torch.equal(first, second)


def test_a_log_changes_no_number_and_keeps_the_ranks_in_step(ranks: RankPool, tmp_path: Path) -> None:
    """Gradient norms of the terms run the collectives once more: on every rank, or none would come back."""
    plain = ranks.run(3, _run, [2, 3, 1], 1.0)
    logged = ranks.run(3, _run, [2, 3, 1], 1.0, tmp_path / "tensorboard")
    for a, b in zip(plain, logged, strict=True):
        for x, y in zip(a, b, strict=True):
            assert all(torch.equal(p, q) for p, q in zip(x, y, strict=True))
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
