"""AdaFace's image quality: an embedding's norm, relative to the running mean and deviation of norms."""

import torch
from torch import Tensor, nn

from arcface_kd.losses.fused import fused
from arcface_kd.losses.margin import AdaFaceMargin

_STEP, _H, _EPS = 0.01, 0.333, 1e-3
_SMALLEST, _LARGEST = 1e-3, 100.0


class ImageQuality(nn.Module):
    """Qualities of the rows of a batch (Kim, Jain, Liu, CVPR 2022, arXiv 2204.00964).

    With norms n_i, clipped to [1e-3, 100], and running averages mu and sigma (the buffers ``mean`` and ``std``, from 20
    and 100 on) of their mean and standard deviation:

        mu, sigma <- 0.99 (mu, sigma) + 0.01 (mean, deviation of the batch)
        q_i = 0.333 (n_i - mu) / (sigma + 1e-3)

    The batch is the gathered one, so that all ranks have the same statistics; AdaFace's own code has a rank's.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, margin: AdaFaceMargin) -> None:
        super().__init__()
        self._margin = margin
        self.register_buffer("mean", torch.tensor(20.0))
        self.register_buffer("std", torch.tensor(100.0))

    @torch.no_grad()
    def forward(self, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Update the statistics from a gathered batch (B, D); each row's quality (B,), not clipped, and its margin.

        Rows without a label, or whose embedding fp16 has overflown, count for nothing in the statistics.
        """
        quality, mean, std = _qualities(embeddings.to(self.mean.dtype), labels, self.mean, self.std)
        self.mean.copy_(mean)
        self.std.copy_(std)
        return quality, self._margin.rows(quality)


@fused(kernels=3)
def _qualities(embeddings: Tensor, labels: Tensor, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    norms = embeddings.norm(dim=1)
    counts = ((labels >= 0) & norms.isfinite()).to(norms.dtype)
    norms = norms.clamp(_SMALLEST, _LARGEST)
    rows = counts.sum()
    kept = torch.where(counts > 0, norms, torch.zeros_like(norms))
    average = kept.sum() / rows.clamp_min(1)
    deviation = (((kept - average).square() * counts).sum() / (rows - 1).clamp_min(1)).sqrt()
    mean = torch.where(rows > 0, mean.lerp(average, _STEP), mean)
    std = torch.where(rows > 1, std.lerp(deviation, _STEP), std)
    return _H * (norms - mean) / (std + _EPS), mean, std
