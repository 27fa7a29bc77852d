"""The feature maps of student and teacher in one run: where they are taken, and those of the last batch.

Methods that compare maps, or run the student's map through the teacher's tail, say which they want
(:class:`~arcface_kd.methods.base.MapsWanted`); the maps are those of this rank's own images.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.hooks import RemovableHandle

from arcface_kd.backbones.feature_taps import find_map, map_shape
from arcface_kd.errors import ConfigError, TeacherError
from arcface_kd.methods.base import MapsWanted, Requirement
from arcface_kd.teachers.base import Teacher
from arcface_kd.teachers.trunk_and_tail import cut_teacher

Shape = tuple[int, int, int]


class FeatureMaps:
    """The maps of one run.

    ``wanted`` says which maps, ``teacher`` is the teacher, cut where its map is, and ``student_shape`` (C, H, W) that
    of the student's map, None until a student is watched. ``whose`` are the methods' names, for messages. A
    TeacherError says that the teacher cannot be cut.
    """

    def __init__(self, whose: str, wanted: MapsWanted, teacher: Teacher) -> None:
        self.wanted = wanted
        self._whose = whose
        try:
            self.teacher = cut_teacher(teacher, wanted.teacher_map, wanted.tap)
        except TeacherError as error:
            raise TeacherError(f"{whose} needs {Requirement.TEACHER_TAIL.value}: {error}") from error
        self.student_shape: Shape | None = None
        self._student_map: Tensor | None = None
        self._teacher_map: Tensor | None = None

    def watch(self, student: nn.Module, size: int) -> RemovableHandle:
        """Put the hook on a student: in training mode its map is kept until the head asks for it."""
        try:
            place = find_map(student, self.wanted.student_map, self.wanted.tap)
            self.student_shape = map_shape(student, place, size)
        except ConfigError as error:
            raise ConfigError(f"{self._whose} needs {Requirement.STUDENT_FEATURE_MAP.value}: {error}") from error

        def keep(feature_map: Tensor) -> None:
            if student.training and torch.is_grad_enabled():
                self._student_map = feature_map

        return place.watch(student, keep)

    def embed(self, images: Tensor) -> Tensor:
        """The teacher's unit embeddings of a batch; its maps are kept until the head asks for them."""
        self._teacher_map = self.teacher.feature_map(images)
        with torch.no_grad():
            return normalize(self.teacher.tail(self._teacher_map))

    def take(self, rows: int) -> tuple[Tensor, Tensor | None]:
        """The maps of the batch that student and teacher have just seen; handed out once."""
        student, self._student_map = self._student_map, None
        teacher, self._teacher_map = self._teacher_map, None
        if student is None or len(student) != rows:
            met = "none" if student is None else f"a map of {len(student)} images"
            raise RuntimeError(
                f"the head was given {rows} embeddings, and of the student's feature maps {met}: call the watched "
                "student in training mode once before each call of the head"
            )
        if tuple(student.shape[1:]) != self.student_shape:
            raise RuntimeError(
                f"the student's feature map is {tuple(student.shape[1:])}, and was {self.student_shape} when it was "
                "watched: its images have changed their size"
            )
        if self.wanted.teacher_maps and teacher is None:
            raise RuntimeError("the teacher has made no feature map of this batch: show the student one batch a step")
        return student, teacher
