from types import ModuleType

import pytest

from tests.mxnet_oracle import import_mxnet


@pytest.fixture(scope="session")
def mxnet() -> ModuleType:
    return import_mxnet()
