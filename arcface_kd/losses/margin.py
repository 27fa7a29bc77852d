"""The margin on the target logit: ArcFace, CosFace, their combination, and AdaFace, with the derivative."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_EDGE = 1e-3


@dataclass(frozen=True)
class Margin:
    """A margin-based softmax's knobs, as arcface_torch's ``margin_list`` gives them.

    The target logit is ``scale * psi(cos theta)`` with ``psi = cos(m1 theta + m2) - m3``; every other logit is
    ``scale * cos theta``. ArcFace is (1, m, 0) (Deng et al., arXiv 1801.07698), CosFace (1, 0, m) (Wang et al.,
    arXiv 1801.09414), and both at once the combined margin of insightface.

    Attributes:
        scale: the logit scale s, positive.
        m1: multiplicative angular margin, at least 1.
        m2: additive angular margin in radians, in [0, pi / 2].
        m3: additive cosine margin, in [0, 2).
        filter_threshold: interclass filtering, in [0, 1]: a cosine to a class other than the target above this counts
            as a mislabelled one, its logit becomes 0 and has no gradient. 0 switches it off.

    Raises:
        ValueError: a knob outside its range.
    """

    scale: float = 64.0
    m1: float = 1.0
    m2: float = 0.5
    m3: float = 0.0
    filter_threshold: float = 0.0

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise ValueError(f"the logit scale is {self.scale}; it must be positive")
        if not self.m1 >= 1:
            raise ValueError(f"the margin m1 is {self.m1}; it must be at least 1")
        if not 0 <= self.m2 <= math.pi / 2:
            raise ValueError(f"the margin m2 is {self.m2}; it must be in [0, pi / 2]")
        if not 0 <= self.m3 < 2:
            raise ValueError(f"the margin m3 is {self.m3}; it must be in [0, 2)")
        if not 0 <= self.filter_threshold <= 1:
            raise ValueError(f"the interclass filtering threshold is {self.filter_threshold}; it must be in [0, 1]")

    def target(self, cosine: Tensor, m2: Tensor | None = None) -> tuple[Tensor, Tensor]:
        r"""The target's ``psi`` and its derivative.

        Where ``m1 theta + m2 > pi`` the cosine would rise again and the margin would pull the wrong way; from there on
        psi goes on linearly in ``cos theta``, with the offset that ArcFace's authors use for m1 = 1
        (``cos theta - m2 sin m2``), shifted for other m1 so that psi keeps falling with theta.

        The derivative ``m1 sin(m1 theta + m2) / sin theta`` has no limit at theta = 0; ``sin theta`` is bounded from
        below by the square root of the number format's resolution, so that it stays finite.

        Args:
            cosine: cosines of embeddings and their own class centers, any shape; values outside [-1, 1] by rounding
                are clamped.
            m2: additive angular margins in radians, in [0, pi / 2], of the shape of ``cosine``, to take instead of the
                one margin; None takes that one.

        Returns:
            ``(psi, dpsi / dcos)`` of the same shape.
        """
        cosine = cosine.clamp(-1, 1)
        if self.m1 == 1.0 and self.m2 == 0.0 and m2 is None:
            return cosine - self.m3, torch.ones_like(cosine)
        sine = ((1 - cosine) * (1 + cosine)).sqrt()
        angle = self.m1 * torch.atan2(sine, cosine) + (self.m2 if m2 is None else m2)
        if m2 is None:
            turn = math.cos((math.pi - self.m2) / self.m1)
            offset: float | Tensor = turn + math.cos(self.m2) + self.m2 * math.sin(self.m2)
        else:
            offset = torch.cos((math.pi - m2) / self.m1) + m2.cos() + m2 * m2.sin()
        beyond = angle > math.pi
        continued = cosine - offset
        psi = torch.where(beyond, continued, angle.cos()) - self.m3
        slope = torch.where(beyond, torch.ones_like(cosine), self.m1 * angle.sin() / sine.clamp_min(_floor(cosine)))
        return psi, slope


def _floor(cosine: Tensor) -> float:
    return math.sqrt(torch.finfo(cosine.dtype).eps)


@dataclass(frozen=True)
class AdaFaceMargin(Margin):
    """AdaFace's margin, by the quality of each image (Kim, Jain, Liu, CVPR 2022, arXiv 2204.00964).

    With a row's quality q in [-1, 1] and m = ``m3``, ``psi = cos(clip(theta - m q, e, pi - e)) - (m + m q)``, e = 1e-3:
    the angular margin of a row is ``m2 = -m q``, what is taken from its cosine ``m - m2``. Where the angle is clipped,
    psi has no gradient.
    """

    m2: float = 0.0
    m3: float = 0.4

    def rows(self, quality: Tensor) -> Tensor:
        """The angular margin (B,) of each row, in [-m, m], from its quality (B,), which is clipped here."""
        return -self.m3 * quality.clamp(-1, 1)

    def target(self, cosine: Tensor, m2: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The target's ``psi`` and its derivative, of the shape of ``cosine``; ``m2`` is that of :meth:`rows`.

        Raises:
            ValueError: no angular margins.
        """
        if m2 is None:
            raise ValueError("AdaFace's margin differs from row to row: pass row_m2=batch.row_m2")
        cosine = cosine.clamp(-1, 1)
        sine = ((1 - cosine) * (1 + cosine)).sqrt()
        angle = torch.atan2(sine, cosine) + m2
        inside = (angle > _EDGE) & (angle < math.pi - _EDGE)
        psi = angle.clamp(_EDGE, math.pi - _EDGE).cos() - (self.m3 - m2)
        return psi, torch.where(inside, angle.sin() / sine.clamp_min(_floor(cosine)), torch.zeros_like(cosine))
