"""Two ranks that distil through one cache: the losses and gradients of the online teacher, each image asked once."""

import logging
import multiprocessing.process
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from arcface_kd.config.kd import KDConfig
from arcface_kd.data.dataset import RecordDataset
from arcface_kd.data.fingerprint import fingerprint
from arcface_kd.data.loader import FaceLoader
from arcface_kd.data.sampler import ViewSampler
from arcface_kd.distillation.distiller import Distiller
from arcface_kd.distillation.head import DistillationHead
from arcface_kd.distributed.ranks import RankGroup
from arcface_kd.teachers.cache.embedding_cache import EmbeddingCache, identity_of
from arcface_kd.teachers.cache.fill import fill_cache
from tests.distillation.test_cached_distillation import DIMENSION, Network, teacher_of
from tests.distributed.pool import LARGEST_WORLD, RankPool
from tests.host.trainer.faces import Faces
from tests.reference.problems import ARCFACE


class Trace(NamedTuple):
    """One rank's run: losses, images that its teacher was shown, the student's weights at the end."""

    losses: list[float]
    shown: int
    weight: Tensor


def _distil(
    ranks: RankGroup, faces: Faces, cache: Path | None, epochs: range, rounded: bool = False, workers: int = 0
) -> Trace:
    # A daemon, as the pool's ranks are, may have no workers.
    multiprocessing.process.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    network = Network(1, rounded)
    kd = KDConfig(methods=("adadistill",), cache=None if cache is None else str(cache))
    distiller = Distiller(kd, teacher_of(network))
    dataset = RecordDataset(faces.folder)
    sampler = ViewSampler(len(dataset), rank=ranks.rank, world_size=ranks.world_size, seed=4)
    loader = FaceLoader(dataset, batch_size=8, sampler=sampler, num_workers=workers)
    distiller.use_cache(loader, ranks)
    student = distiller.watch(Network(2))
    backbone = DistributedDataParallel(student, process_group=ranks.group)
    head = DistillationHead(distiller, ARCFACE, DIMENSION, faces.num_classes, ranks=ranks)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for epoch in epochs:
        sampler.set_epoch(epoch)
        for images, labels in loader:
            loss = head(backbone(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    weight = next(iter(student.parameters()))
    return Trace(losses, network.shown, weight.detach().clone())


@pytest.mark.parametrize("workers", [0, 1])
def test_two_ranks_share_one_cache(ranks: RankPool, faces: Faces, tmp_path: Path, workers: int) -> None:
    online = ranks.run(2, _distil, faces, None, range(2), rounded=True)
    filling = ranks.run(2, _distil, faces, tmp_path / "rows", range(2), workers=workers)
    filled = ranks.run(2, _distil, faces, tmp_path / "rows", range(2), workers=workers)
    for cached in (filling, filled):
        for wanted, met in zip(online, cached, strict=True):
            assert met.losses == wanted.losses
            assert torch.equal(met.weight, wanted.weight)
    assert len(set(online[0].losses)) == 6
    # 48 images in two epochs: what one rank embedded in the first, the other one finds in the second.
    assert 48 <= sum(rank.shown for rank in filling) < 96
    assert [rank.shown for rank in filled] == [0, 0]


def _fill(ranks: RankGroup, config: dict[str, Any]) -> tuple[int, int, str]:
    network = Network(1)
    report = fill_cache(config, teacher=teacher_of(network))
    return network.shown, report.missing, str(report.path)


def test_ranks_fill_a_cache_together_and_the_next_run_finds_it(ranks: RankPool, faces: Faces, tmp_path: Path) -> None:
    file = tmp_path / "rows"
    config = {"rec": str(faces.folder), "batch_size": 5, "num_workers": 0, "kd_cache": str(file)}
    filled = ranks.run(LARGEST_WORLD, _fill, config)
    assert [shown for shown, _, _ in filled] == [24] * LARGEST_WORLD
    assert [missing for _, missing, _ in filled] == [96] * LARGEST_WORLD
    online = ranks.run(2, _distil, faces, None, range(5, 7), rounded=True)
    cached = ranks.run(2, _distil, faces, file, range(5, 7))
    assert [rank.shown for rank in cached] == [0, 0]
    assert [rank.losses for rank in cached] == [rank.losses for rank in online]


def test_missing_rows_are_shared_out_evenly(ranks: RankPool, faces: Faces, tmp_path: Path) -> None:
    """Whatever is missing, and wherever in the file: no rank waits for another one's share."""
    dataset, teacher = RecordDataset(faces.folder), teacher_of(Network(1))
    file = tmp_path / "rows"
    cache = EmbeddingCache(file, identity_of(teacher, fingerprint(dataset), len(dataset)))
    index = torch.arange(40).repeat_interleave(2)
    cache.store(index, torch.tensor([False, True]).repeat(40), torch.ones(80, DIMENSION))
    config = {"rec": str(faces.folder), "batch_size": 5, "num_workers": 0, "kd_cache": str(file)}
    filled = ranks.run(LARGEST_WORLD, _fill, config)
    assert [shown for shown, _, _ in filled] == [4] * LARGEST_WORLD
    assert cache.filled() == 96


def _heard_while_filling(ranks: RankGroup, config: dict[str, Any]) -> list[str]:
    heard: list[str] = []
    ear = logging.Handler()
    ear.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("arcface_kd").addHandler(ear)
    _fill(ranks, config)
    logging.getLogger("arcface_kd").removeHandler(ear)
    return heard


def test_one_rank_warns_of_the_data(ranks: RankPool, tmp_path: Path) -> None:
    photographs = tmp_path / "photographs"
    for number in range(8):
        file = photographs / f"person {number % 2}" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(file), np.random.default_rng(number).integers(0, 256, (112, 112, 3), dtype=np.uint8))
    (photographs / "person 0" / "notes.txt").write_text("")
    config = {"rec": str(photographs), "batch_size": 2, "num_workers": 0, "kd_cache": str(tmp_path / "rows")}
    heard = ranks.run(LARGEST_WORLD, _heard_while_filling, config)
    assert [sum("passed over 1 files" in line for line in lines) for lines in heard] == [1] + [0] * (LARGEST_WORLD - 1)
