"""ProxylessKD on several ranks: each reads its own classes of the file, together they are the naive twin."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from arcface_kd.config.kd import KDConfig
from arcface_kd.distillation.distiller import Distiller
from arcface_kd.distillation.head import DistillationHead
from arcface_kd.distributed.ranks import RankGroup
from arcface_kd.methods.proxylesskd import ProxylessKD
from tests.distributed.pool import RankPool
from tests.reference.problems import ARCFACE, random_problem
from tests.reference.proxylesskd import proxylesskd_loss

CLASSES, DIMENSION = 11, 6


class Answer(NamedTuple):
    """One rank's step."""

    loss: Tensor
    in_embeddings: Tensor
    classes: int


def _step(ranks: RankGroup, sizes: list[int], file: Path) -> Answer:
    problem = random_problem(sum(sizes), sum(sizes), CLASSES, DIMENSION)
    distiller = Distiller(KDConfig(methods=("proxylesskd",), classifier=str(file)))
    head = DistillationHead(distiller, ARCFACE, DIMENSION, CLASSES, ranks=ranks).double()
    embeddings = ranks.own_rows(problem.embeddings, sizes).clone().requires_grad_()
    loss = head(embeddings, ranks.own_rows(problem.labels, sizes))
    loss.backward()
    assert embeddings.grad is not None
    method = head.methods["proxylesskd"]
    assert isinstance(method, ProxylessKD)
    return Answer(loss.detach(), embeddings.grad, len(method.centers.weight))


@pytest.mark.parametrize("sizes", [[9], [5, 4], [0, 7], [1, 6, 2], [2, 3, 1, 4]], ids=str)
def test_a_step_equals_the_twin_however_classes_and_batch_are_split(
    ranks: RankPool, sizes: list[int], tmp_path: Path
) -> None:
    problem = random_problem(sum(sizes), sum(sizes), CLASSES, DIMENSION)
    classifier = problem.centers.float()
    torch.save(classifier, tmp_path / "head.pt")
    answers = ranks.run(len(sizes), _step, sizes, tmp_path / "head.pt")
    student = problem.embeddings.clone().requires_grad_()
    wanted = proxylesskd_loss(student, problem.labels, classifier.double(), ARCFACE)
    wanted.backward()
    assert sum(answer.classes for answer in answers) == CLASSES
    for answer in answers:
        # The norms of the frozen rows are found once, in fp32.
        torch.testing.assert_close(answer.loss, wanted.detach(), rtol=1e-6, atol=1e-6)
    met = torch.cat([answer.in_embeddings for answer in answers])
    assert student.grad is not None
    torch.testing.assert_close(met, student.grad * len(sizes), rtol=1e-5, atol=1e-5)
