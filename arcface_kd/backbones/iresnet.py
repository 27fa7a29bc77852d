"""IResNet (r18, r34, r50, r100, r200): the residual networks of arcface_torch.

Improved residual units after Duta et al., "Improved Residual Networks for Image and Video Recognition" (2020,
arXiv 2004.04989), with the face head of ArcFace (Deng et al., CVPR 2019): flatten -> fully connected -> batch norm.
Parameter names, their order, shapes, initial distributions and arithmetic are those of arcface_torch, so that its
checkpoints (weights and optimizer states) load here with ``strict=True``, and ours there.
"""

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from arcface_kd.backbones.face_backbone import ResidualBackbone

_WIDTHS = (64, 128, 256, 512)
_MAP_SIZE = 7


def _conv(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False)


class ResidualUnit(nn.Module):
    """Batch norm, 3x3, batch norm, PReLU, 3x3 (strided), batch norm, plus the shortcut; no activation after it.

    Where the stride is 2 or the channels change, the shortcut is a 1x1 convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = _conv(in_channels, out_channels, 3)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.prelu = nn.PReLU(out_channels)
        self.conv2 = _conv(out_channels, out_channels, 3, stride)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(_conv(in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels))

    def forward(self, features: Tensor) -> Tensor:
        """Map features (B, in_channels, H, W) to (B, out_channels, H / stride, W / stride)."""
        residual = self.conv1(self.bn1(features))
        residual = self.conv2(self.prelu(self.bn2(residual)))
        residual = self.bn3(residual)
        residual += features if self.downsample is None else self.downsample(features)
        return cast(Tensor, residual)


class IResNet(ResidualBackbone):
    """An IResNet for 112x112 faces, of ``depths`` residual units in four stages that each halve the map.

    ``dropout`` is the probability of dropping a value of the flattened map; ``fp16`` is autocast up to that map.
    """

    def __init__(
        self, depths: Sequence[int], *, dropout: float = 0.0, fp16: bool = False, num_features: int = 512
    ) -> None:
        super().__init__(fp16=fp16)
        channels = _WIDTHS[0]
        self.conv1 = _conv(3, channels, 3)
        self.bn1 = nn.BatchNorm2d(channels)
        self.prelu = nn.PReLU(channels)
        for stage, (depth, width) in enumerate(zip(depths, _WIDTHS, strict=True), start=1):
            units = [ResidualUnit(channels, width, stride=2), *(ResidualUnit(width, width) for _ in range(depth - 1))]
            self.add_module(f"layer{stage}", nn.Sequential(*units))
            channels = width
        self.add_tail(channels, _MAP_SIZE, dropout, num_features)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.1)

    def feature_map(self, images: Tensor) -> Tensor:
        """Stem and stages: (B, 3, 112, 112) to (B, 512, 7, 7), in the half precision type when ``fp16`` is set."""
        with self.autocast(images, half=self.fp16):
            features = self.prelu(self.bn1(self.conv1(images)))
            for stage in range(1, len(_WIDTHS) + 1):
                features = self.get_submodule(f"layer{stage}")(features)
        return cast(Tensor, features)
