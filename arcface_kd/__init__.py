"""Knowledge distillation for face recognition, as a plugin of InsightFace's arcface_torch.

The public names are loaded when they are first used, so that ``import arcface_kd`` stays as quick as ``import torch``.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from arcface_kd.backbones import get_backbone
    from arcface_kd.centers import DistilledCenters
    from arcface_kd.config import KDConfig, load_config
    from arcface_kd.data.dataset import RecordDataset
    from arcface_kd.data.loader import FaceLoader, get_dataloader
    from arcface_kd.data.recordio import RecordReader, RecordWriter
    from arcface_kd.data.verification_bin import read_bin, write_bin
    from arcface_kd.distiller import DistillationHead, Distiller
    from arcface_kd.errors import ArcfaceKDError, ConfigError, DataError, TeacherError
    from arcface_kd.evaluation.verification import evaluate, verify
    from arcface_kd.hook import attach, drop_ins
    from arcface_kd.losses.margin import Margin
    from arcface_kd.losses.margin_softmax import margin_softmax
    from arcface_kd.methods.adadistill import AdaDistill, AdaDistillConfig
    from arcface_kd.methods.base import Batch, Method, Requirement, RunContext
    from arcface_kd.sharding import ClassShard, RankGroup
    from arcface_kd.teachers.base import Teacher, load_teacher
    from arcface_kd.trainer import train

_MODULES = {
    "AdaDistill": "methods.adadistill",
    "AdaDistillConfig": "methods.adadistill",
    "ArcfaceKDError": "errors",
    "Batch": "methods.base",
    "ClassShard": "sharding",
    "ConfigError": "errors",
    "DataError": "errors",
    "DistillationHead": "distiller",
    "DistilledCenters": "centers",
    "Distiller": "distiller",
    "FaceLoader": "data.loader",
    "KDConfig": "config",
    "Margin": "losses.margin",
    "Method": "methods.base",
    "RankGroup": "sharding",
    "RecordDataset": "data.dataset",
    "RecordReader": "data.recordio",
    "RecordWriter": "data.recordio",
    "Requirement": "methods.base",
    "RunContext": "methods.base",
    "Teacher": "teachers.base",
    "TeacherError": "errors",
    "attach": "hook",
    "drop_ins": "hook",
    "evaluate": "evaluation.verification",
    "get_backbone": "backbones",
    "get_dataloader": "data.loader",
    "load_config": "config",
    "load_teacher": "teachers.base",
    "margin_softmax": "losses.margin_softmax",
    "read_bin": "data.verification_bin",
    "train": "trainer",
    "verify": "evaluation.verification",
    "write_bin": "data.verification_bin",
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
    if name not in _MODULES:
        raise AttributeError(f"module 'arcface_kd' has no attribute {name!r}")
    return getattr(importlib.import_module(f"arcface_kd.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
