r"""GKD: Grouped KD (Zhao et al., AAAI 2023, arXiv 2304.04462).

The classes of a row fall into a primary group P, those that the student finds most likely, and a secondary group S, the
long rest, in which the teacher's probabilities are mostly noise. With p = softmax(z / T),

    loss = margin softmax of the student
           + r (l1 T^2 KL(p_t in P || p_s in P) + l2 T^2 KL([p_t(P), p_t(S)] || [p_s(P), p_s(S)])
                + l3 T^2 KL(p_t in S || p_s in S))

as means over the batch. l3 is 0 in GKD and there for the ablation. The ground truth is always in P and counts as one of
its classes. The ramp r is ``min(epoch / ramp_epochs, 1)`` in whole epochs done, so that the first epoch trains without
a teacher, as published.

Published settings: l1 = 8 with a fixed K = 10,000, or l1 = 4 with a cumulative probability of 0.93; l2 = 1, T = 4,
logits with CosFace's margin (m = 0.4, s = 64, the trainer's own margin here) on both sides, a ramp of 10 epochs of 20.
The published code takes one K for a whole batch (``group=batch``, the default), on each GPU for itself; here the batch
is that of all ranks. The paper's abstract can be read as a cut for each sample (``group=sample``).
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from torch import Tensor

from arcface_kd.config.options import Count, Options, Range, Share, Temperature, Weight
from arcface_kd.losses.class_groups import BatchMass, FixedSize, GroupRule, SampleMass
from arcface_kd.losses.divergences import Distillation
from arcface_kd.losses.logit_distillation import Grouping, Logits, RankedBy
from arcface_kd.methods.base import Batch, RunContext
from arcface_kd.methods.class_sampling import step_classes
from arcface_kd.methods.logit_method import LogitMethod

Group = Literal["batch", "sample", "fixed"]

_PUBLISHED_PRIMARY_WEIGHTS = {"fixed": 8.0, "batch": 4.0, "sample": 4.0}


@dataclass(frozen=True)
class GKDConfig(Options):
    """GKD's knobs.

    Attributes:
        group: how large P is, the target included. ``batch`` (default): one number of classes a batch, the first of 1,
            1 + ``step``, ... for which the largest entries of the batch's mean softmax (temperature 1) hold ``mass``.
            ``sample``: for each row the target and the fewest others that make up ``mass`` of its probability at the KD
            temperature. ``fixed``: ``size`` classes.
        mass: the cumulative probability, in (0, 1].
        step: of the number of classes, at least 1.
        size: K, at least 1; of the classes that the step has drawn, where the sample rate is below 1.
        ranked_by: whose logits rank the classes, the ``student``'s (default) or the ``teacher``'s.
        logits: ``margin`` (default, as published) distils both sides' logits with the trainer's margin on the targets,
            ``plain`` without.
        temperature: T, at least 1.
        primary_weight: l1, at least 0; None takes the published one, 8 for a fixed group and 4 elsewhere.
        binary_weight: l2, at least 0.
        secondary_weight: l3, at least 0.
        ramp_epochs: epochs until the terms have their full weight, 0 for at once.
    """

    group: Group = "batch"
    mass: Share = 0.93
    step: Count = 100
    size: Count = 10_000
    ranked_by: RankedBy = "student"
    logits: Logits = "margin"
    temperature: Temperature = 4.0
    primary_weight: Weight | None = None
    binary_weight: Weight = 1.0
    secondary_weight: Weight = 0.0
    ramp_epochs: Annotated[float, Range(0)] = 10.0

    def rule(self) -> GroupRule:
        """The rule for the group's size."""
        if self.group == "fixed":
            return FixedSize(self.size)
        return SampleMass(self.mass) if self.group == "sample" else BatchMass(self.mass, self.step)

    def weights(self, epochs_done: int) -> tuple[float, float, float]:
        """The weights of primary, binary and secondary term after so many whole epochs."""
        ramp = min(epochs_done / self.ramp_epochs, 1.0) if self.ramp_epochs > 0 else 1.0
        primary = _PUBLISHED_PRIMARY_WEIGHTS[self.group] if self.primary_weight is None else self.primary_weight
        return ramp * primary, ramp * self.binary_weight, ramp * self.secondary_weight


class GKD(LogitMethod):
    """The learned classifier's margin softmax, and KLs of teacher and student by groups of classes.

    Terms: ``ce``, the margin softmax; ``primary_kd``; ``binary_kd``; ``secondary_kd`` where it has a weight.
    """

    Config = GKDConfig
    config: GKDConfig

    def __init__(self, config: GKDConfig, context: RunContext) -> None:
        super().__init__(config, context)
        self._seen: Distillation | None = None

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Score the student against its classes and compare with the teacher, group by group."""
        config = self.config
        classes = step_classes(self.context, batch)
        grouping = Grouping(config.rule(), config.ranked_by, secondary=config.secondary_weight > 0)
        teacher = self.teacher_logits(batch, classes, config.temperature)
        terms = self._seen = self.distil(batch, classes, teacher, config.logits, grouping)
        primary, binary, secondary = config.weights(batch.step // self.context.steps_per_epoch)
        named = {"ce": terms.ce, "primary_kd": primary * terms.primary, "binary_kd": binary * terms.binary}
        if config.secondary_weight > 0:
            named["secondary_kd"] = secondary * terms.secondary
        return named

    def observations(self) -> dict[str, Tensor]:
        """Mean size of the last batch's primary groups, and the probability that student and teacher give them."""
        if self._seen is None:
            return {}
        return {
            "group_size": self._seen.group_size,
            "student_mass": self._seen.student_mass,
            "teacher_mass": self._seen.teacher_mass,
        }
