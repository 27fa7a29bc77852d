"""The host's own networks, imported from a checkout without writing into it."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def host_backbones(arcface_torch: Path) -> ModuleType:
    """The checkout's package ``backbones``."""
    folder = arcface_torch / "backbones"
    spec = importlib.util.spec_from_file_location(
        "host_backbones", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "dont_write_bytecode", True)
        sys.modules["host_backbones"] = package
        spec.loader.exec_module(package)
        importlib.import_module("host_backbones.mobilefacenet")
    return package
