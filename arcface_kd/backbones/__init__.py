"""Networks that embed aligned faces, by arcface_torch's names or by a Python function of the user's own."""

import importlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import cast

from torch import nn

from arcface_kd.backbones.face_backbone import FaceBackbone
from arcface_kd.backbones.iresnet import IResNet
from arcface_kd.backbones.mobilefacenet import MobileFaceNet, NarrowMobileFaceNet
from arcface_kd.backbones.thin_resnet import ThinResNet
from arcface_kd.errors import ConfigError, first_line

__all__ = ["NETWORKS", "OWN", "FaceBackbone", "find_own_network", "get_backbone"]

OWN = "python:"
"""What the name of a user's own network begins with: ``python:MODULE:FUNCTION``."""

_WITH_DROPOUT: Mapping[str, Callable[..., FaceBackbone]] = {
    "r18": partial(IResNet, (2, 2, 2, 2)),
    "r34": partial(IResNet, (3, 4, 6, 3)),
    "r50": partial(IResNet, (3, 4, 14, 3)),
    "r100": partial(IResNet, (3, 13, 30, 3)),
    "r200": partial(IResNet, (6, 26, 60, 6)),
    "thin_r18": ThinResNet,
    "thin_r10": partial(ThinResNet, (16, 32, 64, 96), 1),
}
_WITHOUT_DROPOUT: Mapping[str, Callable[..., FaceBackbone]] = {
    "mbf": partial(MobileFaceNet, (1, 4, 6, 2), 2),
    "mbf_large": partial(MobileFaceNet, (2, 8, 12, 4), 4),
    "mobilefacenet": NarrowMobileFaceNet,
}
NETWORKS: Mapping[str, Callable[..., FaceBackbone]] = {**_WITH_DROPOUT, **_WITHOUT_DROPOUT}
"""Each network's name and what builds it, with the keywords ``fp16`` and ``num_features``."""


def find_own_network(name: str) -> Callable[..., nn.Module]:
    """Import the function that builds a user's own network.

    Args:
        name: ``python:MODULE:FUNCTION``. The module is imported, and so run; the function takes ``num_features`` (the
            embedding size D) and ``fp16`` by name and returns a module that maps (B, 3, 112, 112) RGB images in
            [-1, 1] to (B, D) embeddings.

    Returns:
        The function. What it builds may be any ``nn.Module``.

    Raises:
        ConfigError: another form, a module that cannot be imported, or one without such a function.
    """
    module, _, function = name.removeprefix(OWN).partition(":")
    if not module or not function:
        raise ConfigError(f"network {name!r}: wanted python:MODULE:FUNCTION, such as python:my_networks:tiny")
    try:
        build: Callable[..., nn.Module] = getattr(importlib.import_module(module), function)
    # The module is the user's: importing it may raise anything.
    except Exception as error:
        raise ConfigError(
            f"network {name!r} cannot be imported: {first_line(error)}; is its folder on PYTHONPATH?"
        ) from error
    if not callable(build):
        raise ConfigError(f"network {name!r}: {function} is a {type(build).__name__}, wanted a function")
    return build


def _build_own(name: str, *, fp16: bool, num_features: int) -> FaceBackbone:
    build = find_own_network(name)
    try:
        network = build(fp16=fp16, num_features=num_features)
    except Exception as error:
        raise ConfigError(
            f"network {name!r} cannot be built with fp16={fp16}, num_features={num_features}: {first_line(error)}"
        ) from error
    if not isinstance(network, nn.Module):
        raise ConfigError(f"network {name!r} builds a {type(network).__name__}, wanted an nn.Module")
    # Callers by name get what the name says; who allows own names asks for no more than a module.
    return cast(FaceBackbone, network)


def get_backbone(name: str, *, dropout: float = 0.0, fp16: bool = False, num_features: int = 512) -> FaceBackbone:
    """Build a network with fresh weights.

    Args:
        name: one of ``NETWORKS``. ``r18 r34 r50 r100 r200 mbf mbf_large`` have arcface_torch's parameters,
            ``mobilefacenet`` AdaDistill's (64 and 128 channels), ``thin_r18`` and ``thin_r10`` are the
            demo's teacher and student. ``python:MODULE:FUNCTION`` is a network of the user's own, see
            `find_own_network`.
        dropout: probability of dropping a value before the embedding layer, in [0, 1); MobileFaceNets have none.
        fp16: autocast of the convolutions, float16 on GPUs and bfloat16 on CPUs; the embedding layer is float32.
        num_features: embedding size D, at least 1.

    Returns:
        The network, in training mode: (B, 3, 112, 112) RGB images in [-1, 1] to (B, D) embeddings, not normalised. A
        user's own may be any ``nn.Module``.

    Raises:
        ConfigError: an unknown name, a dropout out of range or for a network without one, an embedding size below 1, an
            own network that cannot be imported or built.
    """
    if name not in NETWORKS and not name.startswith(OWN):
        raise ConfigError(f"no network named {name!r}; there are: {', '.join(NETWORKS)}, and python:MODULE:FUNCTION")
    if isinstance(num_features, bool) or not isinstance(num_features, int) or num_features < 1:
        raise ConfigError(f"embedding size {num_features!r}: wanted a whole number of at least 1, such as 512")
    if not 0 <= dropout < 1:
        raise ConfigError(f"dropout {dropout!r}: wanted a probability of at least 0 and below 1")
    if name in _WITH_DROPOUT:
        return _WITH_DROPOUT[name](dropout=dropout, fp16=fp16, num_features=num_features)
    if dropout:
        raise ConfigError(
            f"dropout {dropout!r}: {name} has no dropout layer; set dropout to 0 or take one of "
            f"{', '.join(_WITH_DROPOUT)}"
        )
    build = partial(_build_own, name) if name.startswith(OWN) else _WITHOUT_DROPOUT[name]
    return build(fp16=fp16, num_features=num_features)
