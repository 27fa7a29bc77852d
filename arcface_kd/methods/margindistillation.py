r"""MarginDistillation: the teacher's classes, and a margin for each image (Svitov, Alyamkin, 2020, arXiv 2003.02586).

The teacher's classifier is frozen and takes the place of the student's, as in ProxylessKD. The additive angular margin
of a row depends on how near the teacher puts it to its class center, compared with the batch's nearest:

    d_i = cos(f_t, w_y),      m_i = (largest - smallest) / max_j d_j * d_i + smallest
    loss = margin softmax of f_s against the teacher's classes, with s cos(theta_y + m_i)

An image that the teacher finds typical of its identity is to be learned with the full margin, a doubtful one with
less. Published: largest 0.5, smallest 0.2, s = 64, no other term.

Chosen here, since the paper does not say: the maximum is over the batch of all ranks; a negative d_i counts as 0, so
that no margin leaves [smallest, largest], and a batch without a positive one has the smallest margin throughout.
"""

import math
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch import Tensor
from torch.nn.functional import normalize

from arcface_kd.config.options import Range
from arcface_kd.distributed.class_shard import ShardPositions
from arcface_kd.errors import ConfigError
from arcface_kd.losses.fused import fused
from arcface_kd.losses.margin import Margin
from arcface_kd.methods.base import Batch, Requirement, RunContext
from arcface_kd.methods.proxylesskd import ProxylessKD, ProxylessKDConfig


@dataclass(frozen=True)
class MarginDistillationConfig(ProxylessKDConfig):
    """MarginDistillation's knobs.

    Attributes:
        largest: the margin of the image that is nearest to its class center, in radians, in [0, pi / 2].
        smallest: the margin of an image at a right angle to its class center, in radians, in [0, ``largest``].

    Raises:
        ConfigError: ``smallest`` is above ``largest``.
    """

    largest: Annotated[float, Range(0, math.pi / 2)] = 0.5
    smallest: Annotated[float, Range(0)] = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.smallest > self.largest:
            raise ConfigError(f"smallest is {self.smallest}; it must be in [0, {self.largest}], which is largest")

    def applied_to(self, margin: Margin) -> Margin:
        """ArcFace's margin with the trainer's logit scale and filter; each row has its own m2 in the end."""
        return replace(margin, m1=1.0, m2=self.largest, m3=0.0)


@fused(kernels=2)
def distilled_margins(cosine: Tensor, largest: float, smallest: float) -> Tensor:
    """Additive angular margins (B,) in [smallest, largest] out of the teacher's cosines to its classes."""
    near = cosine.clamp_min(0)
    if not len(near):
        return near
    return near / near.amax().clamp_min(torch.finfo(near.dtype).tiny) * (largest - smallest) + smallest


@fused()
def _cosines(teacher: Tensor, centers: Tensor, owned: Tensor) -> Tensor:
    return (normalize(teacher) * centers).sum(1) * owned


class MarginDistillation(ProxylessKD):
    """The teacher's classifier, frozen, with a margin for each image: the nearer to its class, the larger.

    Terms: ``ce``, the margin softmax. Logit scale and interclass filter are the trainer's.
    """

    Config = MarginDistillationConfig
    requires = frozenset({Requirement.TEACHER_EMBEDDINGS, Requirement.TEACHER_CLASSIFIER})
    same_each_step = ProxylessKD.same_each_step
    config: MarginDistillationConfig

    def __init__(self, config: MarginDistillationConfig, context: RunContext) -> None:
        super().__init__(config, context)
        self._margins: Tensor | None = None

    @torch.no_grad()
    def row_margins(self, batch: Batch, positions: ShardPositions) -> Tensor:
        """The margin of each row of the gathered batch, (B,) in radians."""
        assert batch.teacher is not None
        centers = self.centers.unit_rows(batch.labels, positions=positions)
        own = _cosines(batch.teacher.to(centers.dtype), centers, positions.owned)
        margins = distilled_margins(self.context.ranks.sum_(own), self.config.largest, self.config.smallest)
        self._margins = margins.masked_fill(batch.labels < 0, torch.nan) if batch.observed else None
        return margins

    def observations(self) -> dict[str, Tensor]:
        """Mean and quantiles of the last gathered batch's margins, in radians."""
        if self._margins is None:
            return {}
        low, high = torch.nanquantile(self._margins, self._margins.new_tensor([0.1, 0.9]))
        return {"margin_mean": self._margins.nanmean(), "margin_q10": low, "margin_q90": high}
