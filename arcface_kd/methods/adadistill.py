r"""AdaDistill: adaptive distilled class centers (Boutros, Struc, Damer, ECCV 2024, arXiv 2407.01332).

With normalised embeddings f_s (student) and f_t (teacher) and the class center w_y:

    plain     a = clip(cos(f_s, f_t))
    weighted  a = clip(clip(cos(f_s, f_t)) * clip(cos(w_y before, f_t)))
    w_y <- a w_y + (1 - a) f_t
    loss = margin softmax of f_s against the updated centers

Early in training the student is far from the teacher, a is near 0 and a center is the teacher's embedding of the
sample at hand, as in feature distillation; later a grows and the centers become averages that a class shares. One
loss, no weight to balance, and no teacher classifier: student and teacher may know different identities. The margin is
the trainer's own: (1, m, 0) gives AdaArc (published m = 0.45), (1, 0, m) AdaCos (published m = 0.35).

Under AdaFace's margin a public fork (rayyichen310/adadistill_with_adaface_loss, 2025, not reviewed) adds a geometry
term to a row's quality q before it is clipped, with c = clip(cos(w_y before, f_t)), from nothing at the start to its
whole weight after the first epoch:

    q <- q + geometry c max(0, c - cos(f_s, f_t))

So an image whose class the teacher knows well, and whose student is not there yet, gets more margin.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from arcface_kd.config.kd import TeacherView
from arcface_kd.config.options import Options, Weight
from arcface_kd.distributed.class_shard import ShardPositions
from arcface_kd.errors import ConfigError
from arcface_kd.losses.fused import fused
from arcface_kd.losses.margin import AdaFaceMargin
from arcface_kd.losses.margin_softmax import sharded_margin_softmax
from arcface_kd.methods.base import Batch, Method, Requirement, RunContext
from arcface_kd.methods.class_centers import DistilledCenters, Repeated
from arcface_kd.methods.class_sampling import step_classes

Alpha = Literal["weighted", "plain"]

# The published code's lower bound on both factors and their product.
_SMALLEST = 1e-6


@dataclass(frozen=True)
class AdaDistillConfig(Options):
    """AdaDistill's knobs.

    Attributes:
        alpha: ``weighted`` (default, the paper's best) or ``plain``.
        repeated: how several samples of one class in a batch are combined: ``mean`` (default, whatever their order) or
            ``last`` (the published code's behaviour).
        geometry: weight of the geometry term in AdaFace's margin, at least 0; 0 (default) leaves it out; the fork's is
            3.
    """

    alpha: Alpha = "weighted"
    repeated: Repeated = "mean"
    geometry: Weight = 0.0


@fused()
def adaptive_alpha(student_teacher: Tensor, center_teacher: Tensor | None) -> Tensor:
    """How much of the old center stays, (B,) in [0, 1], from two (B,) cosines before the update.

    They are cos(f_s, f_t), and cos(w_y, f_t) for the weighted alpha; None gives the plain one.
    """
    if center_teacher is None:
        return student_teacher.clamp(0, 1)
    product = student_teacher.clamp(_SMALLEST, 1) * center_teacher.clamp(_SMALLEST, 1)
    return product.clamp(_SMALLEST, 1)


class AdaDistill(Method):
    """Distilled class centers with an adaptive moving average, and margin softmax against them.

    Terms: ``ce``, the margin softmax.
    """

    Config = AdaDistillConfig
    requires = frozenset({Requirement.TEACHER_EMBEDDINGS})
    classifies = True
    computes_part = True
    # Its class centers are averages of what the teacher says.
    teacher_views: ClassVar[frozenset[TeacherView]] = frozenset({"clean"})
    sharded = ("centers.weight",)
    config: AdaDistillConfig

    def __init__(self, config: AdaDistillConfig, context: RunContext) -> None:
        super().__init__(config, context)
        # Without a teacher of its own the run was stopped before it came here, see `requires`.
        assert context.teacher_embedding_size is not None
        if config.geometry and not isinstance(context.margin, AdaFaceMargin):
            raise ConfigError("adadistill.geometry is a part of AdaFace's margin: add head.margin=adaface")
        self.centers = DistilledCenters(
            context.shard, context.teacher_embedding_size, context.seed, context.product_dtype
        )
        self._seen: _Seen | None = None

    @property
    def same_each_step(self) -> bool:
        """Without a draw of classes and without the geometry term, whose weight grows by the step."""
        return self.context.sample_rate >= 1 and not self.config.geometry

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Update the centers from the gathered batch, then score the student against them."""
        classes = step_classes(self.context, batch)
        margin = self.context.margin
        row_m2 = self._move_centers(batch, ShardPositions(classes.targets.target, classes.targets.owned))
        weights = self.context.class_weights(self.centers, classes)
        return {"ce": sharded_margin_softmax(batch.projected, batch.labels, weights, margin, row_m2=row_m2)}

    @torch.no_grad()
    def _move_centers(self, batch: Batch, positions: ShardPositions) -> Tensor | None:
        """One step of the moving average, with an alpha for each row; gives each row's angular margin if it has one."""
        assert batch.teacher is not None
        centers, labels, dtype = self.centers, batch.labels, self.centers.weight.dtype
        teacher, agreement = _agreement(batch.projected.to(dtype), batch.teacher.to(dtype))
        weighted, geometry = self.config.alpha == "weighted", self.config.geometry
        before = None
        if weighted or geometry:
            before = self.context.ranks.sum_(centers.cosine(labels, teacher, positions=positions))
        alpha = adaptive_alpha(agreement, before if weighted else None)
        old = centers.unit_rows(labels, positions=positions) if batch.observed else None
        centers.update(labels, teacher, alpha, self.config.repeated, positions=positions)
        self._seen = None
        if old is not None:
            turned = centers.cosine(labels, old, positions=positions)
            self._seen = _Seen(labels >= 0, alpha, agreement, turned)
        margin = self.context.margin
        if not geometry or before is None or batch.quality is None or not isinstance(margin, AdaFaceMargin):
            return batch.row_m2
        weight = geometry * min(1.0, batch.step / self.context.steps_per_epoch)
        return margin.rows(batch.quality + weight * _lag(agreement, before))

    def observations(self) -> dict[str, Tensor]:
        """Means over the rows of the last gathered batch that have a label, where the batch said that it is observed.

        Alpha (its quantiles as well), the cosine of student and teacher, and ``center_drift``: 1 - cos of a row's class
        center before and after the step.
        """
        if self._seen is None:
            return {}
        valid = self._seen.valid
        turned = self.context.ranks.sum_(self._seen.turned.clone())
        alpha, agreement, turned = (
            torch.where(valid, values, torch.nan) for values in (self._seen.alpha, self._seen.agreement, turned)
        )
        low, middle, high = torch.nanquantile(alpha, alpha.new_tensor([0.1, 0.5, 0.9]))
        return {
            "alpha_mean": alpha.nanmean(),
            "alpha_q10": low,
            "alpha_q50": middle,
            "alpha_q90": high,
            "student_teacher_cosine": agreement.nanmean(),
            "center_drift": 1 - turned.nanmean(),
        }


class _Seen(NamedTuple):
    """What a step's observations follow from, (B,) each."""

    valid: Tensor
    alpha: Tensor
    agreement: Tensor
    turned: Tensor  # of this rank's classes: cosine of a center before and after the step


@fused()
def _lag(student_teacher: Tensor, center_teacher: Tensor) -> Tensor:
    """How far the student lags behind what the teacher knows of the class, (B,)."""
    known = center_teacher.clamp(_SMALLEST, 1)
    return known * (known - student_teacher).clamp_min(0)


@fused()
def _agreement(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """The teacher's unit rows, and the cosines of the student's with them."""
    teacher = normalize(teacher)
    return teacher, (normalize(student) * teacher).sum(1)
