"""Runs of the compact trainer's own steps, with whatever method, teacher and cache."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from easydict import EasyDict
from torch import Tensor

from arcface_kd.config.kd import KDConfig
from arcface_kd.distillation.distiller import Distiller
from arcface_kd.distillation.drop_ins import drop_ins
from arcface_kd.teachers.base import Teacher, load_teacher
from arcface_kd.teachers.cache.fill import fill_cache
from arcface_kd.training.run import Run
from benchmarks.gpu.checks import Place
from benchmarks.gpu.inputs import DIMENSION, IMAGES_EACH, config_of, records, teacher_file


class Runs:
    """Makes runs over the same records and the same teacher.

    Attributes:
        identities: number of classes.
        dimension: of teacher and student.
        folder: with the records.
        teacher_path: the teacher's file.

    Args:
        place: of the check.
        teacher: name of the teacher's network.
        student: name of the student's.
        identities: number of classes.
        batch: images a step.
        dimension: None takes 512, or 16 where all is tiny.
        precision: of the teacher, and of its cache.
    """

    def __init__(
        self,
        place: Place,
        teacher: str,
        student: str,
        identities: int,
        batch: int,
        dimension: int | None = None,
        precision: str = "fp32",
    ) -> None:
        self.place, self.student, self.identities, self.batch = place, student, identities, batch
        self.dimension = dimension or (16 if place.tiny else DIMENSION)
        self.folder = records(place, identities)
        self.teacher_path = teacher_file(place, teacher, self.dimension, self.folder)
        self.precision = precision
        self._cache: Path | None = None

    def teacher(self, precision: str | None = None) -> Teacher:
        """The teacher, on the device of whoever asks it."""
        return load_teacher(self.teacher_path, {"precision": precision or self.precision})

    def config(self, output: str, **keys: Any) -> EasyDict:
        """A run's config; ``kd*`` keys among them."""
        return config_of(
            self.folder,
            self.place.scratch / output,
            self.identities,
            **{
                "network": self.student,
                "embedding_size": self.dimension,
                "batch_size": self.batch,
                "num_workers": 0 if self.place.tiny else 4,
                "fp16": True,
                "save_all_states": True,
                **keys,
            },
        )

    @property
    def cache(self) -> Path:
        """A full cache of the teacher's embeddings."""
        if self._cache is None:
            self._cache = self.place.scratch / f"{self.teacher_path.stem}_{self.identities}_{self.precision}.rows"
            fill_cache(self.config("fill", kd_cache=str(self._cache)), teacher=self.teacher())
        return self._cache

    @property
    def steps(self) -> int:
        """Of an epoch."""
        return self.identities * IMAGES_EACH // self.batch

    def kd(self, method: str) -> dict[str, Any]:
        """The keys of a method: the teacher each step, the cache where the method reads nothing else."""
        if method in ("kd", "gkd", "thkd", "proxylesskd"):
            return {"kd": method, "kd_classifier": "class-means", "kd_cache": str(self.cache)}
        return {"kd": method, **({"kd_cache": str(self.cache)} if method in ("tcs", "bank") else {})}

    def run(self, output: str, teacher: Teacher | None = None, **keys: Any) -> Run:
        """A run of the compact trainer, ready for its first step; nothing is logged on the way."""
        config = self.config(output, **{"frequent": 10**9, "num_epoch": 100, **keys})
        torch.manual_seed(0)
        if self.place.device.type == "cuda":
            torch.cuda.set_device(0)
        distiller = Distiller(KDConfig.from_config(config), teacher if config.get("kd") else None)
        run = Run(config, drop_ins(lambda: config, distiller=distiller), 0, 0, 1)
        run.backbone.train()
        return run


def training_steps(run: Run) -> Iterator[Tensor]:
    """The steps of a run, one epoch after the other, without end; yields the loss."""
    while True:
        run.loader.sampler.set_epoch(run.epoch)
        for images, labels in run.loader:
            yield run._train_step(images, labels)
        run.epoch += 1
