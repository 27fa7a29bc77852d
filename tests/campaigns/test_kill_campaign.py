"""SIGKILL at random moments: every file is old or new, and what goes on comes to the same bits.

``ARCFACE_KD_KILLS`` says how often, over all jobs; the campaign of a release is 60 and takes some minutes.
"""

import os
import random
from pathlib import Path

import pytest
import torch

from arcface_kd.backbones import get_backbone
from tests.campaigns.kill_campaign import (
    CacheBuilding,
    CacheBuildingOnTwoRanks,
    Exporting,
    Job,
    Packing,
    Training,
    TrainingInTheHost,
    TrainingInTheHostOnTwoRanks,
    TrainingOnTwoRanks,
    campaign,
)
from tests.host.trainer.faces import Faces, draw_faces
from tests.host.trainer.host import checkout

KILLS = int(os.environ.get("ARCFACE_KD_KILLS", "16"))
SEED = int(os.environ.get("ARCFACE_KD_KILL_SEED", "0"))

JOBS: list[tuple[type[Job], int, float]] = [
    (Training, 1, 0.25),
    (TrainingOnTwoRanks, 2, 0.2),
    (CacheBuilding, 1, 0.1),
    (CacheBuildingOnTwoRanks, 2, 0.1),
    (Packing, 1, 0.2),
    (Exporting, 1, 0.15),
]
# More than those, where there is a host.
HOST_JOBS: list[tuple[type[Job], int, float]] = [
    (TrainingInTheHost, 1, 0.1),
    (TrainingInTheHostOnTwoRanks, 2, 0.1),
]


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Faces:
    return draw_faces(tmp_path_factory.mktemp("faces"), identities=4, images=4)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(7)
    path = tmp_path_factory.mktemp("teacher") / "teacher.pt"
    torch.save(get_backbone("thin_r18", num_features=16).state_dict(), path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "ranks", "share"), JOBS, ids=[kind.name for kind, *_ in JOBS])
def test_a_killed_job_comes_to_the_same_bits(
    kind: type[Job],
    ranks: int,
    share: float,
    faces: Faces,
    teacher: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    job = kind(tmp_path / "work", faces, teacher, ranks)
    killed, finished = campaign(job, max(1, round(share * KILLS)), random.Random(f"{SEED} {kind.name}"))
    with capsys.disabled():
        print(f"\n{kind.name}: {killed} kills, {finished} ends, all of the same bits (seed {SEED})")


@pytest.mark.slow
@pytest.mark.trainer
@pytest.mark.parametrize(("kind", "ranks", "share"), HOST_JOBS, ids=[kind.name for kind, *_ in HOST_JOBS])
def test_a_host_that_is_killed_comes_to_the_same_bits(
    arcface_torch: Path,
    kind: type[Job],
    ranks: int,
    share: float,
    faces: Faces,
    teacher: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkout(arcface_torch, tmp_path / "arcface_torch", "kd_flag", "cpu_gloo", "current_stack")
    test_a_killed_job_comes_to_the_same_bits(kind, ranks, share, faces, teacher, tmp_path, capsys)
