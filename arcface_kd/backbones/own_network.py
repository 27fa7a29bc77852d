"""Networks of the user's own: python:MODULE:FUNCTION."""

import importlib
from collections.abc import Callable
from typing import cast

from torch import nn

from arcface_kd.backbones.face_backbone import FaceBackbone
from arcface_kd.errors import ConfigError, first_line

OWN = "python:"
"""What the name of a user's own network begins with: ``python:MODULE:FUNCTION``."""


def find_own_network(name: str) -> Callable[..., nn.Module]:
    """Import the function that builds a user's own network, ``python:MODULE:FUNCTION``.

    The module is imported, and so run. The function takes ``num_features`` (the embedding size D) and ``fp16`` by name
    and returns any ``nn.Module`` that maps (B, 3, 112, 112) RGB images in [-1, 1] to (B, D) embeddings. A ConfigError
    names another form, a module that cannot be imported, or one without such a function.
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


def build_own_network(name: str, *, fp16: bool, num_features: int) -> FaceBackbone:
    """Build a user's own network, see `find_own_network`."""
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
