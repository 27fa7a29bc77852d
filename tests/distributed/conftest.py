"""The one pool of ranks of a test session."""

from collections.abc import Iterator

import pytest

from tests.distributed.pool import RankPool


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Up to four gloo processes."""
    pool = RankPool()
    yield pool
    pool.close()
