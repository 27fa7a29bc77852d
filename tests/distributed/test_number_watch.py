"""NaN on one rank of several: all stop at one step, and the rank that has it names the records."""

from pathlib import Path

import torch
from torch import nn

from arcface_kd.config.kd import KDConfig
from arcface_kd.data.dataset import open_dataset
from arcface_kd.data.loader import BatchViews
from arcface_kd.distillation.distiller import Distiller
from arcface_kd.distillation.head import DistillationHead
from arcface_kd.distributed.ranks import RankGroup
from arcface_kd.errors import NumberError
from arcface_kd.teachers.base import load_teacher
from arcface_kd.teachers.options import TeacherOptions
from tests.data.record_sets import insightface_records, write_records
from tests.distributed.pool import RankPool
from tests.reference.problems import ARCFACE


def _train_into_nan(ranks: RankGroup, folder: str, side: str) -> str:
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 4, bias=False))
    torch.manual_seed(0)
    tutor = nn.Sequential(nn.Flatten(), nn.Linear(192, 4, bias=False))
    distiller = Distiller(KDConfig(("adadistill",)), load_teacher(tutor, TeacherOptions(size=8)))
    distiller.faces = open_dataset(folder)
    distiller.watch(network)
    head = DistillationHead(distiller, ARCFACE, 4, 7, ranks=ranks)
    for step in range(3):
        images = torch.randn(3 - ranks.rank, 3, 8, 8)
        if step == 1 and ranks.rank == 1 and side == "both":
            images[1] = float("nan")
        distiller._next_views(BatchViews(torch.tensor([4, 5, 6])[: len(images)], torch.zeros(len(images)) > 0))
        embeddings = network(images)
        if step == 1 and ranks.rank == 1 and side == "student":
            embeddings = embeddings * torch.tensor([[1.0], [float("inf")]])
        try:
            head(embeddings, torch.zeros(len(images), dtype=torch.int64)).backward()
        except NumberError as error:
            return str(error)
    return "nothing"


def test_all_ranks_stop_at_the_step_and_one_names_the_records(tmp_path: Path, ranks: RankPool) -> None:
    folder = write_records(tmp_path / "faces", insightface_records([4, 4]))
    where = open_dataset(folder).where(5)
    for side, called in (("student", "student"), ("both", "teacher")):
        messages = ranks.run(2, _train_into_nan, str(folder), side)
        assert messages[0].startswith(f"step 2 on rank 0: the {called}'s embedding of 1 of 2 images of rank 1 is ")
        assert messages[1].startswith(f"step 2 on rank 1: the {called}'s embedding of 1 of 2 images ({where}) is ")
