"""SIGKILL at random moments: every file is old or new, and what goes on comes to the same bits.

``ARCFACE_KD_KILLS`` says how often, over all jobs; the campaign of a release is 60 and takes some minutes.
"""

import os
import random
from pathlib import Path
from typing import Any

import pytest

from tests.campaigns.kill_campaign import CacheBuilding, Exporting, Job, Packing, Training, TrainingInTheHost, campaign
from tests.host.trainer.faces import Faces
from tests.host.trainer.host import checkout

KILLS = int(os.environ.get("ARCFACE_KD_KILLS", "16"))
SEED = int(os.environ.get("ARCFACE_KD_KILL_SEED", "0"))

# On one rank or on two, of which one or both are killed; the host's kills come on top, where there is one.
JOBS: list[tuple[type[Job], int, float]] = [
    *((Training, 1, 0.25), (Training, 2, 0.2), (CacheBuilding, 1, 0.1), (CacheBuilding, 2, 0.1)),
    *((Packing, 1, 0.2), (Exporting, 1, 0.15), (TrainingInTheHost, 1, 0.1), (TrainingInTheHost, 2, 0.1)),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "ranks", "share"),
    [
        pytest.param(*job, id=f"{job[0].name}-{job[1]}", marks=[pytest.mark.trainer] * (job[0] is TrainingInTheHost))
        for job in JOBS
    ],
)
def test_a_killed_job_comes_to_the_same_bits(
    kind: type[Job], ranks: int, share: float, faces: Faces, teacher: Path, tmp_path: Path, request: Any, capsys: Any
) -> None:
    if kind is TrainingInTheHost:
        host = request.getfixturevalue("arcface_torch")
        checkout(host, tmp_path / "arcface_torch", "kd_flag", "cpu_gloo", "current_stack")
    job = kind(tmp_path / "work", faces, teacher, ranks)
    killed, finished = campaign(job, max(1, round(share * KILLS)), random.Random(f"{SEED} {kind.name} {ranks}"))
    with capsys.disabled():
        print(f"\n{kind.name} on {ranks}: {killed} kills, {finished} ends, all of the same bits (seed {SEED})")
