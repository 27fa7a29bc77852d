"""Standard output whose reader is gone, and libraries that say too much."""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator


def flush_or_stop() -> None:
    """Print what waits in the buffer, or nothing more: Python would end with a traceback over it."""
    try:
        sys.stdout.flush()
    except OSError:
        stop_printing()


def stop_printing() -> None:
    """Send standard output to the null device from now on: its reader is gone, or its disk is full."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


@contextlib.contextmanager
def errors_only(name: str | None) -> Iterator[None]:
    """Silence everything below ERROR, for a while.

    Args:
        name: of the logger; None for the root logger, which some libraries log to.
    """
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
