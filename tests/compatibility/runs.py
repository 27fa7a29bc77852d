"""Runs of a tiny student, which commit a44a264 began (see record.py) and the code of today goes on with.

    python -m tests.compatibility.runs WORK NAME ...     # by torchrun: train these runs on its ranks

All paths are relative to the folder that the runs are made in. Only the public face of the package is used.
"""

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

import arcface_kd.backbones
from arcface_kd.backbones import FaceBackbone

CLASSES, IMAGES, DIMENSION, BATCH, EPOCHS = 24, 2, 8, 8, 2
STEPS_AN_EPOCH = CLASSES * IMAGES // BATCH
NETWORK = "tiny"

Set = Callable[[dict[str, Any], str, Any], object]


class Tiny(FaceBackbone):
    """A network of 1,400 parameters, so that a checkpoint takes few bytes.

    Args:
        fp16: of no effect.
        num_features: embedding size D.
    """

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
    """Put the tiny network into every table of networks that the package has.

    Args:
        set_item: ``monkeypatch.setitem`` in a test.
    """
    modules = [module for name, module in list(sys.modules.items()) if name.partition(".")[0] == "arcface_kd"]
    tables = {
        id(value): value
        for module in (arcface_kd.backbones, *modules)
        for value in list(vars(module).values())
        if isinstance(value, dict) and {"mbf", "mobilefacenet"} & value.keys()
    }
    for table in tables.values():
        set_item(table, NETWORK, Tiny)


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        kd: methods joined by ``+``; None for the student alone.
        ranks: processes.
        keys: further keys of the config.
    """

    kd: str | None
    ranks: int
    keys: Mapping[str, Any] = field(default_factory=dict)

    def config(self, name: str) -> dict[str, Any]:
        """The config's keys.

        Args:
            name: of the run, and of its output folder.
        """
        shared = {
            "rec": "records",
            "num_classes": CLASSES,
            "num_image": CLASSES * IMAGES,
            "num_epoch": EPOCHS,
            "warmup_epoch": 0,
            "val_targets": [],
            "network": NETWORK,
            "embedding_size": DIMENSION,
            "margin_list": (1.0, 0.3, 0.0),
            "batch_size": BATCH // self.ranks,
            "lr": 0.02,
            "frequent": 1,
            "verbose": 10**6,
            "num_workers": 0,
            "save_all_states": True,
            "output": name,
        }
        return {**shared, **({} if self.kd is None else {"kd": self.kd}), **self.keys}


TEACHER = {"kd_teacher": "teacher/model.pt"}
BOTH = {**TEACHER, "kd_classifier": "teacher"}
SAMPLED = {"sample_rate": 0.5}

RUNS: Mapping[str, Run] = {
    **{
        f"{name}-{ranks}": Run(kd, ranks, keys)
        for ranks in (1, 2)
        for name, kd, keys in (
            ("alone", None, {**SAMPLED, "optimizer": "adamw", "lr": 0.001}),
            ("adadistill", "adadistill", TEACHER),
            ("embedding", "embedding", {**TEACHER, "gradient_acc": 4}),
            ("gkd", "gkd", {**BOTH, **SAMPLED, "kd_option": {"gkd.ramp_epochs": 1, "gkd.step": 2}}),
            ("kd", "kd", {**BOTH, "kd_classifier": "head.pt"}),
            ("tcs", "tcs", {"kd_cache": "rows", "kd_option": ["tcs.drop_begin=0.1", "tcs.rounds=2"]}),
        )
    },
    # The rest of what has a state of its own.
    "crosskd-2": Run(
        "crosskd",
        2,
        {
            **TEACHER,
            "kd_option": [f"crosskd.{side}_map=trunk" for side in ("student", "teacher")] + ["crosskd.adapter=conv"],
        },
    ),
    "ekd-2": Run("ekd", 2, {**TEACHER, "kd_option": "ekd.positive_weight=1 ekd.momentum=0.5"}),
    "margindistillation-2": Run("margindistillation", 2, {**BOTH, **SAMPLED}),
    "projected-2": Run("embedding", 2, {**TEACHER, "embedding_size": 6, "kd_option": "student.projection=linear"}),
    "thkd-2": Run("thkd", 2, BOTH),
    # A method of somebody else, under the contract of that commit.
    "similarity-2": Run("similarity", 2, TEACHER),
    "half-filled": Run("adadistill", 1, {**TEACHER, "kd_cache": "half", "kd_option": {"adadistill.alpha": "plain"}}),
}
# Long enough for the teacher to find the classes of the first run's student, which the third run checks.
SHKD_TEACHER_EPOCHS = 30
SHKD = Run(
    "shkd",
    1,
    {
        **TEACHER,
        "lr": 0.1,
        "kd_option": {
            "shkd.distil": "kd",
            "shkd.student_epochs": 20,
            "shkd.teacher_epochs": SHKD_TEACHER_EPOCHS,
            "shkd.teacher_lr": 0.1,
        },
    },
)


def command(*words: str) -> int:
    """Run ``arcface-kd`` in this process; returns its exit code.

    Args:
        words: of the command.
    """
    found = {entry.value: entry for entry in metadata.entry_points(group="console_scripts", name="arcface-kd")}
    (entry,) = found.values()
    code: int = entry.load()(list(words))
    return code


def main(work: str, *names: str) -> None:
    """Go on with some runs, on the ranks that ``torchrun`` has started.

    Args:
        work: the folder.
        names: of the runs.
    """
    os.chdir(work)
    add_network()
    distributed.init_process_group("gloo")
    codes = {name: command("train", f"{name}.py", "--set", "resume=True") for name in names}
    if distributed.get_rank() == 0:
        Path("codes.json").write_text(json.dumps(codes))
    distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
