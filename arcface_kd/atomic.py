"""Files that are either old or new, never torn."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


def _sync_folder(folder: Path) -> None:
    """Make a rename inside ``folder`` durable, where the platform can open a folder."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Open a binary file that replaces ``path`` in one step when the block ends without an error.

    The bytes go to a temporary file in the same folder, are synced to disk and renamed over ``path``. If the block
    raises, ``path`` stays as it was and the temporary file is removed.

    Args:
        path: the file to write; its folder must exist.

    Yields:
        The open temporary file.

    Raises:
        OSError: the folder is missing, read-only or full; ``path`` is untouched.
    """
    target = Path(path)
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        # mkstemp makes files private; a model or a data set is read by colleagues like any other file.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(target)
        _sync_folder(target.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
