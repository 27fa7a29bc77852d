"""ThinResNet (thin_r18, thin_r10): small residual networks that train quickly on a CPU.

Made for the demo and for tests on real faces, not for publishing numbers: 3.5 M and 1.0 M parameters at 512-d, 105 M
and 14 M multiply-adds. What counts on a CPU is memory traffic, not multiplications (its bfloat16 matrix units do those
almost for free), hence a strided stem, a first stage at 28x28 and channels_last. The units are IResNet's (batch norm
before the first convolution, PReLU between the two, nothing after the sum), but with the stride in the first
convolution. Units with a ReLU after the sum train a fifth faster and learn less from a teacher: on 985 real identities
AdaDistill ended at 54 % TAR@FAR=1e-2 on LFW pairs with them and at 66 % with these. The head is IResNet's: batch norm,
flatten, dropout, fully connected layer, batch norm.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from arcface_kd.backbones.face_backbone import ResidualBackbone, initialize_by_fan_out

_MAP_SIZE = 4
_SLOPE = 0.25  # where PReLU begins; its gradient alone would cost a quarter of a training step on a CPU


def _conv_and_norm(
    in_channels: int, out_channels: int, kernel_size: int, stride: int = 1
) -> tuple[nn.Module, nn.Module]:
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False)
    return conv, nn.BatchNorm2d(out_channels)


class ThinUnit(nn.Module):
    """Batch norm, 3x3 (strided), batch norm, PReLU, 3x3, batch norm, plus the shortcut.

    Where the stride is 2 or the channels change, the shortcut is a 1x1 convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.BatchNorm2d(in_channels),
            *_conv_and_norm(in_channels, out_channels, 3, stride),
            nn.LeakyReLU(_SLOPE, inplace=True),
            *_conv_and_norm(out_channels, out_channels, 3),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(*_conv_and_norm(in_channels, out_channels, 1, stride))

    def forward(self, features: Tensor) -> Tensor:
        """Map features (B, in_channels, H, W) to (B, out_channels, ceil(H / stride), ceil(W / stride))."""
        total: Tensor = self.residual(features) + self.shortcut(features)
        return total


class ThinResNet(ResidualBackbone):
    """A thin residual network for 112x112 faces, of four stages of some width and as many residual units each.

    ``dropout`` is the probability of dropping a value of the flattened map; ``fp16`` is autocast up to that map.
    """

    def __init__(
        self,
        widths: Sequence[int] = (32, 64, 128, 192),
        units: int = 2,
        *,
        dropout: float = 0.0,
        fp16: bool = False,
        num_features: int = 512,
    ) -> None:
        super().__init__(fp16=fp16)
        channels = widths[0]
        self.stem = nn.Sequential(*_conv_and_norm(3, channels, 3, stride=2), nn.LeakyReLU(_SLOPE, inplace=True))
        stages = []
        for width in widths:
            first = ThinUnit(channels, width, stride=2)
            stages.append(nn.Sequential(first, *(ThinUnit(width, width) for _ in range(units - 1))))
            channels = width
        self.stages = nn.Sequential(*stages)
        self.add_tail(channels, _MAP_SIZE, dropout, num_features)
        initialize_by_fan_out(self, nn.Conv2d)

    def feature_map(self, images: Tensor) -> Tensor:
        """Stem and stages: (B, 3, 112, 112) to (B, C, 4, 4), in the half precision type when ``fp16`` is set."""
        with self.autocast(images, half=self.fp16):
            return cast(Tensor, self.stages(self.stem(images.contiguous(memory_format=torch.channels_last))))
