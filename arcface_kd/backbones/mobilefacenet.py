"""MobileFaceNet (mbf, mbf_large, mobilefacenet): bottlenecks with depthwise convolutions for phones.

After Chen et al., "MobileFaceNets" (CCBR 2018, arXiv 1804.07573). One topology under two sets of parameter names:

- ``MobileFaceNet``: arcface_torch's, of any ``width`` (2: mbf, 2,059,520 parameters; 4 and deeper: mbf_large), with
  squeeze-and-excitation where that is asked for;
- ``NarrowMobileFaceNet``: AdaDistill's, 64 and 128 channels wide (1,199,488 parameters at 512-d), the network that
  AdaDistill, EKD and FaceX-Zoo publish numbers for.

Names, their order, shapes, initial distributions and arithmetic are those of the two projects, so that checkpoints of
either load with ``strict=True``.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from arcface_kd.backbones.face_backbone import FaceBackbone, check_width, initialize_by_fan_out
from arcface_kd.backbones.squeeze_excitation import SqueezeExcitation

_MAP_CHANNELS = 512
_MAP_SIZE = 7
_ADADISTILL_TRUNK = ("conv1", "conv2_dw", "conv_23", "conv_3", "conv_34", "conv_4", "conv_45", "conv_5")


class _Sum(nn.Sequential):
    """A sequence with a shortcut around it."""

    def forward(self, features: Tensor) -> Tensor:
        return cast(Tensor, features + super().forward(features))  # type: ignore[no-untyped-call]


def _sequence(names: Sequence[str] | None, *modules: nn.Module, shortcut: bool = False) -> nn.Sequential:
    """Modules in a row: under ``names``, or numbered inside a child ``layers`` as arcface_torch has them."""
    if names is None:
        children: OrderedDict[str, nn.Module] = OrderedDict(layers=nn.Sequential(*modules))
    else:
        children = OrderedDict(zip(names, modules, strict=True))
    return _Sum(children) if shortcut else nn.Sequential(children)


def _convolution(
    in_channels: int, out_channels: int, kernel: int = 1, *, stride: int = 1, groups: int = 1, named: bool = False
) -> nn.Sequential:
    """Convolution, batch norm and PReLU."""
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return _sequence(
        ("conv", "bn", "prelu") if named else None, conv, nn.BatchNorm2d(out_channels), nn.PReLU(out_channels)
    )


def _linear_convolution(
    in_channels: int, out_channels: int, kernel: int = 1, *, groups: int = 1, named: bool = False
) -> nn.Sequential:
    """Convolution without padding and batch norm, no activation."""
    conv = nn.Conv2d(in_channels, out_channels, kernel, groups=groups, bias=False)
    return _sequence(("conv", "bn") if named else None, conv, nn.BatchNorm2d(out_channels))


def _bottleneck(
    in_channels: int,
    hidden: int,
    out_channels: int,
    *,
    stride: int = 1,
    shortcut: bool = False,
    se: bool = False,
    named: bool = False,
) -> nn.Sequential:
    """1x1 to ``hidden`` channels, depthwise 3x3, squeeze-and-excitation where wanted, linear 1x1."""
    return _sequence(
        ("conv", "conv_dw", "project") if named else None,
        _convolution(in_channels, hidden, named=named),
        _convolution(hidden, hidden, 3, stride=stride, groups=hidden, named=named),
        *([SqueezeExcitation(hidden, hidden // 4)] if se else []),
        _linear_convolution(hidden, out_channels, named=named),
        shortcut=shortcut,
    )


def _residual_stage(channels: int, hidden: int, depth: int, *, se: bool = False, named: bool = False) -> nn.Sequential:
    """``depth`` bottlenecks with shortcuts."""
    units = [_bottleneck(channels, hidden, channels, shortcut=True, se=se, named=named) for _ in range(depth)]
    return nn.Sequential(OrderedDict({"model" if named else "layers": nn.Sequential(*units)}))


def _scaled(channels: int, width: float) -> int:
    return 8 * max(1, round(channels * width / 8))


def _trunk(width: float, depths: Sequence[int], *, se: bool = False, named: bool = False) -> list[nn.Sequential]:
    """Everything up to the last 1x1 convolution, in order; with AdaDistill's parameter names where ``named``.

    ``width`` is over the original network's 64 and 128 channels, in steps of 8; the bottlenecks' hidden widths stay.
    The rest is as in :class:`MobileFaceNet`.
    """
    narrow, wide = _scaled(64, width), _scaled(128, width)
    if depths[0] == 1:
        first = _convolution(narrow, narrow, 3, groups=math.gcd(narrow, 64), named=named)
    else:
        first = _residual_stage(narrow, 128, depths[0], se=se, named=named)
    return [
        _convolution(3, narrow, 3, stride=2, named=named),
        first,
        _bottleneck(narrow, 128, narrow, stride=2, se=se, named=named),
        _residual_stage(narrow, 128, depths[1], se=se, named=named),
        _bottleneck(narrow, 256, wide, stride=2, se=se, named=named),
        _residual_stage(wide, 256, depths[2], se=se, named=named),
        _bottleneck(wide, 512, wide, stride=2, se=se, named=named),
        _residual_stage(wide, 256, depths[3], se=se, named=named),
    ]


class MobileFaceNet(FaceBackbone):
    """MobileFaceNet of arcface_torch, for 112x112 faces.

    ``depths`` are the bottlenecks with shortcuts at 56, 28, 14 and 7 pixels; 1 in the first place is a single grouped
    convolution instead. ``width`` is over the original network's 64 and 128 channels, above 0 and at most 16, or it is
    a ConfigError. ``se`` puts squeeze-and-excitation between the depthwise and the last convolution of every
    bottleneck, to a quarter of its channels, where MobileNetV3 has it (Howard et al., ICCV 2019, arXiv 1905.02244).
    ``fp16`` is autocast of ``layers``.
    """

    def __init__(
        self, depths: Sequence[int], *, width: float, se: bool = False, fp16: bool = False, num_features: int = 512
    ) -> None:
        super().__init__(fp16=fp16)
        self.layers = nn.Sequential(*_trunk(check_width(width), depths, se=se))
        self.conv_sep = _convolution(_scaled(128, width), _MAP_CHANNELS)
        self.features = _sequence(
            None,
            _linear_convolution(_MAP_CHANNELS, _MAP_CHANNELS, _MAP_SIZE, groups=_MAP_CHANNELS),
            nn.Flatten(),
            nn.Linear(_MAP_CHANNELS, num_features, bias=False),
            nn.BatchNorm1d(num_features),
        )
        initialize_by_fan_out(self)

    def feature_map(self, images: Tensor) -> Tensor:
        """Trunk and last convolution: (B, 3, 112, 112) to (B, 512, 7, 7)."""
        with self.autocast(images, half=self.fp16):
            features = self.layers(images)
        with self.autocast(images, half=False):
            return cast(Tensor, self.conv_sep(features.float() if self.fp16 else features))

    def tail(self, feature_map: Tensor) -> Tensor:
        """Global depthwise convolution, fully connected layer, batch norm: (B, 512, 7, 7) to (B, D)."""
        with self.autocast(feature_map, half=False):
            return cast(Tensor, self.features(feature_map))


class NarrowMobileFaceNet(FaceBackbone):
    """MobileFaceNet of AdaDistill, 64 and 128 channels wide, for 112x112 faces.

    The embedding's batch norm has neither scale nor offset, as in AdaDistill. ``fp16`` is autocast up to the last 1x1
    convolution.
    """

    def __init__(self, *, fp16: bool = False, num_features: int = 512) -> None:
        super().__init__(fp16=fp16)
        for name, stage in zip(_ADADISTILL_TRUNK, _trunk(1, (1, 4, 6, 2), named=True), strict=True):
            self.add_module(name, stage)
        self.conv_6_sep = _convolution(128, _MAP_CHANNELS, named=True)
        self.output_layer = _sequence(
            ("conv_6_dw", "conv_6_flatten", "linear", "bn"),
            _linear_convolution(_MAP_CHANNELS, _MAP_CHANNELS, _MAP_SIZE, groups=_MAP_CHANNELS, named=True),
            nn.Flatten(),
            nn.Linear(_MAP_CHANNELS, num_features, bias=False),
            nn.BatchNorm1d(num_features, affine=False),
        )
        initialize_by_fan_out(self)

    def feature_map(self, images: Tensor) -> Tensor:
        """Trunk and last convolution: (B, 3, 112, 112) to (B, 512, 7, 7)."""
        features = images
        with self.autocast(images, half=self.fp16):
            for name in _ADADISTILL_TRUNK:
                features = self.get_submodule(name)(features)
        with self.autocast(images, half=False):
            return cast(Tensor, self.conv_6_sep(features.float() if self.fp16 else features))

    def tail(self, feature_map: Tensor) -> Tensor:
        """Global depthwise convolution, fully connected layer, batch norm: (B, 512, 7, 7) to (B, D)."""
        with self.autocast(feature_map, half=False):
            return cast(Tensor, self.output_layer(feature_map))
