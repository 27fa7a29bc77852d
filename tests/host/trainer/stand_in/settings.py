"""The stand-in's way to its configs: the base first, then the named module, merged into the base's own object."""

import importlib
from pathlib import PurePosixPath

from easydict import EasyDict


def get_config(config_file: str) -> EasyDict:
    """Import ``configs.base`` and ``configs.NAME`` and merge them."""
    path = PurePosixPath(config_file)
    if path.parts[0] != "configs":
        raise ValueError(f"{config_file} must start with configs/")
    merged: EasyDict = importlib.import_module("configs.base").config
    merged.update(importlib.import_module(f"configs.{path.stem}").config)
    if merged.output is None:
        merged.output = f"work_dirs/{path.stem}"
    return merged
