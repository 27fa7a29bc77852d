"""A plug-in of pytest that runs one share of the tests, and writes each outcome at once.

What was known when a run is ended is then known, and several processes share what takes one of them too long: each test
compiles kernels.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest

SHARE = "ARCFACE_KD_SHARE"
"""Environment: which share of how many, and the file of the outcomes: ``2/8:FILE``."""


def _share() -> tuple[int, int, Path]:
    share, _, file = os.environ[SHARE].partition(":")
    number, of = map(int, share.split("/"))
    return number, of, Path(file)


# Behind the hook of pytest's that leaves out what is not marked.
@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Keep a share: neighbours, which compile the same kernels."""
    number, of, _ = _share()
    items[:] = items[number * len(items) // of : (number + 1) * len(items) // of]


def pytest_runtest_logreport(report: Any) -> None:
    """Write a line for each test, and for what fails before or behind it."""
    if report.when != "call" and report.passed:
        return
    said = report.longreprtext.strip().splitlines()
    line = {"test": report.nodeid, "outcome": report.outcome, "said": said[-1] if said else ""}
    with _share()[2].open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(line) + "\n")
