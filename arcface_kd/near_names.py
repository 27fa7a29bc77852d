"""The name that was probably meant, for messages about one that nobody knows."""

import difflib
from collections.abc import Iterable


def suggestion(name: str, known: Iterable[str], prefix: str = "") -> str:
    """The end of a message about an unknown name.

    Args:
        name: what was met.
        known: what there is.
        prefix: what a known name is written behind, such as ``teacher.``.

    Returns:
        ``; did you mean 'x'?`` where a known name is close, an empty string elsewhere.
    """
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {prefix + close[0]!r}?" if close else ""
