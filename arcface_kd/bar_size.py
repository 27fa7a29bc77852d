"""The size of progress bars."""

import os
import shutil
import sys
from typing import Any

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
