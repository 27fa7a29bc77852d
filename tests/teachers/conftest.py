from pathlib import Path
from types import ModuleType

import pytest

from arcface_kd.data.formats.verification_bin import VerificationSet, read_bin
from tests.mxnet_oracle import import_mxnet


@pytest.fixture(scope="session")
def mxnet() -> ModuleType:
    return import_mxnet()


@pytest.fixture(scope="session")
def some_pairs(real_data: Path) -> VerificationSet:
    """Every eighth pair of ``lfw_dev.bin``; `arcface-kd eval` takes them all in a minute of a whole machine."""
    pairs = read_bin(real_data / "faces_real" / "lfw_dev.bin")
    chosen = range(0, len(pairs.is_same), 8)
    images = [image for number in chosen for image in pairs.images[2 * number : 2 * number + 2]]
    return VerificationSet(pairs.name, images, pairs.is_same[::8])
