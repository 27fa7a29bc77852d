"""Knowledge distillation for face recognition, as a plugin of InsightFace's arcface_torch.

The public names are loaded when they are first used, so that ``import arcface_kd`` stays as quick as ``import torch``.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from arcface_kd.backbones import get_backbone
    from arcface_kd.config.arcface_torch import load_config
    from arcface_kd.config.flags import add_arguments
    from arcface_kd.config.kd import KDConfig
    from arcface_kd.data.dataset import RecordDataset
    from arcface_kd.data.formats.recordio import RecordReader, RecordWriter
    from arcface_kd.data.formats.verification_bin import read_bin, write_bin
    from arcface_kd.data.loader import FaceLoader, get_dataloader
    from arcface_kd.distillation.distiller import Distiller
    from arcface_kd.distillation.drop_ins import drop_ins
    from arcface_kd.distillation.head import DistillationHead
    from arcface_kd.distributed.class_shard import ClassShard
    from arcface_kd.distributed.ranks import RankGroup
    from arcface_kd.errors import ArcfaceKDError, ConfigError, DataError, TeacherError
    from arcface_kd.evaluation.verification import evaluate, verify
    from arcface_kd.host.attach import attach
    from arcface_kd.losses.margin import Margin
    from arcface_kd.losses.margin_softmax import margin_softmax
    from arcface_kd.methods.adadistill import AdaDistill, AdaDistillConfig
    from arcface_kd.methods.base import Batch, Method, Requirement, RunContext
    from arcface_kd.methods.class_centers import DistilledCenters
    from arcface_kd.teachers.base import Teacher, load_teacher
    from arcface_kd.training.trainer import train

_MODULES = {
    "AdaDistill": "methods.adadistill",
    "AdaDistillConfig": "methods.adadistill",
    "ArcfaceKDError": "errors",
    "Batch": "methods.base",
    "ClassShard": "distributed.class_shard",
    "ConfigError": "errors",
    "DataError": "errors",
    "DistillationHead": "distillation.head",
    "DistilledCenters": "methods.class_centers",
    "Distiller": "distillation.distiller",
    "FaceLoader": "data.loader",
    "KDConfig": "config.kd",
    "Margin": "losses.margin",
    "Method": "methods.base",
    "RankGroup": "distributed.ranks",
    "RecordDataset": "data.dataset",
    "RecordReader": "data.formats.recordio",
    "RecordWriter": "data.formats.recordio",
    "Requirement": "methods.base",
    "RunContext": "methods.base",
    "Teacher": "teachers.base",
    "TeacherError": "errors",
    "add_arguments": "config.flags",
    "attach": "host.attach",
    "drop_ins": "distillation.drop_ins",
    "evaluate": "evaluation.verification",
    "get_backbone": "backbones",
    "get_dataloader": "data.loader",
    "load_config": "config.arcface_torch",
    "load_teacher": "teachers.base",
    "margin_softmax": "losses.margin_softmax",
    "read_bin": "data.formats.verification_bin",
    "train": "training.trainer",
    "verify": "evaluation.verification",
    "write_bin": "data.formats.verification_bin",
}

__all__ = [
    "AdaDistill",
    "AdaDistillConfig",
    "ArcfaceKDError",
    "Batch",
    "ClassShard",
    "ConfigError",
    "DataError",
    "DistillationHead",
    "DistilledCenters",
    "Distiller",
    "FaceLoader",
    "KDConfig",
    "Margin",
    "Method",
    "RankGroup",
    "RecordDataset",
    "RecordReader",
    "RecordWriter",
    "Requirement",
    "RunContext",
    "Teacher",
    "TeacherError",
    "add_arguments",
    "attach",
    "drop_ins",
    "evaluate",
    "get_backbone",
    "get_dataloader",
    "load_config",
    "load_teacher",
    "margin_softmax",
    "read_bin",
    "train",
    "verify",
    "write_bin",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib import metadata

        return metadata.version("arcface_kd")
    if name not in _MODULES:
        raise AttributeError(f"module 'arcface_kd' has no attribute {name!r}")
    return getattr(importlib.import_module(f"arcface_kd.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])


class _MovedModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Modules that trainers import which an earlier version has patched."""

    now: ClassVar[dict[str, tuple[str, ...]]] = {
        "arcface_kd.hook": ("arcface_kd.config.flags", "arcface_kd.host.attach"),
        "arcface_kd.data.recordio": ("arcface_kd.data.formats.recordio",),
        "arcface_kd.data.verification_bin": ("arcface_kd.data.formats.verification_bin",),
    }

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(fullname, self) if fullname in self.now else None

    def exec_module(self, module: types.ModuleType) -> None:
        for name in self.now[module.__name__]:
            names = vars(importlib.import_module(name))
            module.__dict__.update({key: value for key, value in names.items() if not key.startswith("__")})


sys.meta_path.append(_MovedModules())
