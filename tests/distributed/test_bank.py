"""The bank on several ranks: one bank on all of them, and the loss and gradient of one process."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from arcface_kd.config.kd import KDConfig
from arcface_kd.distillation.distiller import Distiller
from arcface_kd.distillation.head import DistillationHead
from arcface_kd.distributed.ranks import RankGroup
from arcface_kd.teachers.cache.embedding_cache import EmbeddingCache
from tests.distributed.pool import RankPool
from tests.reference.bank import bank_divergence, nearest_difference
from tests.reference.problems import ARCFACE, random_problem
from tests.teachers.cache.test_principal_components import filled_cache, identity

CLASSES, DIMENSION, IMAGES = 11, 6, 20


class Answer(NamedTuple):
    """One rank's step, and its bank."""

    loss: Tensor
    gradient: Tensor
    bank: Tensor


def _step(ranks: RankGroup, sizes: list[int], of: Any, folder: Path) -> Answer:
    problem = random_problem(sum(sizes), sum(sizes), CLASSES, DIMENSION)
    options = {"bank": {"of": of, "rows": 7, "mined": 3.0, "nearest": 4}}
    distiller = Distiller(
        KDConfig(("bank",), cache=str(folder / "rows"), classifier=str(folder / "head.pt"), options=options)
    )
    distiller.cache = EmbeddingCache(folder / "rows", identity(IMAGES, DIMENSION), create=False)
    head = DistillationHead(distiller, ARCFACE, DIMENSION, CLASSES, seed=3, ranks=ranks).double()
    embeddings = ranks.own_rows(problem.embeddings, sizes).clone().requires_grad_()
    distiller._seen = ranks.own_rows(torch.nn.functional.normalize(problem.embeddings.flip(1)), sizes)
    loss = head(embeddings, torch.full((sizes[ranks.rank],), -1))
    loss.backward()
    assert embeddings.grad is not None
    return Answer(loss.detach(), embeddings.grad, head.methods["bank"].get_buffer("bank"))


@pytest.mark.parametrize("of", ["images", "classes"])
@pytest.mark.parametrize("sizes", [[8], [5, 3], [3, 0, 5]], ids=str)
def test_loss_and_gradient_are_those_of_one_process(ranks: RankPool, sizes: list[int], of: str, tmp_path: Path) -> None:
    filled_cache(tmp_path / "rows", IMAGES, DIMENSION)
    torch.save(torch.randn(CLASSES, DIMENSION, generator=torch.Generator().manual_seed(1)), tmp_path / "head.pt")
    answers = ranks.run(len(sizes), _step, sizes, of, tmp_path)
    bank = answers[0].bank
    assert bank.shape == (7, DIMENSION)
    student = random_problem(sum(sizes), sum(sizes), CLASSES, DIMENSION).embeddings.requires_grad_()
    teacher = student.detach().flip(1)
    wanted = 10 * bank_divergence(student, teacher, bank, 0.07) + 3 * nearest_difference(student, teacher, bank, 4)
    (gradient,) = torch.autograd.grad(wanted, student)
    for answer in answers:
        assert torch.equal(answer.bank, bank)
        torch.testing.assert_close(answer.loss, wanted.detach(), rtol=1e-9, atol=1e-9)
    met = torch.cat([answer.gradient for answer in answers])
    torch.testing.assert_close(met, gradient * len(sizes), rtol=1e-8, atol=1e-9)
