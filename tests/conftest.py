"""Fixtures that every test may use, and what a run of the tests leaves out and why."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# No test depends on the clock.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")


def pytest_report_header() -> list[str]:
    """Say what is left out and what the marks need, also where it is missing."""
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device: skipped"
    folders = {"real": "ARCFACE_KD_REAL_DATA", "trainer": "ARCFACE_TORCH"}
    return [
        "left out: tests/campaigns (kills, fuzzing, full disks), unless named; run by `make campaigns`",
        *(
            f"mark {mark}: {variable}={os.environ.get(variable) or '(not set: skipped)'}"
            for mark, variable in folders.items()
        ),
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
def arcface_torch() -> Path:
    """A checkout of the host trainer, never written to: tests copy it."""
    return _folder_from("ARCFACE_TORCH", "a checkout of insightface/recognition/arcface_torch")
