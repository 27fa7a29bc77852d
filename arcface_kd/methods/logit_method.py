"""Base of methods over logits: the student's learned classifier beside the teacher's frozen one."""

from typing import Any

import torch

from arcface_kd.losses.class_weights import ClassWeights, StepClasses
from arcface_kd.losses.divergences import Distillation
from arcface_kd.losses.logit_distillation import Grouping, Logits, TeacherLogits, logit_distillation, teacher_logits
from arcface_kd.methods.base import Batch, Method, Requirement, RunContext
from arcface_kd.methods.class_centers import FrozenCenters
from arcface_kd.methods.learned_classifier import LearnedClassifier


class LogitMethod(Method):
    """Base of the methods that compare the logits of two classifiers, each on its own embedding.

    The student's classifier is the trainer's own learned one, with its margin and class sampling. The teacher's stands,
    frozen, on the teacher's embedding; both share the logit scale. The embeddings may differ in dimension. At a sample
    rate below 1 all terms are over the classes that the step has drawn, and a KL over a sample is biased: both sides'
    probabilities are renormalised over it.

    The teacher's classifier is not saved with the run: it is read again from where it came.
    """

    requires = frozenset({Requirement.TEACHER_EMBEDDINGS, Requirement.TEACHER_CLASSIFIER})
    classifies = True
    computes_part = True
    projects = False
    sharded = ("classifier.weight",)

    def __init__(self, config: Any, context: RunContext) -> None:
        super().__init__(config, context)
        # Without a classifier the run was stopped before it came here, see `requires`.
        assert context.teacher_classifier is not None
        self.classifier = LearnedClassifier(context)
        self.teacher_centers = FrozenCenters(context.teacher_classifier, context.shard, context.product_dtype)

    def teacher_classes(self, classes: StepClasses) -> ClassWeights:
        """The teacher's classifier in a step."""
        return self.context.class_weights(self.teacher_centers, classes)

    def teacher_logits(self, batch: Batch, classes: StepClasses, temperature: float) -> TeacherLogits:
        """The teacher's own logits of the batch."""
        assert batch.teacher is not None
        in_double = batch.embeddings.dtype == torch.float64
        return teacher_logits(
            batch.teacher.double() if in_double else batch.teacher,
            batch.labels,
            self.teacher_classes(classes),
            self.context.margin.scale,
            temperature,
        )

    def distil(
        self,
        batch: Batch,
        classes: StepClasses,
        teacher: TeacherLogits,
        logits: Logits,
        grouping: Grouping | None = None,
    ) -> Distillation:
        """Score the student's embedding against its own classifier and compare the logits with the teacher's."""
        return logit_distillation(
            batch.embeddings,
            batch.labels,
            self.context.class_weights(self.classifier.weight, classes),
            teacher,
            self.context.margin,
            grouping=grouping,
            logits=logits,
            row_m2=batch.row_m2,
        )
