"""Standard streams that are closed, or that nobody reads any more: a run of days does not end over what it prints."""

import contextlib
import os
import sys


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
