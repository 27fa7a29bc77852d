"""The files that commit a44a264 has left, unpacked for each test.

They were made by ``tests/compatibility/record.py`` of commit 42a99fc, which runs in a checkout of a44a264 only:
``git show 42a99fc:tests/compatibility/record.py``. The losses of GKD are those of commit 665d537, which changed its
groups on purpose.
"""

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests.compatibility.runs import add_network

FILES = Path(__file__).with_name("files")


@pytest.fixture(scope="session")
def recorded() -> dict[str, Any]:
    """What came out of the runs of that commit, and what it could be asked for."""
    result: dict[str, Any] = json.loads((FILES / "a44a264.json").read_text(encoding="utf-8"))
    return result


def unpack(folder: Path) -> Path:
    """Put records, teachers, caches, runs and configs into a folder."""
    with tarfile.open(FILES / "a44a264.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The unpacked files as the working folder, with the tiny network among those that the package knows."""
    add_network(monkeypatch.setitem)
    monkeypatch.chdir(unpack(tmp_path))
    return tmp_path
