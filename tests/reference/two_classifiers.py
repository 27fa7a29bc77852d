"""A batch of student and teacher with a classifier each, for the tests of methods over logits."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from arcface_kd.distributed.class_shard import ClassShard
from arcface_kd.distributed.ranks import RankGroup
from arcface_kd.losses.margin import Margin
from arcface_kd.methods.base import Batch, RunContext
from arcface_kd.methods.class_centers import initial_centers
from tests.reference.problems import random_problem

SEED = 5


class TwoSides(NamedTuple):
    """Whole batch and whole classifiers, fp64."""

    student: Tensor
    labels: Tensor
    weight: Tensor
    teacher: Tensor
    classifier: Tensor

    def context(self, ranks: RankGroup, margin: Margin, **keys: Any) -> RunContext:
        """What a run would tell a method, with this rank's rows of the teacher's classifier."""
        shard = ranks.shard(len(self.classifier))
        return RunContext(
            num_classes=len(self.classifier),
            embedding_size=self.student.shape[1],
            margin=margin,
            ranks=ranks,
            teacher_embedding_size=self.teacher.shape[1],
            teacher_classifier=self.classifier[shard.start : shard.start + shard.size],
            seed=SEED,
            **keys,
        )

    def batch(self, step: int = 0) -> Batch:
        """The batch of a single process."""
        student = self.student.clone().requires_grad_()
        return Batch(student, student, self.labels, self.teacher, [len(self.labels)], step)


def two_sides(
    seed: int, batch: int = 12, classes: int = 23, dimension: int = 6, teacher_dimension: int = 8
) -> TwoSides:
    """A teacher that knows the classes, more or less, and a student that has begun to learn its own classifier."""
    student = random_problem(seed, batch, classes, dimension)
    teacher = random_problem(seed + 1000, batch, classes, teacher_dimension)
    weight = initial_centers(ClassShard(classes), dimension, SEED).double()
    own = student.labels.clamp_min(0)
    return TwoSides(
        student.embeddings + torch.nn.functional.normalize(weight[own]),
        student.labels,
        weight,
        teacher.embeddings + 2 * teacher.centers[own],
        teacher.centers,
    )
