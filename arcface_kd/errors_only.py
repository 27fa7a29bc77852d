"""Keeping a library's advice off the terminal."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def errors_only(name: str | None) -> Iterator[None]:
    """Let a logger tell errors and nothing less, for a while.

    Args:
        name: of the logger; None for the root logger, through which some libraries speak.
    """
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
