"""mxnet, the oracle of the data tests."""

from types import ModuleType

import pytest

from tests.mxnet_oracle import import_mxnet


@pytest.fixture(scope="session")
def mxnet() -> ModuleType:
    """The mxnet package with its RecordIO; skips where it does not install."""
    return import_mxnet()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep mxnet's own deprecation warnings from failing the tests that call it."""
    for item in items:
        if "mxnet" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.filterwarnings("ignore::DeprecationWarning:mxnet"))
