"""Atomic writes, file locks, and opening regular files only."""

import contextlib
import errno
import glob
import logging
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from filelock import FileLock, Timeout

from arcface_kd.errors import ConfigError

logger = logging.getLogger(__name__)


def _sync_folder(folder: Path) -> None:
    """Make a rename inside ``folder`` durable, where the platform can open a folder."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock_file(descriptor: int, *, wait: bool) -> bool:
    """Take an open file for this process, where the system and the file system can lock.

    Args:
        descriptor: of the file, which keeps the lock until it and its duplicates are closed.
        wait: whether to wait for another process that has it.

    Returns:
        Whether it is taken: not where nothing can be locked, nor, without waiting, where another process has it.
    """
    try:
        import fcntl
    except ImportError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _remove_remains(target: Path) -> None:
    """Remove temporary files of ``target`` whose writers were killed: nobody holds their locks any more."""
    # The pattern's own dot finds hidden files.
    for name in glob.glob(f".{glob.escape(target.name)}.*.part", root_dir=target.parent):
        with contextlib.suppress(OSError):
            descriptor = os.open(target.parent / name, os.O_RDWR)
            try:
                if lock_file(descriptor, wait=False):
                    os.unlink(target.parent / name)
            finally:
                os.close(descriptor)


def _make_temporary(target: Path) -> tuple[int, Path]:
    while True:
        descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
        # Before it is locked, another process may take it for a remain, lock it and remove it.
        lock_file(descriptor, wait=True)
        if os.path.exists(name):
            return descriptor, Path(name)
        os.close(descriptor)


def _name(error: BaseException, target: Path, temporary: Path | None = None) -> None:
    """Let an error of the system say which file it is about, where it names none or the temporary one."""
    if not isinstance(error, OSError) or error.errno is None:
        return
    if temporary is None or error.filename in (None, os.fspath(temporary)):
        error.filename = os.fspath(target)


def replace_file(source: Path, target: Path) -> None:
    """Move a whole, synced file over another one in the same folder, so that no failure of power undoes it."""
    source.replace(target)
    _sync_folder(target.parent)


def require_folder_of(path: Path) -> None:
    """Refuse a file whose folder is not there, before anything is done that the file is for."""
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"{path}: there is no folder {path.parent}; make it first")


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Open a binary file that replaces ``path`` in one step when the block ends without an error.

    The bytes go to a temporary file in the same folder, are synced to disk and renamed over ``path``. If the block
    raises, ``path`` stays as it was and the temporary file is removed; that of a killed process is removed by the next
    one that writes ``path``.
    """
    target = Path(path)
    try:
        _remove_remains(target)
        descriptor, temporary = _make_temporary(target)
    except OSError as error:
        _name(error, target)
        raise
    try:
        with contextlib.ExitStack() as stack:
            if os.name != "nt":  # which locks nothing, and renames no open file
                # Unlocked before it is in place, it would be taken for a remain.
                stack.callback(os.close, os.dup(descriptor))
            with os.fdopen(descriptor, "wb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            # mkstemp makes files private; a model or a data set is read by colleagues like any other file.
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)
            replace_file(temporary, target)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        _name(error, target, temporary)
        raise


def open_regular(path: str | os.PathLike[str]) -> IO[bytes]:
    """Open a file for reading; folders, pipes, sockets and devices are refused, links are followed."""
    # Without O_NONBLOCK the very opening of a pipe waits for somebody to write to it; regular files do not mind it.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    raise OSError(errno.EINVAL, "it is no regular file", os.fspath(path))


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Keep other processes out of a run's folder: a second start, or ranks that a killed job has left.

    The lock ends with its process, however that ends; its forked children do not hold it. On a file system that cannot
    lock, as NFS without its lock service, a warning says so.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(FileLock(folder / ".lock").acquire(blocking=False))
        except Timeout:
            raise ConfigError(
                f"another run is writing to {folder}: wait for it or end its processes, or give another output"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
                raise
            logger.warning("%s cannot be locked (%s): start no second run in it", folder, error.strerror)
        yield


def reserve_space(stream: IO[bytes], size: int) -> None:
    """Fill a file with zeros and reserve its room on the disk, where the file system can."""
    stream.truncate(0)
    try:
        os.posix_fallocate(stream.fileno(), 0, size)
    except AttributeError:  # macOS and Windows have no such call
        stream.truncate(size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise
        stream.truncate(size)
    os.fsync(stream.fileno())
