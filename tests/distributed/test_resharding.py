"""A run begun on some ranks goes on with others as if it had not been interrupted."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from arcface_kd.checkpoints.files import checkpoint_file
from arcface_kd.checkpoints.shards import merge_head
from arcface_kd.config.kd import KDConfig
from arcface_kd.distillation.distiller import Distiller
from arcface_kd.distillation.head import DistillationHead
from arcface_kd.distributed.ranks import RankGroup
from arcface_kd.methods.class_centers import DistilledCenters
from arcface_kd.teachers.base import load_teacher
from arcface_kd.teachers.options import TeacherOptions
from tests.distributed.pool import RankPool
from tests.distributed.test_adadistill import Linear
from tests.reference.problems import ARCFACE

CLASSES, BATCH, TEACHER, STUDENT = 11, 12, 6, 4


class Rounded(Linear):
    """A teacher in fp32 whose last digits do not depend on how many images it is shown at a time."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).mul(64).round().div(64)


def _batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    images = torch.rand(BATCH, 3, 8, 8, generator=generator, dtype=torch.float64) * 2 - 1
    return images, torch.randint(CLASSES, (BATCH,), generator=generator)


def _train(ranks: RankGroup, kd: str, folder: Path, steps: range, resume: bool) -> list[float]:
    """What the host's loop does, from `steps.start` to `steps.stop`, on a batch that is cut evenly."""
    teacher = load_teacher(Rounded(TEACHER, seed=1), TeacherOptions(size=8))
    methods = (kd,) if kd else ()
    options = {"student": {"projection": "linear"}}
    distiller = Distiller(KDConfig(methods, options=options), teacher if kd else None)
    student = Linear(STUDENT, seed=2).double()
    backbone: nn.Module = distiller.watch(student)
    if ranks.world_size > 1:
        backbone = DistributedDataParallel(student, process_group=ranks.group)
    head = DistillationHead(distiller, ARCFACE, STUDENT, CLASSES, seed=3, ranks=ranks, run_folder=folder).double()
    for module in head.modules():
        if isinstance(module, DistilledCenters):
            module.refresh()
    optimizer = torch.optim.SGD(
        [{"params": list(backbone.parameters())}, {"params": list(head.parameters())}], lr=1e-3, momentum=0.9
    )
    if resume:
        own = checkpoint_file(folder, ranks.rank)
        checkpoint = torch.load(own if own.is_file() else checkpoint_file(folder, 0), weights_only=True)
        student.load_state_dict(checkpoint["state_dict_backbone"])
        head.load_state_dict(checkpoint["state_dict_softmax_fc"])
        optimizer.load_state_dict(checkpoint["state_optimizer"])
    losses = []
    for step in steps:
        images, labels = _batch(step)
        mine = slice(ranks.rank * BATCH // ranks.world_size, (ranks.rank + 1) * BATCH // ranks.world_size)
        loss = head(backbone(images[mine]), labels[mine])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    torch.save(
        {
            "epoch": 1,
            "global_step": steps.stop,
            "state_dict_backbone": student.state_dict(),
            "state_dict_softmax_fc": head.state_dict(),
            "state_optimizer": optimizer.state_dict(),
        },
        checkpoint_file(folder, ranks.rank),
    )
    return losses


@pytest.mark.parametrize("kd", ["adadistill", ""], ids=["adadistill", "classifier"])
@pytest.mark.parametrize("worlds", [(4, 1), (4, 2), (4, 3), (1, 2), (2, 4, 3)], ids=str)
def test_a_run_goes_on_as_if_it_had_not_been_interrupted(
    ranks: RankPool, tmp_path: Path, worlds: tuple[int, ...], kd: str
) -> None:
    """Student, centers or classifier, projection and momentum: all of them would show in the losses."""
    straight = tmp_path / "straight"
    straight.mkdir()
    wanted = ranks.run(1, _train, kd, straight, range(4 * len(worlds)), False)[0]
    losses: list[float] = []
    for turn, world_size in enumerate(worlds):
        answers = ranks.run(world_size, _train, kd, tmp_path, range(4 * turn, 4 * turn + 4), turn > 0)
        assert all(answer == answers[0] for answer in answers)
        losses += answers[0]
    assert losses == pytest.approx(wanted, rel=1e-10)
    assert abs(wanted[4] - wanted[0]) > 1e-3
    # And what is left at the end is the same head, whoever has written it.
    for folder in (straight, tmp_path):
        merge_head(folder, folder / "head.pt")
    merged: list[dict[str, Any]] = [torch.load(folder / "head.pt") for folder in (straight, tmp_path)]
    torch.testing.assert_close(merged[1]["weight"], merged[0]["weight"], rtol=1e-9, atol=1e-9)


def _resume_without_the_others(ranks: RankGroup, folder: Path) -> str:
    try:
        _train(ranks, "adadistill", folder, range(4, 5), True)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was said"


def test_every_rank_says_which_checkpoint_is_missing(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(3, _train, "adadistill", tmp_path, range(4), False)
    checkpoint_file(tmp_path, 2).unlink()
    for said in ranks.run(2, _resume_without_the_others, tmp_path):
        assert said.startswith("CheckpointError")
        assert "checkpoint_gpu_2.pt is missing" in said
