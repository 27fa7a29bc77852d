"""Opening files that somebody else has put there: a pipe would wait for ever, and a device has no end."""

import errno
import os
import stat
from typing import IO


def open_regular(path: str | os.PathLike[str]) -> IO[bytes]:
    """Open a file for reading if it is one; symbolic links are followed.

    Args:
        path: the file.

    Returns:
        The open file, binary.

    Raises:
        OSError: it is missing, may not be read, or is a folder, a pipe, a socket or a device.
    """
    # Without O_NONBLOCK the very opening of a pipe waits for somebody to write to it; regular files do not mind it.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    raise OSError(errno.EINVAL, "it is no regular file", os.fspath(path))
