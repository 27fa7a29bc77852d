"""Errors for users: each names what was found, what was wanted and what to do.

The command line prints them as one line and ends with exit code 2; anything else that escapes is a fault of ours.
"""

import difflib
import re
from collections.abc import Iterable
from typing import Literal


class ArcfaceKDError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(ArcfaceKDError, ValueError):
    """A key, an option or a combination of them that cannot be run."""


class DataError(ArcfaceKDError, ValueError):
    """A record, an index, a verification set or an image that is not what it should be."""


class BadRecordError(DataError):
    """One record or image of an otherwise good data set that cannot be read; a run may pass over it when asked to."""


class CheckpointError(ArcfaceKDError, ValueError):
    """A run's checkpoints that are missing, cannot be read or do not belong together."""


class NumberError(ArcfaceKDError, ArithmeticError):
    """A number, NaN as a rule, that a run cannot go on with; the message says what, when and in which records."""


class RankError(ArcfaceKDError, RuntimeError):
    """A rank that cannot go on because another one has failed or does not answer."""


class ResourceError(ArcfaceKDError, OSError):
    """Memory, room on a disk or a process that the machine did not give."""


class TeacherError(ArcfaceKDError, ValueError):
    """A teacher that is missing, cannot be read or does not fit the run."""


def suggestion(name: str, known: Iterable[str], prefix: str = "") -> str:
    """The end of a message about an unknown name: ``; did you mean 'x'?`` where a known name is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {prefix + close[0]!r}?" if close else ""


OnBadRecord = Literal["stop", "skip"]


def first_line(error: BaseException) -> str:
    """A foreign exception's message on one line without a terminal's codes, cut to whole sentences or words."""
    text = " ".join(re.sub(r"\x1b\[[\d;]*[A-Za-z]", "", str(error)).split()) or type(error).__name__
    if len(text) <= 240:
        return text
    sentences = text[:240].rpartition(". ")[0]
    return f"{sentences}." if sentences else f"{text[:237].rpartition(' ')[0] or text[:237]}..."
