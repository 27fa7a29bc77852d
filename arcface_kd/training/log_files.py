"""Where log messages go: ``training.log``, stdout and stderr."""

import contextlib
import logging
import sys
from collections.abc import Iterator, Sequence
from logging.handlers import MemoryHandler
from pathlib import Path

from arcface_kd.system.console import stop_printing

LOG_FILE = "training.log"

_NEVER = logging.CRITICAL + 1


class _LogFile(logging.FileHandler):
    """The log file; a full disk ends the run, as for any other of its files."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Raise the error, which ``logging`` would only print."""
        raise


# Before Python 3.11 a handler takes no type in brackets.
class _Screen(logging.StreamHandler):  # type: ignore[type-arg]
    """The log on stdout; a reader who is gone does not end the run."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Stop printing, where ``logging`` would print a traceback for each line."""
        if isinstance(sys.exc_info()[1], OSError):
            stop_printing()
        else:
            super().handleError(record)


@contextlib.contextmanager
def early_messages() -> Iterator[Sequence[logging.LogRecord]]:
    """Keep messages that come before the log file is open; on an error, print the warnings among them."""
    logger = logging.getLogger("arcface_kd")
    before = logger.level
    logger.setLevel(logging.INFO)
    # Never flushed: its buffer is read.
    handler = MemoryHandler(sys.maxsize, _NEVER, flushOnClose=False)
    logger.addHandler(handler)
    try:
        yield handler.buffer
    except BaseException:
        for record in handler.buffer:
            if logging.lastResort is not None and record.levelno >= logging.WARNING:
                logging.lastResort.handle(record)
        raise
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


@contextlib.contextmanager
def log_files(folder: Path, rank: int, early: Sequence[logging.LogRecord] = ()) -> Iterator[None]:
    """Send log messages to ``training.log`` in the host's format, and to stdout where stderr is no terminal.

    Warnings of other ranks, and warnings beside a progress bar, go to stderr. ``early`` records come first.
    """
    logger = logging.getLogger("arcface_kd")
    before = logger.level, logger.propagate
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    form = "Training: %(asctime)s-%(message)s"
    handlers: list[logging.Handler] = []
    if rank == 0:
        handlers.append(_LogFile(folder / LOG_FILE))
    if rank == 0 and not sys.stderr.isatty():
        handlers.append(_Screen(sys.stdout))
        handlers[-1].setLevel(logging.INFO)
    else:
        handlers.append(logging.StreamHandler(sys.stderr))
        handlers[-1].setLevel(logging.WARNING)
        form = form if rank == 0 else f"Rank {rank}: %(asctime)s-%(message)s"
    for handler in handlers:
        handler.setFormatter(logging.Formatter(form))
        logger.addHandler(handler)
    try:
        for record in early:
            logger.handle(record)
        yield
    finally:
        for handler in handlers:
            logger.removeHandler(handler)
            handler.close()
        logger.setLevel(before[0])
        logger.propagate = before[1]
