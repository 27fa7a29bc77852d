"""Teachers of every kind: PyTorch checkpoints, ONNX files and packs, MXNet checkpoints, modules, timm models."""

from arcface_kd.teachers.base import Preprocessing, Teacher, TeacherOptions, TeacherSource, load_teacher

__all__ = ["Preprocessing", "Teacher", "TeacherOptions", "TeacherSource", "load_teacher"]
