"""Squeeze-and-excitation: channels weighted by what the whole map holds (Hu et al., CVPR 2018, arXiv 1709.01507)."""

from torch import Tensor, nn


class SqueezeExcitation(nn.Module):
    """Global mean, 1x1 to few channels, PReLU, 1x1 back, hard sigmoid, product with the map."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, squeezed, 1),
            nn.PReLU(squeezed),
            nn.Conv2d(squeezed, channels, 1),
            nn.Hardsigmoid(),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Weight the channels of (B, C, H, W) features."""
        weighted: Tensor = features * self.gate(features)
        return weighted
