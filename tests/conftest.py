"""Fixtures that every test may use, and what a run of the tests leaves out and why."""

import importlib.util
import os
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import settings

from tests.host.trainer.faces import Faces, draw_faces

# No test depends on the clock.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")


def pytest_report_header() -> list[str]:
    """Say what is left out and what the marks need, also where it is missing."""
    with_timm = importlib.util.find_spec("timm") and importlib.util.find_spec("torchvision")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("timm", "torchvision")) if with_timm else ""
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device: skipped"
    folders = {"real": "ARCFACE_KD_REAL_DATA", "trainer": "ARCFACE_TORCH"}
    return [
        "left out: tests/campaigns (kills, fuzzing, full disks), unless named; run by `make campaigns`",
        *(
            f"mark {mark}: {variable}={os.environ.get(variable) or '(not set: skipped)'}"
            for mark, variable in folders.items()
        ),
        f"mark timm: {versions or 'timm is not installed: skipped; run by `make test-timm`'}",
        f"mark gpu: {cuda}",
    ]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Campaigns are run by name only."""
    if collection_path.name == "campaigns" and not any("campaigns" in argument for argument in config.args):
        return True
    return None


def _folder_from(variable: str, what: str) -> Path:
    value = os.environ.get(variable)
    if not value:
        pytest.skip(f"{variable} is not set: it names {what}")
    folder = Path(value).resolve()
    if not folder.is_dir():
        pytest.fail(f"{variable}={value} is not a folder; it should name {what}")
    return folder


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with ``faces_real`` and ``teachers``."""
    return _folder_from("ARCFACE_KD_REAL_DATA", "a folder with faces_real/ and teachers/")


@pytest.fixture(scope="session")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Faces:
    """Six people with eight images each, and pairs; nobody writes to the folder."""
    return draw_faces(tmp_path_factory.mktemp("faces"), identities=6, images=8)


@pytest.fixture(scope="session")
def arcface_torch() -> Path:
    """A checkout of the host trainer, never written to: tests copy it."""
    return _folder_from("ARCFACE_TORCH", "a checkout of insightface/recognition/arcface_torch")


@pytest.fixture(scope="session")
def timm() -> ModuleType:
    """The real timm.

    torchvision's wheels on the package index are built for CUDA. Beside a torch for CPUs their compiled operators,
    which no network here uses, cannot be loaded, and torchvision imports only where two of them are declared.
    """
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed: run make test-timm")
    if torch.version.cuda is None and "+cu" in _torchvision_build():
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)
    return importlib.import_module("timm")


# A library's operators are gone with it.
_declared: list[torch.library.Library] = []


def _torchvision_build() -> str:
    """``0.28.0+cu130``, read without importing what may not import."""
    spec = importlib.util.find_spec("torchvision")
    assert spec is not None, "timm needs torchvision"
    assert spec.submodule_search_locations is not None
    return (Path(spec.submodule_search_locations[0]) / "version.py").read_text()
