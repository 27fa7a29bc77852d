r"""AdaDistill: adaptive distilled class centers (Boutros, Struc, Damer, ECCV 2024, arXiv 2407.01332).

With normalised embeddings f_s (student) and f_t (teacher) and the class center w_y:

    plain     a = clip(cos(f_s, f_t))
    weighted  a = clip(clip(cos(f_s, f_t)) * clip(cos(w_y before, f_t)))
    w_y <- a w_y + (1 - a) f_t
    loss = margin softmax of f_s against the updated centers

Early in training the student is far from the teacher, a is near 0 and a center is the teacher's embedding of the
sample at hand, as in feature distillation; later a grows and the centers become averages that a class shares. One
loss, no weight to balance, and no teacher classifier: student and teacher may know different identities. The margin is
the trainer's
own: (1, m, 0) gives AdaArc (published m = 0.45), (1, 0, m) AdaCos (published m = 0.35).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from arcface_kd.config.options import Options
from arcface_kd.losses.margin_softmax import sharded_margin_softmax
from arcface_kd.methods.base import Batch, Method, Requirement, RunContext
from arcface_kd.methods.class_centers import DistilledCenters, Repeated
from arcface_kd.methods.class_sampling import sample_classes

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
    """

    alpha: Alpha = "weighted"
    repeated: Repeated = "mean"


def adaptive_alpha(student_teacher: Tensor, center_teacher: Tensor | None) -> Tensor:
    """How much of the old center stays, per sample.

    Args:
        student_teacher: (B,) cos(f_s, f_t).
        center_teacher: (B,) cos(w_y, f_t) before the update, for the weighted alpha; None for the plain one.

    Returns:
        (B,) in [0, 1].
    """
    if center_teacher is None:
        return student_teacher.clamp(0, 1)
    product = student_teacher.clamp(_SMALLEST, 1) * center_teacher.clamp(_SMALLEST, 1)
    return product.clamp(_SMALLEST, 1)


class AdaDistill(Method):
    """Distilled class centers with an adaptive moving average, and margin softmax against them.

    Terms: ``ce``, the margin softmax.

    Args:
        config: the knobs.
        context: the run.
    """

    Config = AdaDistillConfig
    requires: ClassVar[frozenset[Requirement]] = frozenset({Requirement.TEACHER_EMBEDDINGS})
    classifies: ClassVar[bool] = True
    computes_part: ClassVar[bool] = True
    sharded: ClassVar[tuple[str, ...]] = ("centers.weight",)
    config: AdaDistillConfig

    def __init__(self, config: AdaDistillConfig, context: RunContext) -> None:
        super().__init__(config, context)
        shard = context.ranks.shard(context.num_classes)
        # Without a teacher of its own the run was stopped before it came here, see `requires`.
        assert context.teacher_embedding_size is not None
        self.centers = DistilledCenters(shard, context.teacher_embedding_size, context.seed)
        self._alpha: Tensor | None = None
        self._agreement: Tensor | None = None
        self._turned: Tensor | None = None

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Update the centers from the gathered batch, then score the student against them.

        Args:
            batch: the gathered batch, with teacher embeddings.

        Returns:
            ``{"ce": scalar}``.
        """
        self._move_centers(batch)
        labels, centers = batch.labels, self.centers
        index = sample_classes(centers.shard, labels, self.context, batch.step, centers.weight.device)
        weights = self.context.class_weights(centers.weight, index, centers.inverse_norms)
        return {"ce": sharded_margin_softmax(batch.projected, labels, weights, self.context.margin)}

    @torch.no_grad()
    def _move_centers(self, batch: Batch) -> None:
        """One step of the moving average, with an alpha for each row."""
        assert batch.teacher is not None
        labels, dtype = batch.labels, self.centers.weight.dtype
        teacher = normalize(batch.teacher.to(dtype))
        agreement = (normalize(batch.projected.to(dtype)) * teacher).sum(1)
        weighted = self.config.alpha == "weighted"
        before = self.context.ranks.sum_(self.centers.cosine(labels, teacher)) if weighted else None
        alpha = adaptive_alpha(agreement, before)
        old = self.centers.unit_rows(labels)
        self.centers.update(labels, teacher, alpha, self.config.repeated)
        self._turned = torch.where(labels >= 0, self.centers.cosine(labels, old), torch.nan)
        self._alpha = alpha.masked_fill(labels < 0, torch.nan)
        self._agreement = agreement.masked_fill(labels < 0, torch.nan)

    def observations(self) -> dict[str, Tensor]:
        """Means over the rows of the last gathered batch that have a label.

        Alpha (its quantiles as well), the cosine of student and teacher, and ``center_drift``: 1 - cos of a row's class
        center before and after the step.
        """
        if self._alpha is None or self._agreement is None or self._turned is None:
            return {}
        low, middle, high = torch.nanquantile(self._alpha, self._alpha.new_tensor([0.1, 0.5, 0.9]))
        return {
            "alpha_mean": self._alpha.nanmean(),
            "alpha_q10": low,
            "alpha_q50": middle,
            "alpha_q90": high,
            "student_teacher_cosine": self._agreement.nanmean(),
            "center_drift": 1 - self.context.ranks.sum_(self._turned.clone()).nanmean(),
        }
