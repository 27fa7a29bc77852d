"""Fixtures that every test may use: where real data and the real host are, and why they are missing."""

import os
import time
from pathlib import Path

import pytest

_BEGAN = time.monotonic()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leave slow tests out, and say so, once the minutes that CI has for them are over."""
    minutes = float(os.environ.get("ARCFACE_KD_SLOW_MINUTES", "inf"))
    if item.get_closest_marker("slow") is not None and time.monotonic() - _BEGAN > 60 * minutes:
        pytest.skip(f"no time left: ARCFACE_KD_SLOW_MINUTES={minutes:g} are over")


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
