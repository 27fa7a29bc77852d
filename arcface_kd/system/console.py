"""Standard streams that are closed, or that nobody reads any more: a run of days does not end over what it prints."""

import contextlib
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def open_closed_streams() -> None:
    """Let what is printed to a stream that was closed before the start (``2>&-``) go nowhere.

    Otherwise the next file that is opened, a checkpoint or a cache, takes the stream's number, and with it what
    libraries print to that number.
    """
    for descriptor, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(descriptor)
        except OSError:
            # The lowest number that is free, which is this one: those below it are open by now.
            os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


def flush_or_stop() -> None:
    """Print what waits to be, or nothing more: Python would end with a traceback over it."""
    try:
        sys.stdout.flush()
    except OSError:
        stop_printing()


def stop_printing() -> None:
    """Let all that is still printed to standard output go nowhere: whoever has read it is gone, or its disk is full."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


_ASSUMED = (120, 24)


def bar_size() -> dict[str, Any]:
    """Keywords that make ``tqdm`` fit the terminal, and keep it from showing nothing on one that gives no size.

    The terminals of ``docker run -t`` and of ``script`` in a job that nobody watches have 0 columns and 0 rows.

    Returns:
        ``dynamic_ncols``, or ``ncols`` and ``nrows``: those of ``COLUMNS`` and ``LINES``, else 120 and 24.
    """
    try:
        unknown = 0 in os.get_terminal_size(sys.stderr.fileno())
    # No terminal, or a stream that is none of the system's.
    except (OSError, ValueError, AttributeError):
        unknown = False
    if not unknown:
        return {"dynamic_ncols": True}
    columns, rows = shutil.get_terminal_size(_ASSUMED)
    return {"ncols": columns, "nrows": rows}


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
