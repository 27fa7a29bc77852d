"""Console output: messages on one line, closed pipes, and libraries that log too much."""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator

_LONGEST_MESSAGE = 4000


def flush_or_stop() -> None:
    """Flush standard output, or stop printing: Python would end with a traceback."""
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
    """Silence everything below ERROR of a logger, for a while; None is the root logger."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def printable(message: object) -> str:
    """A message on one line; names of files could otherwise write to the terminal at will."""
    text = " ".join(str(message).split())
    text = text if len(text) <= _LONGEST_MESSAGE else f"{text[:_LONGEST_MESSAGE]}..."
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)
