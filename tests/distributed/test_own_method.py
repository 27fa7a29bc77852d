"""A method that knows nothing of ranks, as a package of one's own brings it: gradients are those of one process."""

from typing import Any, ClassVar, NamedTuple
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from arcface_kd import registry
from arcface_kd.config.kd import KDConfig
from arcface_kd.config.options import Options
from arcface_kd.distillation.distiller import Distiller
from arcface_kd.distillation.head import DistillationHead
from arcface_kd.distributed.ranks import RankGroup
from arcface_kd.losses.margin_softmax import sharded_margin_softmax
from arcface_kd.methods.base import Batch, Method, RunContext
from tests.distributed.pool import RankPool
from tests.reference.problems import ARCFACE, random_problem

CLASSES, DIMENSION = 11, 6


class Metric(Method):
    """A learned metric between all rows of the gathered batch."""

    Config = Options

    def __init__(self, config: Any, context: RunContext) -> None:
        super().__init__(config, context)
        generator = torch.Generator().manual_seed(context.seed)
        self.matrix = nn.Parameter(torch.randn(DIMENSION, DIMENSION, generator=generator))

    def loss(self, batch: Batch) -> Tensor:
        """Of the whole batch."""
        return (batch.embeddings @ self.matrix @ batch.embeddings.T).tanh().mean()

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return {"metric": self.loss(batch)}


class Divided(Method):
    """One that divides its gradient itself, as methods did when the head did not."""

    Config = Options

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return {"spread": self.context.ranks.computed_by_all(batch.embeddings.square().mean())}


class Proxies(Method):
    """One over classes that are split over ranks."""

    Config = Options
    classifies: ClassVar[bool] = True
    computes_part: ClassVar[bool] = True
    sharded: ClassVar[tuple[str, ...]] = ("weight",)

    def __init__(self, config: Any, context: RunContext) -> None:
        super().__init__(config, context)
        centers = random_problem(1, 4, CLASSES, DIMENSION).centers
        shard = context.shard
        self.weight = nn.Parameter(centers[shard.start : shard.start + shard.size])

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        weights = self.context.class_weights(self.weight)
        return {"ce": sharded_margin_softmax(batch.embeddings, batch.labels, weights, ARCFACE)}


KINDS: dict[str, type[Method]] = {"metric": Metric, "divided": Divided, "proxies": Proxies}


class Answer(NamedTuple):
    loss: Tensor
    in_embeddings: Tensor
    in_matrix: Tensor
    in_classes: Tensor


def _step(ranks: RankGroup, sizes: list[int]) -> Answer:
    problem = random_problem(2, sum(sizes), CLASSES, DIMENSION)
    with patch.object(registry, "load", lambda group, name: KINDS[name]):
        distiller = Distiller(KDConfig(tuple(KINDS)))
    head = DistillationHead(distiller, ARCFACE, DIMENSION, CLASSES, ranks=ranks).double()
    embeddings = ranks.own_rows(problem.embeddings, sizes).clone().requires_grad_()
    loss = head(embeddings, ranks.own_rows(problem.labels, sizes))
    loss.backward()
    gradients = dict(head.named_parameters())
    in_matrix, in_classes = (gradients[f"methods.{name}"].grad for name in ("metric.matrix", "proxies.weight"))
    assert embeddings.grad is not None
    assert in_matrix is not None
    assert in_classes is not None
    return Answer(loss.detach(), embeddings.grad, in_matrix, in_classes)


@pytest.mark.parametrize("sizes", [[5, 3], [0, 7], [1, 5, 2]], ids=str)
def test_gradients_are_those_of_one_process(ranks: RankPool, sizes: list[int]) -> None:
    wanted = _step(RankGroup(alone=True), [sum(sizes)])
    answers = ranks.run(len(sizes), _step, sizes)
    for answer in answers:
        torch.testing.assert_close(answer.loss, wanted.loss, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(answer.in_matrix, wanted.in_matrix, rtol=1e-10, atol=1e-12)
    # For the mean that DistributedDataParallel takes.
    met = torch.cat([answer.in_embeddings for answer in answers]) / len(sizes)
    torch.testing.assert_close(met, wanted.in_embeddings, rtol=1e-10, atol=1e-12)
    met = torch.cat([answer.in_classes for answer in answers])
    torch.testing.assert_close(met, wanted.in_classes, rtol=1e-10, atol=1e-12)
