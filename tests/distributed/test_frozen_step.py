"""Replayed steps on several ranks, with make-believe graphs: the bits of steps that are not, collectives between."""

import contextlib
from pathlib import Path

import pytest
import torch
from torch import Tensor

from arcface_kd.config.kd import KDConfig
from arcface_kd.distillation.distiller import Distiller
from arcface_kd.distillation.head import DistillationHead
from arcface_kd.distillation.tensorboard_log import TensorBoardLog
from arcface_kd.distributed.ranks import RankGroup
from arcface_kd.teachers.base import load_teacher
from arcface_kd.teachers.options import TeacherOptions
from tests.distillation.test_frozen_step import batch_of, let_say
from tests.distributed.pool import RankPool
from tests.distributed.test_adadistill import CLASSES, Linear
from tests.make_believe_graph import make_believe_graphs
from tests.reference.problems import ARCFACE

DIMENSION, STEPS = 6, 10


def _run(
    ranks: RankGroup,
    method: str,
    sizes: list[int],
    folder: Path,
    margin: str,
    replaying: tuple[int, ...],
    refused: tuple[int, ...] = (0, 0, 0),
) -> tuple[list[Tensor], int]:
    """Losses, gradients and the state after some steps, and how many graphs were recorded.

    ``refused`` says of each rank which graph cannot be.
    """
    kd = KDConfig((method,), classifier=str(folder / "head.pt"), options={"head": {"margin": margin}})
    distiller = Distiller(kd, load_teacher(Linear(DIMENSION, 1), TeacherOptions(size=8)))
    log = TensorBoardLog(folder, STEPS, writes=False)
    head = DistillationHead(distiller, ARCFACE, DIMENSION, CLASSES, seed=3, ranks=ranks, log=log)
    found = []
    with make_believe_graphs() if ranks.rank in replaying else contextlib.nullcontext() as graph:
        if graph is not None:
            graph.refused = refused[ranks.rank]
        for step in range(STEPS):
            embeddings, labels, teacher = batch_of(step, sum(sizes), DIMENSION, CLASSES)
            own = ranks.own_rows(embeddings, sizes).requires_grad_()
            let_say(distiller, ranks.own_rows(teacher, sizes))
            loss = head(own, ranks.own_rows(labels, sizes))
            loss.backward()
            assert own.grad is not None
            found += [loss.detach(), own.grad]
        recorded = 0 if graph is None else graph.recorded
    return found + list(head.state_dict().values()), recorded


@pytest.mark.parametrize("sizes", [[4, 4], [3, 0, 5]], ids=str)
@pytest.mark.parametrize(
    ("method", "margin"), [("adadistill", "none"), ("adadistill", "adaface"), ("margindistillation", "none")]
)
def test_ranks_that_replay_and_ranks_that_do_not_find_the_same(
    ranks: RankPool, method: str, margin: str, sizes: list[int], tmp_path: Path
) -> None:
    torch.save(torch.randn(CLASSES, DIMENSION), tmp_path / "head.pt")
    world = len(sizes)
    wanted = ranks.run(world, _run, method, sizes, tmp_path, margin, ())
    for replaying in (tuple(range(world)), (1,)):
        answers = ranks.run(world, _run, method, sizes, tmp_path, margin, replaying)
        for rank, ((found, recorded), (right, _)) in enumerate(zip(answers, wanted, strict=True)):
            # One graph before, between and behind the collectives.
            assert recorded == (rank in replaying) * 4, recorded
            assert all(torch.equal(met, value) for met, value in zip(found, right, strict=True))


def test_a_rank_that_cannot_record_goes_along_with_one_that_replays(ranks: RankPool, tmp_path: Path) -> None:
    wanted = ranks.run(2, _run, "adadistill", [4, 4], tmp_path, "none", ())
    # Behind its first collective.
    answers = ranks.run(2, _run, "adadistill", [4, 4], tmp_path, "none", (0, 1), (0, 2))
    assert [recorded for _, recorded in answers] == [4, 2]
    for (found, _), (right, _) in zip(answers, wanted, strict=True):
        assert all(torch.equal(met, value) for met, value in zip(found, right, strict=True))
