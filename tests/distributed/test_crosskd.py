"""CrossKD on several ranks: each has its own images' maps, together they are the naive twin; and under DDP."""

from pathlib import Path
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
from arcface_kd.methods.base import Batch, RunContext
from arcface_kd.methods.crosskd import CrossKD, CrossKDConfig
from arcface_kd.teachers.base import load_teacher
from tests.distributed.pool import RankPool
from tests.reference.crosskd import crosskd_terms
from tests.reference.problems import ARCFACE
from tests.teachers.feature_networks import Plain, seeded

CLASSES, DIMENSION = 7, 5
STUDENT, TEACHER = (4, 3, 3), (6, 2, 2)
SIZES = [[8], [5, 3], [0, 6], [1, 4, 2]]


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _tail(feature_map: Tensor) -> Tensor:
    return (feature_map.flatten(1) @ _random(11, 24, DIMENSION)).tanh() * 3


class Problem(NamedTuple):
    """A batch of all ranks."""

    maps: Tensor
    teacher_maps: Tensor
    labels: Tensor


def _problem(rows: int) -> Problem:
    labels = torch.arange(rows) % CLASSES
    labels[2] = -1
    return Problem(_random(1, rows, *STUDENT), _random(2, rows, *TEACHER) * 2 + 1, labels)


class Answer(NamedTuple):
    """One rank's step."""

    terms: dict[str, Tensor]
    in_map: Tensor
    in_adapter: list[Tensor]


def _step(ranks: RankGroup, sizes: list[int], config: CrossKDConfig) -> Answer:
    problem = _problem(sum(sizes))
    shard = ranks.shard(CLASSES)
    context = RunContext(
        num_classes=CLASSES,
        embedding_size=3,
        margin=ARCFACE,
        ranks=ranks,
        teacher_embedding_size=DIMENSION,
        teacher_classifier=_random(5, CLASSES, DIMENSION)[shard.start : shard.start + shard.size],
        teacher_tail=_tail,
        teacher_map_shape=TEACHER,
        student_map_shape=STUDENT,
    )
    method = CrossKD(config, context).double()
    own_map = ranks.own_rows(problem.maps, sizes).clone().requires_grad_()
    teacher = normalize(_tail(problem.teacher_maps))
    embeddings = _random(3, sum(sizes), 3)
    own_teacher_map = ranks.own_rows(problem.teacher_maps, sizes)
    terms = method(Batch(embeddings, embeddings, problem.labels, teacher, sizes, 0, own_map, own_teacher_map))
    torch.stack(list(terms.values())).sum().backward()
    assert own_map.grad is not None
    in_adapter = [each.grad for each in method.adapter.parameters() if each.grad is not None]
    return Answer({name: term.detach() for name, term in terms.items()}, own_map.grad, in_adapter)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("statistics", ["rank", "all"])
def test_terms_and_gradients_are_those_of_one_process(ranks: RankPool, sizes: list[int], statistics: Any) -> None:
    """Statistics are each rank's own, or those of the whole batch with their gradients through all ranks' images."""
    config = CrossKDConfig("both", embedding_weight=3.0, logit_weight=0.5, temperature=8.0, statistics=statistics)
    answers = ranks.run(len(sizes), _step, sizes, config)
    problem = _problem(sum(sizes))
    conv = CrossKD(config, _context_of_one()).double().adapter.conv
    assert conv is not None
    assert conv.bias is not None
    problem.maps.requires_grad_()
    mimicry, divergence = crosskd_terms(
        problem.maps,
        problem.teacher_maps,
        _tail,
        adapter=(conv.weight[:, :, 0, 0], conv.bias),
        groups=sizes if statistics == "rank" else None,
        labels=problem.labels,
        classifier=_random(5, CLASSES, DIMENSION),
        temperature=8.0,
    )
    (3 * mimicry + 0.5 * divergence).backward()
    for answer in answers:
        torch.testing.assert_close(answer.terms["cross_embedding"], 3 * mimicry.detach(), rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(answer.terms["cross_logits"], 0.5 * divergence.detach(), rtol=1e-8, atol=1e-8)
        # What the optimiser steps by is the gradient of the loss of the whole batch.
        torch.testing.assert_close(answer.in_adapter[0], conv.weight.grad, rtol=1e-7, atol=1e-8)
        torch.testing.assert_close(answer.in_adapter[1], conv.bias.grad, rtol=1e-7, atol=1e-8)
    # DistributedDataParallel takes the mean over ranks.
    met = torch.cat([answer.in_map for answer in answers])
    assert problem.maps.grad is not None
    torch.testing.assert_close(met, problem.maps.grad * len(sizes), rtol=1e-7, atol=1e-8)


def _context_of_one() -> RunContext:
    return RunContext(
        num_classes=CLASSES,
        embedding_size=3,
        margin=ARCFACE,
        ranks=RankGroup(alone=True),
        teacher_classifier=_random(5, CLASSES, DIMENSION),
        teacher_tail=_tail,
        teacher_map_shape=TEACHER,
        student_map_shape=STUDENT,
    )


def _network(seed: int, channels: int) -> nn.Module:
    """Without batch norms in training: their statistics are each rank's own, with or without us."""
    network = seeded(Plain(DIMENSION, channels), seed)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.track_running_stats = True
            module.momentum = 0.0
            module.train = lambda mode=True, module=module: module  # type: ignore[method-assign]
    return network


def _train(ranks: RankGroup, folder: Path) -> dict[str, Tensor]:
    """Two steps of two micro-steps each, under DDP where there are ranks."""
    options = {"crosskd": {"student_map": "second", "teacher_map": "second", "statistics": "all"}}
    distiller = Distiller(KDConfig(("crosskd",), options=options), load_teacher(_network(1, 6), {"size": 16}))
    student = distiller.watch(_network(2, 4)).train()
    backbone: nn.Module = student
    if ranks.world_size > 1:
        backbone = DistributedDataParallel(student, process_group=ranks.group)
        if folder.name == "static":
            backbone._set_static_graph()
    head = DistillationHead(distiller, ARCFACE, DIMENSION, CLASSES, seed=3, ranks=ranks)
    groups = [{"params": list(backbone.parameters())}, {"params": list(head.parameters())}]
    optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    for step in range(4):
        images = torch.rand(8, 3, 16, 16, generator=generator) * 2 - 1
        labels = torch.randint(CLASSES, (8,), generator=generator)
        sizes = [8 // ranks.world_size] * ranks.world_size
        head(backbone(ranks.own_rows(images, sizes)), ranks.own_rows(labels, sizes)).backward()
        if step % 2:
            nn.utils.clip_grad_norm_(backbone.parameters(), 5)
            optimizer.step()
            optimizer.zero_grad()
    method = head.methods["crosskd"]
    assert isinstance(method, nn.Module)
    return {**student.state_dict(), **{f"head.{name}": value for name, value in method.state_dict().items()}}


@pytest.mark.parametrize("how", ["plain", "static"])
def test_two_ranks_train_as_one(ranks: RankPool, how: str, tmp_path: Path) -> None:
    """Under DDP, with gradients accumulated: student and adapter come out as one process makes them."""
    (wanted,) = ranks.run(1, _train, tmp_path / how)
    before = {**_network(2, 4).state_dict()}
    for answer in ranks.run(2, _train, tmp_path / how):
        assert answer.keys() == wanted.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(answer[name], value, rtol=1e-3, atol=1e-4, msg=f"{name} differs")
    moved = [name for name, value in before.items() if not torch.equal(value, wanted[name])]
    assert "first.0.weight" in moved
    assert "second.0.weight" in moved
