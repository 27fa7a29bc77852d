r"""EKD: evaluation-oriented knowledge distillation (Huang, Wu, Xu, Ding, CVPR 2022, arXiv 2206.02325).

Verification asks which pairs of images pass a threshold, at thresholds that one in 10, 100, ... 1,000,000 impostor
pairs passes. So the ranks of pairs among these thresholds are matched, not their cosines: the student's cosines are
ranked among the student's thresholds, the teacher's among the teacher's.

    r(x) = sum_k sigmoid( (x - threshold_k) / 0.01 )
    loss = 0.02 * mean over positive pairs (r_s - r_t)^2  +  0.01 * mean over the hardest negative pairs (r_s - r_t)^2

The thresholds are the cosines that these shares of the batch's negative pairs exceed, followed by a moving average,
threshold <- 0.99 threshold + 0.01 of this batch. The hardest negative pairs are the 2,000 with the largest cosines of
the student's. Pairs are taken from the batches of all ranks. All numbers are those of the authors' code in Tencent's
TFace, which draws half of a batch so that identities repeat. Chosen here:

- the first batch sets the thresholds, which in the published code rise from 0 over hundreds of steps;
- rows without a label are in no pair;
- the trainer's own sampler stays, so that positive pairs are those that chance brings.

A batch with fewer negative pairs than a rate asks for has its largest cosine as the threshold; the moving average of
largest cosines is then below the true threshold.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from arcface_kd.config.options import Count, Options, Positive, Share, Weight
from arcface_kd.losses.fused import fused
from arcface_kd.losses.pair_ranks import Pairs, impostor_thresholds, rank_losses
from arcface_kd.methods.base import Batch, Method, Requirement, RunContext

# One over each false positive rate.
_PAIRS_PER_ACCEPTANCE = (10, 100, 1_000, 10_000, 100_000, 1_000_000)


@dataclass(frozen=True)
class EKDConfig(Options):
    """EKD's knobs.

    Attributes:
        positive_weight: of the positive pairs' difference of ranks, at least 0.
        negative_weight: of the hardest negative pairs', at least 0.
        hardest: how many negative pairs are taken, at least 1.
        temperature: of the soft count, in units of the cosine, positive.
        momentum: of a batch's thresholds in their moving average, in (0, 1].
    """

    positive_weight: Weight = 0.02
    negative_weight: Weight = 0.01
    hardest: Count = 2000
    temperature: Positive = 0.01
    momentum: Share = 0.01


@fused()
def _followed(
    before: tuple[Tensor, Tensor], met: tuple[Tensor, Tensor], steps: Tensor, negatives: Tensor, momentum: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Both moving averages and the number of steps that have moved them, a step later."""
    share = torch.full_like(before[0][0], momentum).masked_fill(steps == 0, 1.0) * (negatives > 0)
    student, teacher = (
        torch.lerp(old, new.nan_to_num(neginf=0.0).to(old.dtype), share) for old, new in zip(before, met, strict=True)
    )
    return student, teacher, steps + (negatives > 0)


class EKD(Method):
    """Match the number of verification thresholds that pairs of images pass with the teacher.

    Terms: ``ekd_positive`` and ``ekd_negative``, weighted.
    """

    Config = EKDConfig
    requires = frozenset({Requirement.TEACHER_EMBEDDINGS})
    projects = False
    config: EKDConfig

    student_thresholds: Tensor
    teacher_thresholds: Tensor
    followed: Tensor

    def __init__(self, config: EKDConfig, context: RunContext) -> None:
        super().__init__(config, context)
        self.register_buffer("student_thresholds", torch.zeros(len(_PAIRS_PER_ACCEPTANCE)))
        self.register_buffer("teacher_thresholds", torch.zeros(len(_PAIRS_PER_ACCEPTANCE)))
        self.register_buffer("followed", torch.zeros((), dtype=torch.int64))
        self._positive_pairs: Tensor | None = None

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Follow the thresholds, then compare the ranks of the gathered batch's pairs."""
        assert batch.teacher is not None
        config, labels = self.config, batch.labels
        # How many pairs are positive or negative is never asked, so that nobody waits for the device.
        with torch.autocast(labels.device.type, enabled=False):
            pairs = Pairs(batch.embeddings, batch.teacher, labels)
            self._positive_pairs = pairs.positives
            self._follow_thresholds(pairs)
            dtype = pairs.unit.dtype
            thresholds = self.student_thresholds.to(dtype), self.teacher_thresholds.to(dtype)
            positive, negative = rank_losses(batch.embeddings, pairs, thresholds, config.temperature, config.hardest)
        return {"ekd_positive": positive * config.positive_weight, "ekd_negative": negative * config.negative_weight}

    @torch.no_grad()
    def _follow_thresholds(self, pairs: Pairs) -> None:
        """One step of the moving averages; a batch without a negative pair leaves them as they are."""
        met = impostor_thresholds(pairs, _PAIRS_PER_ACCEPTANCE)
        before = self.student_thresholds, self.teacher_thresholds
        after = _followed(before, met, self.followed, pairs.negatives, self.config.momentum)
        for thresholds, moved in zip((*before, self.followed), after, strict=True):
            thresholds.copy_(moved)

    def observations(self) -> dict[str, Tensor]:
        """Positive pairs in the last gathered batch, and the student's and the teacher's threshold at 1 in 1,000."""
        if self._positive_pairs is None:
            return {}
        place = _PAIRS_PER_ACCEPTANCE.index(1_000)
        return {
            "ekd_positive_pairs": self._positive_pairs,
            "ekd_student_threshold": self.student_thresholds[place],
            "ekd_teacher_threshold": self.teacher_thresholds[place],
        }
