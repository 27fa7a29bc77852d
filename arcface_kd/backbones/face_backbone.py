"""Base of all backbones: convolutions up to a feature map, then a tail that turns the map into an embedding."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import cast

import torch
from torch import Tensor, nn

from arcface_kd.errors import ConfigError

_WIDEST = 16


def check_width(width: float) -> float:
    """A network's width over that of its paper; a ConfigError where it is not above 0, or above 16."""
    if not 0 < width <= _WIDEST:
        raise ConfigError(f"width={width!r}: wanted more than 0 and at most {_WIDEST}")
    return width


def initialize_by_fan_out(network: nn.Module, *kinds: type[nn.Module]) -> None:
    """He's initialisation by fan-out of the weights of some kinds of layers; without kinds, of those that multiply."""
    for module in network.modules():
        if isinstance(module, kinds or (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")  # type: ignore[arg-type]


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients meanwhile; afterwards every module is in the mode it was in."""
    training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


class FaceBackbone(nn.Module):
    """A network that embeds aligned 112x112 faces: subclasses build their layers, ``feature_map`` and ``tail``.

    With ``fp16`` convolutions are under autocast, float16 on GPUs and bfloat16 on CPUs; the embedding layer is float32.
    """

    def __init__(self, *, fp16: bool) -> None:
        super().__init__()
        self.fp16 = fp16

    @staticmethod
    def autocast(tensor: Tensor, *, half: bool) -> AbstractContextManager[object]:
        """The context for layers that see ``tensor``; ``half`` says whether these layers leave float32.

        ``half=False`` means float32 even inside a surrounding ``torch.autocast``, as in arcface_torch: a network's
        precision is its own ``fp16`` and nothing else. Devices without autocast (``meta``) never leave it.
        """
        if not torch.amp.is_autocast_available(tensor.device.type):
            return nullcontext()
        dtype = torch.bfloat16 if tensor.device.type == "cpu" else torch.float16
        return torch.autocast(tensor.device.type, dtype=dtype, enabled=half)

    def feature_map(self, images: Tensor) -> Tensor:
        """The map (B, C, H, W) that the tail sees; (B, 512, 7, 7) in arcface_torch's networks."""
        raise NotImplementedError

    def tail(self, feature_map: Tensor) -> Tensor:
        """Turn a feature map into embeddings (B, D), not normalised."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        """Embed faces (B, 3, 112, 112), RGB in [-1, 1], as (B, D), not normalised."""
        return self.tail(self.feature_map(images))


class ResidualBackbone(FaceBackbone):
    """Base of networks that end in batch norm, dropout, fully connected layer and batch norm, as arcface_torch's do.

    ``features.weight`` (the scale of the embedding's batch norm) stays 1 and is not trained.
    """

    def add_tail(self, channels: int, side: int, dropout: float, num_features: int) -> None:
        """Add the layers behind a map (B, channels, side, side)."""
        self.bn2 = nn.BatchNorm2d(channels)
        self.dropout = nn.Dropout(dropout, inplace=True)
        self.fc = nn.Linear(channels * side**2, num_features)
        self.features = nn.BatchNorm1d(num_features)
        self.features.weight.requires_grad_(False)

    def tail(self, feature_map: Tensor) -> Tensor:
        """Batch norm, dropout, fully connected layer, batch norm: (B, C, H, W) to (B, D)."""
        with self.autocast(feature_map, half=self.fp16):
            flat = self.dropout(torch.flatten(self.bn2(feature_map), 1))
        with self.autocast(feature_map, half=False):
            return cast(Tensor, self.features(self.fc(flat.float() if self.fp16 else flat)))
