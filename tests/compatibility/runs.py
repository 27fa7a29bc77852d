"""Runs of a tiny student, which commit a44a264 began and the code of today goes on with.

All paths are relative to the folder that the runs are made in. Only the public face of the package is used.
"""

import gc
import json
import os
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import Tensor, distributed, nn

import arcface_kd.backbones
from arcface_kd.backbones import FaceBackbone

CLASSES, IMAGES, DIMENSION, BATCH = 24, 2, 8, 8
STEPS_AN_EPOCH = CLASSES * IMAGES // BATCH
NETWORK = "tiny"

Set = Callable[[dict[str, Any], str, Any], object]


class Tiny(FaceBackbone):
    """A network of 1,400 parameters, so that a checkpoint takes few bytes; ``fp16`` has no effect."""

    def __init__(self, *, fp16: bool = False, num_features: int = 512) -> None:
        super().__init__(fp16=fp16)
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 8, 8, bias=False), nn.BatchNorm2d(4), nn.PReLU(4))
        self.trunk = nn.Sequential(nn.Conv2d(4, 8, 2, 2, bias=False), nn.BatchNorm2d(8), nn.PReLU(8))
        self.pool = nn.Conv2d(8, 8, 7, groups=8, bias=False)
        self.fc = nn.Linear(8, num_features)
        self.features = nn.BatchNorm1d(num_features)

    def feature_map(self, images: Tensor) -> Tensor:
        """(B, 3, 112, 112) to (B, 8, 7, 7)."""
        result: Tensor = self.trunk(self.stem(images))
        return result

    def tail(self, feature_map: Tensor) -> Tensor:
        """(B, 8, 7, 7) to (B, D)."""
        result: Tensor = self.features(self.fc(self.pool(feature_map).flatten(1)))
        return result


def add_network(set_item: Set = dict.__setitem__) -> None:
    """Put the tiny network into every table of networks that the package has; a test gives ``monkeypatch.setitem``."""
    modules = [module for name, module in list(sys.modules.items()) if name.partition(".")[0] == "arcface_kd"]
    tables = {
        id(value): value
        for module in (arcface_kd.backbones, *modules)
        for value in list(vars(module).values())
        if isinstance(value, dict) and {"mbf", "mobilefacenet"} & value.keys()
    }
    for table in tables.values():
        set_item(table, NETWORK, Tiny)


# The configs among the files say what each run is.
ALONE = [f"{name}-1" for name in ("alone", "adadistill", "embedding", "gkd", "kd", "tcs")] + ["half-filled"]
TWO_RANKS = [name.replace("-1", "-2") for name in ALONE[:-1]]
# The rest of what has a state of its own, and a method of somebody else, under the contract of that commit.
TWO_RANKS += [f"{name}-2" for name in ("crosskd", "ekd", "margindistillation", "projected", "thkd", "similarity")]
# Long enough for the teacher to find the classes of the first run's student, which the third run checks.
SHKD_TEACHER_EPOCHS = 30
FINISHED = ("alone-1", "adadistill-1")


def command(*words: str) -> int:
    """Run ``arcface-kd`` in this process; returns its exit code."""
    found = {entry.value: entry for entry in metadata.entry_points(group="console_scripts", name="arcface-kd")}
    (entry,) = found.values()
    code: int = entry.load()(list(words))
    return code


def go_on(work: str, *names: str) -> None:
    """Go on with some runs in a folder, on the ranks of this job."""
    os.chdir(work)
    add_network()
    distributed.init_process_group("gloo")
    codes = {name: command("train", f"{name}.py", "--set", "resume=True") for name in names}
    if distributed.get_rank() == 0:
        Path("codes.json").write_text(json.dumps(codes))
    # As in `process_group`: a DistributedDataParallel must not outlive its group.
    gc.collect()
    distributed.destroy_process_group()
