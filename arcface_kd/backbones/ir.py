"""IR and IR-SE: the residual networks of AdaFace, CVLface, face.evoLVe and FaceX-Zoo, under their parameter names.

After He et al., "Identity Mappings in Deep Residual Networks" (ECCV 2016, arXiv 1603.05027), as ArcFace has them (Deng
et al., CVPR 2019), with squeeze-and-excitation after Hu et al. (CVPR 2018, arXiv 1709.01507) in the IR-SE networks. The
authors' layouts differ in few places, which `IRLayout` names; names, their order, shapes and arithmetic are theirs, so
that their checkpoints load with ``strict=True``.
"""

import math
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor, nn

from arcface_kd.backbones.face_backbone import FaceBackbone, initialize_by_fan_out
from arcface_kd.errors import ConfigError

_UNITS = {
    **{"18": (2, 2, 2, 2), "34": (3, 4, 6, 3), "50": (3, 4, 14, 3), "101": (3, 13, 30, 3)},
    **{"152": (3, 8, 36, 3), "200": (3, 24, 36, 3)},
}
_BOTTLENECK_WIDTHS = (256, 512, 1024, 2048)
_REDUCTION = 16
_MOST_UNITS = 1000
# What the name of a layout that has no short one begins with.
ANY_IR = "ir:"


@dataclass(frozen=True)
class IRLayout:
    """Where IR networks differ. The defaults are those of AdaFace, CVLface and TFace below 152 layers."""

    units: tuple[int, ...] = (3, 4, 14, 3)  # residual units of the four stages
    widths: tuple[int, ...] = (64, 128, 256, 512)  # channels of the four stages
    stem: int = 64  # channels of the first convolution
    bottleneck: bool = False  # units of 1x1, 3x3 and 1x1 convolutions instead of two of 3x3
    squeeze: str = ""  # name of the squeeze-and-excitation block in a unit; empty for none
    # Batch norm between a unit's first convolution and its PReLU; face.evoLVe and FaceX-Zoo have none.
    inner_norm: bool = True
    affine: bool = False  # the embedding's batch norm has scale and offset, as theirs has
    side: int = 7  # height and width of the last map; images are 16 times as large

    def __post_init__(self) -> None:
        narrowest = _REDUCTION if self.squeeze else 4 if self.bottleneck else 1
        sizes = (*self.units, self.stem, self.side)
        if not (len(self.units) == len(self.widths) == 4 and min(self.widths) >= narrowest and min(sizes) > 0):
            raise ValueError("four stages of units that are wide enough")
        if sum(self.units) > _MOST_UNITS or not re.fullmatch(r"\w*", self.squeeze, re.ASCII):
            raise ValueError("no network that anybody has trained")

    @property
    def image_size(self) -> int:
        """Height and width of the images."""
        return 16 * self.side

    @property
    def name(self) -> str:
        """The name that :meth:`of` reads: ``ir_50``, or ``ir:`` and what differs from it."""
        known = next((name for name, layout in IR_NAMES.items() if layout == self), None)
        if known is not None:
            return known
        changed = {field.name: getattr(self, field.name) for field in fields(self)}
        words = (
            f"{key}={'-'.join(map(str, value)) if isinstance(value, tuple) else str(value).lower()}"
            for key, value in changed.items()
            if value != getattr(IRLayout, key)
        )
        return ANY_IR + ",".join(words)

    @classmethod
    def of(cls, name: str) -> "IRLayout | None":
        """The layout that a name stands for, None where it is no IR network's."""
        if not name.startswith(ANY_IR):
            return IR_NAMES.get(name)
        try:
            words = (word.partition("=") for word in name[len(ANY_IR) :].split(","))
            return cls(**{key: _read(text, getattr(cls, key)) for key, _, text in words})
        except (AttributeError, KeyError, TypeError, ValueError):
            raise ConfigError(
                f"network {name!r}: wanted settings such as {ANY_IR}units=2-2-2-2,widths=64-128-256-512,affine=true"
            ) from None

    @classmethod
    def in_shapes(cls, shapes: Mapping[str, tuple[int, ...]]) -> "IRLayout | None":
        """Read a layout off a network's tensors, None where no four stages of IR units are there.

        Whether all tensors fit is for the caller to see.
        """
        units: dict[int, dict[str, tuple[int, ...]]] = {}
        for key, shape in shapes.items():
            if found := re.fullmatch(r"body\.(\d+)\.res_layer\.(.+)", key):
                units.setdefault(int(found[1]), {})[found[2]] = shape
        stem, last = shapes.get("input_layer.0.weight", ()), shapes.get("output_layer.3.weight", ())
        convolutions = [
            [
                shape
                for key, shape in sorted(units[place].items())
                if re.fullmatch(r"\d\.weight", key) and len(shape) == 4
            ]
            for place in sorted(units)
        ]
        if not units or len(stem) != 4 or len(last) != 2 or not all(convolutions):
            return None
        counts: dict[int, int] = {}
        for each in convolutions:
            counts[each[-1][0]] = counts.get(each[-1][0], 0) + 1
        first = units[min(units)]
        try:
            return cls(
                units=tuple(counts.values()),
                widths=tuple(counts),
                stem=stem[0],
                bottleneck=len(convolutions[0]) == 3,
                squeeze=next((key for key in first if key.endswith(".fc1.weight")), "").partition(".")[0],
                inner_norm="2.running_mean" in first,
                affine="output_layer.4.weight" in shapes,
                side=math.isqrt(last[1] // max(1, [*counts][-1])),
            )
        except ValueError:
            return None


def _read(text: str, default: object) -> Any:
    """A setting's text as what its default is."""
    if isinstance(default, tuple):
        return tuple(int(part) for part in text.split("-"))
    if isinstance(default, bool):
        return {"true": True, "false": False}[text]
    return int(text) if isinstance(default, int) else text


def _standard() -> dict[str, IRLayout]:
    """AdaFace's and CVLface's networks, and those of face.evoLVe and FaceX-Zoo."""
    names: dict[str, IRLayout] = {}
    for squeeze, word in (("", ""), ("se_block", "se_")):
        for depth, units in _UNITS.items():
            bottleneck = int(depth) > 101
            widths = _BOTTLENECK_WIDTHS if bottleneck else IRLayout.widths
            names[f"ir_{word}{depth}"] = IRLayout(units, widths, bottleneck=bottleneck, squeeze=squeeze)
    for squeeze, word in (("", ""), ("5", "se_")):
        for depth in ("50", "101", "152"):
            names[f"evolve_ir_{word}{depth}"] = IRLayout(_UNITS[depth], squeeze=squeeze, inner_norm=False, affine=True)
    return names


IR_NAMES: Mapping[str, IRLayout] = _standard()
"""The authors' own networks: ``ir_*`` and ``ir_se_*`` are AdaFace's and CVLface's, ``evolve_*`` face.evoLVe's and
FaceX-Zoo's."""


class SqueezeExcite(nn.Module):
    """Each channel times a gate in (0, 1), made of the means of all channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, channels // _REDUCTION, 1, bias=False)
        self.fc2 = nn.Conv2d(channels // _REDUCTION, channels, 1, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        gates: Tensor = self.fc2(self.fc1(features.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return features * gates


class IRUnit(nn.Module):
    """A residual unit, strided in its last 3x3 (of a bottleneck, its last 1x1); no activation after the sum.

    ``stride`` 2 halves the map; where the channels differ, the shortcut is a 1x1 convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, layout: IRLayout) -> None:
        super().__init__()
        self.shortcut_layer: nn.Module = nn.MaxPool2d(1, stride)
        if in_channels != out_channels:
            self.shortcut_layer = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )
        inner = out_channels // 4 if layout.bottleneck else out_channels
        sizes = (1, 3, 1) if layout.bottleneck else (3, 3)
        layers: list[nn.Module] = [nn.BatchNorm2d(in_channels)]
        channels = in_channels
        for place, size in enumerate(sizes, start=1):
            is_last = place == len(sizes)
            width = out_channels if is_last else inner
            layers.append(nn.Conv2d(channels, width, size, stride if is_last else 1, size // 2, bias=False))
            if is_last or layout.inner_norm:
                layers.append(nn.BatchNorm2d(width))
            if not is_last:
                layers.append(nn.PReLU(width))
            channels = width
        named = OrderedDict((str(place), layer) for place, layer in enumerate(layers))
        if layout.squeeze:
            named[layout.squeeze] = SqueezeExcite(out_channels)
        self.res_layer = nn.Sequential(named)

    def forward(self, features: Tensor) -> Tensor:
        """Map features (B, in_channels, H, W) to (B, out_channels, H / stride, W / stride)."""
        total: Tensor = self.res_layer(features) + self.shortcut_layer(features)
        return total


class IRNet(FaceBackbone):
    """An IR or IR-SE network for faces of 112x112, or 16 times ``layout.side``.

    ``dropout`` is the probability of dropping a value of the flattened map; ``fp16`` is autocast up to that map.
    """

    def __init__(self, layout: IRLayout, *, dropout: float = 0.0, fp16: bool = False, num_features: int = 512) -> None:
        super().__init__(fp16=fp16)
        stem = nn.Conv2d(3, layout.stem, 3, padding=1, bias=False)
        self.input_layer = nn.Sequential(stem, nn.BatchNorm2d(layout.stem), nn.PReLU(layout.stem))
        channels = layout.widths[-1]
        self.output_layer = nn.Sequential(
            nn.BatchNorm2d(channels),
            nn.Dropout(dropout, inplace=True),
            nn.Flatten(),
            nn.Linear(channels * layout.side**2, num_features),
            nn.BatchNorm1d(num_features, affine=layout.affine),
        )
        units, channels = [], layout.stem
        for count, width in zip(layout.units, layout.widths, strict=True):
            for place in range(count):
                units.append(IRUnit(channels, width, 1 if place else 2, layout))
                channels = width
        self.body = nn.Sequential(*units)
        initialize_by_fan_out(self)

    def feature_map(self, images: Tensor) -> Tensor:
        """Stem and stages: (B, 3, 112, 112) to (B, C, 7, 7), in the half precision type when ``fp16`` is set."""
        with self.autocast(images, half=self.fp16):
            features: Tensor = self.body(self.input_layer(images))
        return features

    def tail(self, feature_map: Tensor) -> Tensor:
        """Batch norm, dropout, fully connected layer, batch norm: (B, C, 7, 7) to (B, D)."""
        with self.autocast(feature_map, half=self.fp16):
            flat = self.output_layer[:3](feature_map)
        with self.autocast(feature_map, half=False):
            embeddings: Tensor = self.output_layer[3:](flat.float() if self.fp16 else flat)
        return embeddings
