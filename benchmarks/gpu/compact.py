"""Check 8: the compact trainer's runs, resumed on the GPU, on the CPU and back, and their class centers joined."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from easydict import EasyDict
from torch import Tensor, nn

from arcface_kd.backbones import get_backbone
from arcface_kd.checkpoints.shards import merge_head
from arcface_kd.evaluation.scoring import find_sets, load_models, score
from arcface_kd.training.trainer import train
from benchmarks.gpu.checks import Findings, Place
from benchmarks.gpu.inputs import verification_set
from benchmarks.gpu.runs import Runs

# Weight gradients on a GPU are sums in no fixed order, so that two runs part by and by.
_APART = {"cpu": 0.0, "cuda": 5e-2}
_ON_THE_CPU = """
import json, sys
from easydict import EasyDict
from benchmarks.gpu.compact import until
if __name__ == "__main__":
    until(EasyDict(json.loads(sys.argv[1])), 3)
"""


class _Stop(Exception):
    """Ends a run after an epoch, as a kill would."""


def until(config: EasyDict, epoch: int, on_epoch: Callable[[int], object] = lambda done: None) -> None:
    """Train up to the end of an epoch of more; ``on_epoch`` is called at the end of each."""

    def stop(done: int) -> None:
        on_epoch(done)
        if done == epoch:
            raise _Stop

    with contextlib.suppress(_Stop):
        train(config, on_epoch=stop)


def trainer(place: Place, found: Findings) -> None:
    """Two epochs against one and a resumed one; a third on the CPU, a fourth back on the GPU; merge-head."""
    identities, batch = (4, 8) if place.tiny else (100, 40)
    # A small student: an epoch of a larger one takes two cores of a CPU minutes.
    runs = Runs(place, "thin_r18", "thin_r18", identities, batch)
    keys: dict[str, Any] = {"kd": "adadistill", "kd_teacher": str(runs.teacher_path), "num_epoch": 4}
    keys |= {"frequent": 1 if place.tiny else 5, "val_targets": [verification_set(runs.folder)]}
    whole, parts = (runs.config(output, **keys) for output in ("whole", "parts"))
    # Two runs part on a GPU from their first step on, so both have the first epoch in common.
    until(whole, 2, lambda done: done == 1 and shutil.copytree(whole.output, parts.output))
    parts.resume = True
    until(parts, 2)
    expected, met = (_student(config) for config in (whole, parts))
    apart = float((met - expected).norm() / expected.norm())
    found.add("one epoch and a resumed one against two: relative difference of the student", apart)
    found.expect(apart <= _APART[place.device.type], f"the resumed run's weights are {apart:.1e} apart")
    _third_on_the_cpu(parts, found)
    before = _loss(parts)
    result = train(parts)
    after = _loss(parts)
    found.add("loss after the third epoch", before)
    found.add("loss after the fourth", after)
    found.expect(after < before, f"the loss went from {before} to {after}")
    accuracies = {name: each.accuracy for name, each in result.verification.items()}
    found.add("accuracy on verification sets", str(accuracies))
    # A set that cannot be verified is passed over with a warning.
    found.expect(bool(accuracies), "the verification set was not verified: the log says why")
    # As `arcface-kd eval` judges the run.
    models = load_models([str(parts.output)], device=place.device)
    found.add("judged by eval", len([*score(models, find_sets([runs.folder]), device=place.device)]))
    classes, dimension = merge_head(Path(parts.output), place.scratch / "head.pt")
    found.add("merged class centers", f"{classes} x {dimension}")
    found.expect((classes, dimension) == (identities, runs.dimension), f"merge-head made {classes} x {dimension}")
    _on_both(place, parts, found)


def _third_on_the_cpu(config: EasyDict, found: Findings) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", _ON_THE_CPU, json.dumps(dict(config))],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        stderr=subprocess.STDOUT,
    )
    state = torch.load(Path(config.output) / "checkpoint_gpu_0.pt", weights_only=True, map_location="cpu")
    found.add("epochs done after the one on the CPU", int(state["epoch"]))
    found.expect(ended.returncode == 0 and state["epoch"] == 3, f"the epoch on the CPU ended with {ended.returncode}")


def _student(config: EasyDict) -> Tensor:
    """All of a student's numbers."""
    state = torch.load(Path(config.output) / "model.pt", weights_only=True, map_location="cpu")
    return torch.cat([value.double().flatten() for value in state.values() if value.is_floating_point()])


def _loss(config: EasyDict) -> float:
    """The mean of the last losses that the log tells."""
    lines = (Path(config.output) / "training.log").read_text(encoding="utf-8").splitlines()
    losses = [float(line.split("Loss ")[1].split()[0]) for line in lines if "Loss " in line]
    last = losses[-4:]
    return sum(last) / len(last)


def _on_both(place: Place, config: EasyDict, found: Findings) -> None:
    """The saved student embeds on the device as on the CPU."""
    network: nn.Module = get_backbone(config.network, num_features=config.embedding_size)
    network.load_state_dict(torch.load(Path(config.output) / "model.pt", weights_only=True, map_location="cpu"))
    images = torch.rand(8, 3, 112, 112, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        here = network.eval()(images)
        there = network.to(place.device)(images.to(place.device)).cpu()
    difference = float((here - there).norm() / here.norm())
    found.add("the saved student on the device against the CPU, relative difference", difference)
    found.expect(difference < 1e-2, f"the saved student embeds otherwise on the device: {difference:.1e}")
