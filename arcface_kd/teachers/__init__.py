"""Teachers of every kind: checkpoints, ONNX files and packs, MXNet checkpoints, modules, names of timm and the hub."""

from arcface_kd.teachers.base import Teacher, TeacherSource, load_teacher
from arcface_kd.teachers.options import Preprocessing, TeacherOptions

__all__ = ["Preprocessing", "Teacher", "TeacherOptions", "TeacherSource", "load_teacher"]
