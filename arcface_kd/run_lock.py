"""One run in a folder at a time."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from arcface_kd.errors import ConfigError

_HELD = (errno.EACCES, errno.EAGAIN)


@contextmanager
def run_lock(file: Path) -> Iterator[None]:
    """Keep other processes from a run's folder, such as a second start, or ranks that a killed ``torchrun`` has left.

    The lock is the process's own: it ends with it, however that ends, and what it forks does not hold it. Where the
    system or the file system cannot lock, there is none.

    Args:
        file: in the folder; made if it is missing. Nobody else in this process may close it meanwhile.

    Raises:
        ConfigError: another process holds the lock.
        OSError: the file cannot be made.
    """
    with open(file, "ab") as stream:
        try:
            import fcntl

            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            pass
        except OSError as error:
            if error.errno in _HELD:
                raise ConfigError(
                    f"another run is writing to {file.parent}: wait for it or end its processes, or give another output"
                ) from error
        yield
