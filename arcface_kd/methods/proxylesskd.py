r"""ProxylessKD: the teacher's classifier, inherited and frozen (Shi et al., 2020, arXiv 2011.00265).

    loss = margin softmax of f_s against the rows of the teacher's classifier

There is no other term and no embedding of the teacher's: the student is trained to stand where the teacher's classes
are, by the loss of the trainer's own head. So the teacher need not be run at all, and no center gets a gradient.

ArcDistill and CosDistill are the same idea as AdaDistill's authors ran it to compare with (Boutros, Struc, Damer, ECCV
2024, arXiv 2407.01332, section 4): ArcFace's margin of 0.45 and CosFace's of 0.35, their published settings, whatever
the trainer's margin is. ``proxylesskd`` takes the trainer's own margin.
"""

import math
from dataclasses import dataclass, replace
from typing import Annotated

from torch import Tensor

from arcface_kd.config.options import Options, Range
from arcface_kd.distributed.class_shard import ShardPositions
from arcface_kd.errors import ConfigError
from arcface_kd.losses.margin import AdaFaceMargin, Margin
from arcface_kd.losses.margin_softmax import sharded_margin_softmax
from arcface_kd.methods.base import Batch, Method, Requirement, RunContext
from arcface_kd.methods.class_centers import FrozenCenters
from arcface_kd.methods.class_sampling import step_classes


@dataclass(frozen=True)
class ProxylessKDConfig(Options):
    """No knobs: margin, sample rate and filter are the trainer's own keys."""

    def applied_to(self, margin: Margin) -> Margin:
        """The margin of the method, given the trainer's."""
        return margin


@dataclass(frozen=True)
class ArcDistillConfig(ProxylessKDConfig):
    """ArcDistill's knob.

    Attributes:
        margin: added to the angle, in radians, in [0, pi / 2].
    """

    margin: Annotated[float, Range(0, math.pi / 2)] = 0.45

    def applied_to(self, margin: Margin) -> Margin:
        """ArcFace's margin with the trainer's logit scale and filter."""
        return replace(margin, m1=1.0, m2=self.margin, m3=0.0)


@dataclass(frozen=True)
class CosDistillConfig(ProxylessKDConfig):
    """CosDistill's knob.

    Attributes:
        margin: taken from the cosine, in [0, 2).
    """

    margin: Annotated[float, Range(0, 2, "[)")] = 0.35

    def applied_to(self, margin: Margin) -> Margin:
        """CosFace's margin with the trainer's logit scale and filter."""
        return replace(margin, m1=1.0, m2=0.0, m3=self.margin)


class ProxylessKD(Method):
    """The teacher's classifier, frozen, under the trainer's own margin softmax.

    Terms: ``ce``, the margin softmax. The classifier is not saved with the run: it is read again from where it came.
    """

    Config = ProxylessKDConfig
    requires = frozenset({Requirement.TEACHER_CLASSIFIER})
    classifies = True
    computes_part = True

    def __init__(self, config: ProxylessKDConfig, context: RunContext) -> None:
        super().__init__(config, context)
        # Without a classifier the run was stopped before it came here, see `requires`.
        assert context.teacher_classifier is not None
        self.margin = config.applied_to(context.margin)
        if type(config) is not ProxylessKDConfig and isinstance(context.margin, AdaFaceMargin):
            raise ConfigError(f"{type(self).__name__} has a margin of its own: leave head.margin=adaface out")
        self.centers = FrozenCenters(context.teacher_classifier, context.shard, context.product_dtype)

    @property
    def same_each_step(self) -> bool:
        """Without a draw of classes."""
        return self.context.sample_rate >= 1

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Score the student against the teacher's classes."""
        classes = step_classes(self.context, batch)
        margins = self.row_margins(batch, ShardPositions(classes.targets.target, classes.targets.owned))
        weights = self.context.class_weights(self.centers, classes)
        return {"ce": sharded_margin_softmax(batch.projected, batch.labels, weights, self.margin, row_m2=margins)}

    def row_margins(self, batch: Batch, positions: ShardPositions) -> Tensor | None:
        """An additive angular margin (B,) for each row, for methods that have one; None for all the same."""
        return batch.row_m2


class ArcDistill(ProxylessKD):
    """The teacher's classifier, frozen, under ArcFace's margin of 0.45.

    Terms: ``ce``, the margin softmax. Logit scale and interclass filter are the trainer's.
    """

    Config = ArcDistillConfig
    same_each_step = ProxylessKD.same_each_step


class CosDistill(ProxylessKD):
    """The teacher's classifier, frozen, under CosFace's margin of 0.35.

    Terms: ``ce``, the margin softmax. Logit scale and interclass filter are the trainer's.
    """

    Config = CosDistillConfig
    same_each_step = ProxylessKD.same_each_step
