r"""KD: the teacher's softened class probabilities (Hinton, Vinyals, Dean, 2015, arXiv 1503.02531).

    loss = margin softmax of the student + w T^2 mean_i KL(p_t || p_s),   p = softmax(s cos / T)

with the teacher's probabilities from its own classifier on its own embedding. The logits are distilled without a
margin unless ``logits=margin`` asks for it on both sides.
"""

from dataclasses import dataclass

from torch import Tensor

from arcface_kd.config.options import Options, Temperature, Weight
from arcface_kd.losses.logit_distillation import Logits
from arcface_kd.methods.base import Batch
from arcface_kd.methods.class_sampling import step_classes
from arcface_kd.methods.logit_method import LogitMethod


@dataclass(frozen=True)
class LogitKDConfig(Options):
    """KD's knobs.

    Attributes:
        temperature: T, at least 1. Published work on faces takes 4 at a logit scale of 64.
        weight: w, at least 0.
        logits: ``plain`` (default) or ``margin``, which puts the trainer's margin on the targets of both sides.
    """

    temperature: Temperature = 4.0
    weight: Weight = 1.0
    logits: Logits = "plain"


class LogitKD(LogitMethod):
    """The learned classifier's margin softmax, and the KL of the teacher's and the student's softened probabilities.

    Terms: ``ce``, the margin softmax; ``kd``.
    """

    Config = LogitKDConfig
    config: LogitKDConfig

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Score the student against its classes and compare with the teacher."""
        classes = step_classes(self.context, batch)
        teacher = self.teacher_logits(batch, classes, self.config.temperature)
        terms = self.distil(batch, classes, teacher, self.config.logits)
        return {"ce": terms.ce, "kd": self.config.weight * terms.primary}
