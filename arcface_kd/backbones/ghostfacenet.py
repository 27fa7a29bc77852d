"""GhostFaceNet (ghostfacenet): half of each map is computed, the other half made of it by depthwise convolutions.

After Alansari et al., "GhostFaceNets" (IEEE Access 2023, doi 10.1109/ACCESS.2023.3266068): version 1 is GhostNet (Han
et al., CVPR 2020, arXiv 1911.11907), version 2 GhostNetV2 (Tang et al., NeurIPS 2022, arXiv 2211.12905), both with
PReLU and, at the end, MobileFaceNet's global depthwise convolution. Layers and widths are those of the authors' Keras
code (HamadYA/GhostFaceNets): version 2 of width 1.3 has its 6,795,720 trained parameters. Strided convolutions are
padded alike on both sides, as is usual in torch, and not as in Keras; the authors' ``.h5`` files are not read.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from arcface_kd.backbones.face_backbone import FaceBackbone, check_width, initialize_by_fan_out
from arcface_kd.backbones.squeeze_excitation import SqueezeExcitation
from arcface_kd.errors import ConfigError

# Of each bottleneck: kernel, channels within, channels behind, squeeze-and-excitation, stride.
_BOTTLENECKS = (
    (3, 16, 16, False, 1),
    (3, 48, 24, False, 2),
    (3, 72, 24, False, 1),
    (5, 72, 40, True, 2),
    (5, 120, 40, True, 1),
    (3, 240, 80, False, 2),
    (3, 200, 80, False, 1),
    (3, 184, 80, False, 1),
    (3, 184, 80, False, 1),
    (3, 480, 112, True, 1),
    (3, 672, 112, True, 1),
    (5, 672, 160, True, 2),
    (5, 960, 160, False, 1),
    (5, 960, 160, True, 1),
    (5, 960, 160, False, 1),
    (5, 960, 160, True, 1),
)
# Within the last bottleneck, and behind all of them.
_LAST = {1: 512, 2: 960}
# In version 2, the first bottlenecks see maps that are too large for the attention to pay.
_WITHOUT_ATTENTION = 2
_MAP_SIZES = {1: 7, 2: 4}


def _divisible(channels: float) -> int:
    """The multiple of 4 next to a number of channels, not more than a tenth below it."""
    rounded = max(4, int(channels + 2) // 4 * 4)
    return rounded + 4 if rounded < 0.9 * channels else rounded


def _convolution(
    in_channels: int,
    out_channels: int,
    kernel: int | tuple[int, int] = 1,
    *,
    stride: int = 1,
    groups: int = 1,
    prelu: bool = False,
) -> nn.Sequential:
    sides = (kernel, kernel) if isinstance(kernel, int) else kernel
    padding = (sides[0] // 2, sides[1] // 2)
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, sides, stride, padding, groups=groups, bias=False),
        nn.BatchNorm2d(out_channels),
        *([nn.PReLU(out_channels)] if prelu else []),
    )


class _Ghost(nn.Module):
    """Half of the channels by a 1x1 convolution, the other half from those by a depthwise 3x3."""

    def __init__(self, in_channels: int, out_channels: int, *, prelu: bool) -> None:
        super().__init__()
        half = out_channels // 2
        self.primary = _convolution(in_channels, half, prelu=prelu)
        self.cheap = _convolution(half, half, 3, groups=half, prelu=prelu)

    def forward(self, features: Tensor) -> Tensor:
        primary = self.primary(features)
        return torch.cat([primary, self.cheap(primary)], dim=1)


class _AttendedGhost(_Ghost):
    """A ghost module weighted by attention along rows and columns at half of its size."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, prelu=True)
        self.attention = nn.Sequential(
            nn.AvgPool2d(2),
            _convolution(in_channels, out_channels),
            _convolution(out_channels, out_channels, (1, 5), groups=out_channels),
            _convolution(out_channels, out_channels, (5, 1), groups=out_channels),
            nn.Sigmoid(),
        )

    def forward(self, features: Tensor) -> Tensor:
        weights = interpolate(self.attention(features), features.shape[2:], mode="bilinear")
        weighted: Tensor = super().forward(features) * weights
        return weighted


class _Bottleneck(nn.Module):
    def __init__(
        self, in_channels: int, hidden: int, out_channels: int, kernel: int, stride: int, se: bool, attended: bool
    ) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            _AttendedGhost(in_channels, hidden) if attended else _Ghost(in_channels, hidden, prelu=True),
            *([_convolution(hidden, hidden, kernel, stride=stride, groups=hidden)] if stride > 1 else []),
            *([SqueezeExcitation(hidden, _divisible(hidden / 4))] if se else []),
            _Ghost(hidden, out_channels, prelu=False),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                _convolution(in_channels, in_channels, kernel, stride=stride, groups=in_channels),
                _convolution(in_channels, out_channels),
            )

    def forward(self, features: Tensor) -> Tensor:
        total: Tensor = self.residual(features) + self.shortcut(features)
        return total


class GhostFaceNet(FaceBackbone):
    """GhostFaceNet for 112x112 faces; GhostFaceNetV2-1.3-1 of its authors is version 2 of width 1.3 and stride 1.

    Version 2 has attention in all bottlenecks but the first two. The width is over GhostNet's, above 0 and at most 16.
    A stride of 2 in the first convolution leaves a third of the multiply-adds and a last map of 4x4. ``fp16`` is
    autocast up to the last map. A ConfigError names a version, width or stride that there is not.
    """

    def __init__(
        self, *, version: int = 2, width: float = 1.3, stride: int = 1, fp16: bool = False, num_features: int = 512
    ) -> None:
        super().__init__(fp16=fp16)
        for option, given in (("version", version), ("stride", stride)):
            if given not in (1, 2):
                raise ConfigError(f"{option}={given!r}: wanted 1 or 2")
        check_width(width)
        channels = _divisible(16 * width)
        self.stem = _convolution(3, channels, 3, stride=stride, prelu=True)
        blocks = []
        for number, (kernel, within, behind, se, block_stride) in enumerate(_BOTTLENECKS):
            within = _LAST[version] if number == len(_BOTTLENECKS) - 1 else within
            hidden, out_channels = _divisible(within * width), _divisible(behind * width)
            attended = version == 2 and number >= _WITHOUT_ATTENTION
            blocks.append(_Bottleneck(channels, hidden, out_channels, kernel, block_stride, se, attended))
            channels = out_channels
        self.blocks = nn.Sequential(*blocks)
        last = _divisible(_LAST[version] * width)
        self.conv_last = _convolution(channels, last, prelu=True)
        self.features = nn.Sequential(
            nn.Conv2d(last, last, _MAP_SIZES[stride], groups=last, bias=False),
            nn.BatchNorm2d(last),
            nn.Flatten(),
            nn.Linear(last, num_features, bias=False),
            nn.BatchNorm1d(num_features),
        )
        initialize_by_fan_out(self)
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def feature_map(self, images: Tensor) -> Tensor:
        """All but the embedding's layers: (B, 3, 112, 112) to (B, C, 7, 7), or (B, C, 4, 4) where the stride is 2."""
        with self.autocast(images, half=self.fp16):
            features: Tensor = self.conv_last(self.blocks(self.stem(images)))
        return features

    def tail(self, feature_map: Tensor) -> Tensor:
        """Global depthwise convolution, fully connected layer, batch norm: (B, C, H, W) to (B, D)."""
        with self.autocast(feature_map, half=False):
            embeddings: Tensor = self.features(feature_map.float() if self.fp16 else feature_map)
        return embeddings
