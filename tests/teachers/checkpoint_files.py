"""Checkpoints for tests."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def saved(folder: Path, content: object, name: str = "model.pt", **options: Any) -> Path:
    """Write a file as ``torch.save`` does, and return it."""
    path = folder / name
    torch.save(content, path, **options)
    return path


def prefixed(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The same tensors behind a prefix."""
    return {prefix + name: tensor for name, tensor in state.items()}
