"""Where a face network has its feature maps: found by the names of its modules, or named by the user.

Known by themselves are the networks of this package and of arcface_torch (iresnet, mobilefacenet, vit), whose modules
are told by their names alone.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from arcface_kd.backbones.face_backbone import evaluating
from arcface_kd.errors import ConfigError, first_line

# Modules that tell a network's family, and those whose outputs are the last maps at 7, 14, 28 and 56 pixels (thin_r18,
# and ghostfacenet with stride 2: 4, 7, 14 and 28).
_FAMILIES = (
    (("layer1", "layer2", "layer3", "layer4", "bn2", "fc"), ("layer4", "layer3", "layer2", "layer1")),
    (("layers.7", "conv_sep", "features"), ("conv_sep", "layers.5", "layers.3", "layers.1")),
    (("conv_5", "conv_6_sep", "output_layer"), ("conv_6_sep", "conv_4", "conv_3", "conv2_dw")),
    (("stem", "stages.3", "bn2", "fc"), ("stages.3", "stages.2", "stages.1", "stages.0")),
    (("stem", "blocks.15", "conv_last", "features"), ("conv_last", "blocks.10", "blocks.4", "blocks.2")),
)
# arcface_torch's vit ends in `feature`, whose input is all tokens of an image in one row, put back in their places
# where training has left some of them out.
_VIT = ("patch_embed", "blocks", "feature")
# IR networks have the units of all stages in one row; a unit with a stride begins a stage.
_IR = ("input_layer", "body", "output_layer")


@dataclass(frozen=True)
class MapPlace:
    """A place in a network where its feature map can be taken."""

    module: str  # path of a module
    is_input: bool = False  # the map is what the module takes, not what it returns
    channels: int | None = None  # of the map, where the network has it as a row of tokens' channels

    def __str__(self) -> str:
        return f"the input of {self.module!r}" if self.is_input else f"the output of {self.module!r}"

    def watch(self, network: nn.Module, show: Callable[[Tensor], None]) -> RemovableHandle:
        """Show the map (B, C, H, W) whenever the network runs; what takes the hook off again is returned."""
        module = network.get_submodule(self.module)

        def before(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            show(self.to_map(inputs[0]))

        def behind(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            show(self.to_map(output))

        return module.register_forward_pre_hook(before) if self.is_input else module.register_forward_hook(behind)

    def to_map(self, value: object) -> Tensor:
        """What the network has in this place, as a map (B, C, H, W).

        It may be (B, P, C) tokens or (B, P * C), the tokens in one row. P tokens are a square where P is a square
        number, a column elsewhere.
        """
        if isinstance(value, Tensor) and value.dim() == 4:
            return value
        if isinstance(value, Tensor) and value.dim() == 2 and self.channels is not None:
            value = value.reshape(value.shape[0], value.shape[1] // self.channels, self.channels)
        if isinstance(value, Tensor) and value.dim() == 3:
            side = math.isqrt(value.shape[1])
            shape = (side, side) if side * side == value.shape[1] else (value.shape[1], 1)
            return cast(Tensor, value.transpose(1, 2).unflatten(2, shape))
        what = str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__
        raise ConfigError(f"{self} is no feature map but {what}; wanted (B, C, H, W), or (B, P, C) tokens")

    def from_map(self, feature_map: Tensor, dimensions: int) -> Tensor:
        """The reverse of :meth:`to_map`, to what has so many dimensions: 4, 3 or 2."""
        if dimensions == 4:
            return feature_map
        tokens = feature_map.flatten(2).transpose(1, 2)
        return tokens if dimensions == 3 else tokens.flatten(1)


def find_map(network: nn.Module, name: str | None = None, tap: int = 0) -> MapPlace:
    """Find a feature map of a network: by the path of the module that returns it, or by ``tap``.

    0 is the last map, which the embedding is made from; 1, 2 and 3 are the last ones at twice, four and eight times its
    height and width.
    """
    kind = type(network).__name__
    if name is not None:
        if not _has(network, name) or not name:
            raise ConfigError(f"{kind} has no module {name!r}; it has {', '.join(dict(network.named_children()))}, ...")
        return MapPlace(name)
    if all(_has(network, mark) for mark in _IR):
        families: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
            (_IR, _ir_places(network.get_submodule("body"))),
        )
    else:
        families = _FAMILIES
    for marks, places in families:
        if all(_has(network, mark) for mark in marks):
            if not 0 <= tap < len(places):
                raise ConfigError(f"{kind} has no feature map {tap} stages before its last; there are 0 to 3")
            return MapPlace(places[tap])
    if all(_has(network, mark) for mark in _VIT) and isinstance(getattr(network, "embed_dim", None), int):
        if tap:
            raise ConfigError(f"{kind} has its tokens in one size from beginning to end: tap is {tap}, wanted 0")
        return MapPlace("feature", is_input=True, channels=network.embed_dim)  # type: ignore[arg-type]
    raise ConfigError(
        f"where {kind} has its feature map is not known: it is no iresnet, mobilefacenet or vit; name the module that "
        f"returns it, one of {', '.join(dict(network.named_children()))} or inside one"
    )


def _ir_places(body: nn.Module) -> tuple[str, ...]:
    """The last units of an IR network's stages, the last stage first."""
    units = dict(body.named_children())
    starts = [
        place
        for place, unit in enumerate(units.values())
        if any(isinstance(each, nn.Conv2d) and max(each.stride) > 1 for each in unit.modules())
    ]
    names = list(units)
    return tuple(f"body.{names[place - 1]}" for place in (len(units), *reversed(starts[1:])))


def _has(network: nn.Module, path: str) -> bool:
    try:
        network.get_submodule(path)
    except AttributeError:
        return False
    return True


def map_shape(network: nn.Module, place: MapPlace, size: int) -> tuple[int, int, int]:
    """The shape (C, H, W) of a network's map, from running it once on an empty image; nothing in it changes."""
    found: list[Tensor] = []
    weight = next(network.parameters(), torch.empty(0))
    handle = place.watch(network, found.append)
    try:
        with evaluating(network):
            network(torch.zeros(2, 3, size, size, device=weight.device))
    except ConfigError:
        raise
    # Anybody's code: whatever it raises, it was this image that it could not take.
    except Exception as error:
        kind = type(network).__name__
        raise ConfigError(f"{kind} cannot be run on {size}x{size} images: {first_line(error)}") from error
    finally:
        handle.remove()
    if len(found) != 1 or found[0].shape[0] != 2:
        raise ConfigError(
            f"{type(network).__name__} passes {len(found)} times through {place} in one run; wanted one map for each "
            "image"
        )
    channels, height, width = found[0].shape[1:]
    return channels, height, width
