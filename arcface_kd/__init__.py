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
    from arcface_kd.backbones import get_backbone as get_backbone
    from arcface_kd.config.arcface_torch import load_config as load_config
    from arcface_kd.config.flags import add_arguments as add_arguments
    from arcface_kd.config.kd import KDConfig as KDConfig
    from arcface_kd.data.dataset import RecordDataset as RecordDataset
    from arcface_kd.data.formats.recordio import RecordReader as RecordReader
    from arcface_kd.data.formats.recordio import RecordWriter as RecordWriter
    from arcface_kd.data.formats.verification_bin import read_bin as read_bin
    from arcface_kd.data.formats.verification_bin import write_bin as write_bin
    from arcface_kd.data.loader import FaceLoader as FaceLoader
    from arcface_kd.data.loader import get_dataloader as get_dataloader
    from arcface_kd.distillation.distiller import Distiller as Distiller
    from arcface_kd.distillation.drop_ins import drop_ins as drop_ins
    from arcface_kd.distillation.head import DistillationHead as DistillationHead
    from arcface_kd.distributed.class_shard import ClassShard as ClassShard
    from arcface_kd.distributed.ranks import RankGroup as RankGroup
    from arcface_kd.errors import ArcfaceKDError as ArcfaceKDError
    from arcface_kd.errors import ConfigError as ConfigError
    from arcface_kd.errors import DataError as DataError
    from arcface_kd.errors import TeacherError as TeacherError
    from arcface_kd.evaluation.verification import evaluate as evaluate
    from arcface_kd.evaluation.verification import verify as verify
    from arcface_kd.host.attach import attach as attach
    from arcface_kd.losses.margin import Margin as Margin
    from arcface_kd.losses.margin_softmax import margin_softmax as margin_softmax
    from arcface_kd.methods.adadistill import AdaDistill as AdaDistill
    from arcface_kd.methods.adadistill import AdaDistillConfig as AdaDistillConfig
    from arcface_kd.methods.base import Batch as Batch
    from arcface_kd.methods.base import Method as Method
    from arcface_kd.methods.base import Requirement as Requirement
    from arcface_kd.methods.base import RunContext as RunContext
    from arcface_kd.methods.class_centers import DistilledCenters as DistilledCenters
    from arcface_kd.teachers.base import Teacher as Teacher
    from arcface_kd.teachers.base import load_teacher as load_teacher
    from arcface_kd.training.trainer import train as train

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

__all__ = list(_MODULES)


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
