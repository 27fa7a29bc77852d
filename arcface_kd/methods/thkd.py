r"""TH-KD: the teacher's head on the student (Ben-Baruch et al., 2022, arXiv 2201.06945).

Beside its own classifier the student has the teacher's, frozen, on its own embedding: p_s^TH = softmax of the teacher's
head on f_s. With H the divergence T^2 KL(p_t || .) of softened probabilities, two forms:

    mixed     (1 - a) CE(p_s, y) + a CE(p_s^TH, y) + w [(1 - a) H(p_s, p_t) + a H(p_s^TH, p_t)]     (the paper)
    additive  CE(p_s, y) + 1.5 H(p_s, p_t) + 0.02 H(p_s^TH, p_t),   T = 4                            (the released code)

The released code is for CIFAR. The paper has face results (R100 to MobileFaceNet on MS1MV3), but neither their code nor
their weights: a, w and T of the mixed form are chosen here. Both cross entropies have the trainer's margin. Where the
dimensions differ, the student's embedding goes through a projection on its way to the teacher's head.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from torch import Tensor

from arcface_kd.config.options import Options, Range, Temperature, Weight
from arcface_kd.losses.logit_distillation import Logits, logit_distillation
from arcface_kd.methods.base import Batch
from arcface_kd.methods.class_sampling import step_classes
from arcface_kd.methods.logit_method import LogitMethod

Form = Literal["mixed", "additive"]


@dataclass(frozen=True)
class THKDConfig(Options):
    """TH-KD's knobs.

    Attributes:
        form: ``mixed`` (default, the paper's) or ``additive`` (the released code's).
        a: the teacher head's share in the mixed form, in [0, 1].
        weight: w of the mixed form, at least 0.
        kd_weight: of H(p_s, p_t) in the additive form, at least 0.
        teacher_head_weight: of H(p_s^TH, p_t) in the additive form, at least 0.
        temperature: T, at least 1.
        logits: ``plain`` (default) or ``margin``, which puts the trainer's margin on the targets of all distilled
            logits.
    """

    form: Form = "mixed"
    a: Annotated[float, Range(0, 1)] = 0.5
    weight: Weight = 1.0
    kd_weight: Weight = 1.5
    teacher_head_weight: Weight = 0.02
    temperature: Temperature = 4.0
    logits: Logits = "plain"


class THKD(LogitMethod):
    """The learned classifier and the teacher's frozen one on the same student, both taught by the teacher.

    Terms: ``ce`` and ``kd`` of the student's classifier, ``ce_teacher_head`` (mixed form) and ``kd_teacher_head`` of
        the teacher's.
    """

    Config = THKDConfig
    projects = True
    config: THKDConfig

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Score the student against its own classes and the teacher's, and compare both with the teacher."""
        config = self.config
        classes = step_classes(self.context, batch)
        teacher = self.teacher_logits(batch, classes, config.temperature)
        own = self.distil(batch, classes, teacher, config.logits)
        through = logit_distillation(
            batch.projected,
            batch.labels,
            self.teacher_classes(classes),
            teacher,
            self.context.margin,
            logits=config.logits,
            row_m2=batch.row_m2,
        )
        if config.form == "additive":
            return {
                "ce": own.ce,
                "kd": config.kd_weight * own.primary,
                "kd_teacher_head": config.teacher_head_weight * through.primary,
            }
        return {
            "ce": (1 - config.a) * own.ce,
            "ce_teacher_head": config.a * through.ce,
            "kd": config.weight * (1 - config.a) * own.primary,
            "kd_teacher_head": config.weight * config.a * through.primary,
        }
