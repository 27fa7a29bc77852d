"""The cache: the teacher's embeddings of every image, plain and mirrored, in a file; after one epoch it is full.

Training shows the teacher each image plain or mirrored and nothing else, so two embeddings an image replace it. A cache
is two files: FILE, fp16 numbers (images, 2, D), and FILE.json, the header, which says whose embeddings these are. Rows
are unit vectors, rounded to fp16: within 2.5e-4 of the teacher's own. MS1MV2 (5,822,653 images) at 512 dimensions takes
11.9 GB.

Numbers are kept with all bits inverted, so that the zeros of a new file read as NaN. A row that is no unit vector,
because a killed process left half of it or a disk damaged it, counts as missing. The header is written last: FILE
without it was never finished, and the next run finishes it if it holds nothing but zeros. The space is reserved when
the file is made, where the file system can, so that a full disk shows then.

All processes of a machine may fill one file at once: two that find the same row missing write the same numbers. On a
network file system, several machines that write one file may overwrite each other's neighbouring rows with zeros or see
them late: such rows count as missing and are made again, never wrong.
"""

import contextlib
import errno
import json
import os
import shlex
import shutil
import weakref
from collections.abc import Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import IO, Any, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from arcface_kd.errors import TeacherError
from arcface_kd.system.files import atomic_write, lock_file, reserve_space
from arcface_kd.teachers.base import Teacher
from arcface_kd.teachers.file_type import describe
from arcface_kd.teachers.options import Precision, TeacherOptions

_FORMAT = 1
_LARGEST_HEADER = 1 << 16
# What each entry of a header is called in messages, in the order in which differences are told.
_ENTRIES = {
    "format": "file format",
    "embedding_size": "embedding size",
    "images": "number of images",
    "data": "data set",
    "preprocessing": "preprocessing",
    "precision": "precision",
    "teacher": "teacher",
}
# Numbers that `blocks` reads at a time: 17 MB of fp16, or 4,096 images of 512 dimensions.
_NUMBERS_AT_ONCE = 1 << 22
_LARGEST_DIMENSION = 1 << 16
_MOST_IMAGES = 1 << 40
# A unit vector in fp16 has a norm within 5e-4 of 1; one with a damaged exponent is far from it.
_NORM_TOLERANCE = 5e-3


def identity_of(teacher: Teacher, data_fingerprint: str, images: int) -> dict[str, object]:
    """What the header of a cache of this teacher and data says."""
    return {
        "format": _FORMAT,
        "teacher": teacher.fingerprint,
        "preprocessing": dict(vars(teacher.preprocessing)),
        "precision": teacher.precision,
        "data": data_fingerprint,
        "images": images,
        "embedding_size": teacher.embedding_size,
        **({"precisions": teacher.precisions} if len(teacher.precisions) > 1 else {}),
    }


def identity_in(
    path: str | os.PathLike[str], data_fingerprint: str, images: int, flags: Sequence[str] = ()
) -> dict[str, object]:
    """Cache identity where no teacher is loaded: the teacher that the header names, and the run's data."""
    return {**header_of(path, flags), "format": _FORMAT, "data": data_fingerprint, "images": images}


def header_of(path: str | os.PathLike[str], flags: Sequence[str] = ()) -> dict[str, Any]:
    """What the header of an existing cache says."""
    path = Path(path).expanduser()
    header = _header_of(path)
    _refuse_special_files(path, header)
    if not header.exists():
        raise TeacherError(_not_there(path, flags))
    try:
        found = _read_header(path, header)
    except OSError as error:
        raise TeacherError(f"the cache {path} cannot be used: {error.strerror or error}") from error
    for name, most in (("embedding_size", _LARGEST_DIMENSION), ("images", _MOST_IMAGES)):
        value = found.get(name)
        if isinstance(value, bool) or not (isinstance(value, int) and 0 < value <= most):
            raise TeacherError(f"{header} has the {_ENTRIES[name]} {_short(value)}; delete it and {path} to start anew")
    return found


def in_cached_precision(
    options: Mapping[str, object] | None, path: str | os.PathLike[str], teachers: int = 1
) -> Mapping[str, object]:
    """The ``teacher.*`` options with the precision of a cache, where they name none and there is a cache.

    The default differs between a CPU and a GPU, and a cache is often filled on the one and read beside the other.

    Args:
        options: by their names without the prefix.
        path: the cache.
        teachers: how many the run names; of several as one, each has a precision of its own.
    """
    given = options or {}
    if TeacherOptions.names_precision(given):
        return given
    try:
        header = header_of(path)
    except TeacherError:
        # Whoever opens the cache says what is wrong with it.
        return given
    if teachers == 1:
        found = {"precision": header.get("precision")}
    else:
        listed = header.get("precisions")
        found = {f"{place}.precision": each for place, each in enumerate(listed if isinstance(listed, list) else [], 1)}
    fits = len(found) == teachers and all(each in get_args(Precision) for each in found.values())
    return {**given, **found} if fits else given


def fill_hint(path: str | os.PathLike[str], flags: Sequence[str] = ()) -> str:
    """The command that fills a cache, for messages."""
    words = flags or ("--kd-teacher", "FILE", "--kd-cache", str(path))
    return f"fill it beforehand with `arcface-kd cache CONFIG {shlex.join(words)}`"


def readable_size(count: float) -> str:
    """A number of bytes with a decimal unit: ``11.9 GB``."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} bytes" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


class EmbeddingCache:
    """Rows of one teacher over one data set.

    Attributes:
        path: the file; its header stands beside it as ``path.json``.
        images: number of images.
        embedding_size: dimension D.
        size: bytes of the file.
        fill_hint: how to fill it, for messages.

    Args:
        path: the file, made if there is none; symbolic links are followed, ``~`` is the home folder.
        identity: from :func:`identity_of` or :func:`identity_in`.
        create: whether to make the file where there is none.
        flags: the run's, for messages.

    Raises:
        TeacherError: the files belong to another teacher or other data (the message says in what they differ), are
            damaged or something else altogether, or there is no room for them; or there are none and ``create`` is off.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        identity: Mapping[str, object],
        *,
        create: bool = True,
        flags: Sequence[str] = (),
    ) -> None:
        self.path = Path(path).expanduser()
        self.fill_hint = fill_hint(self.path, flags)
        # As JSON gives it back: tuples become lists.
        self._identity: dict[str, Any] = json.loads(json.dumps(dict(identity)))
        self.images = int(self._identity["images"])
        self.embedding_size = int(self._identity["embedding_size"])
        self.size = 4 * self.images * self.embedding_size
        self._header = _header_of(self.path)
        try:
            _refuse_special_files(self.path, self._header)
            if not self._header.exists():
                if not create:
                    raise TeacherError(_not_there(self.path, flags))
                if not self.path.parent.is_dir():
                    raise TeacherError(f"the cache {self.path}: there is no folder {self.path.parent}; make it first")
                self._create()
            self._check_header()
            self._check_size()
            self._open()
        except OSError as error:
            raise TeacherError(f"the cache {self.path} cannot be used: {error.strerror or error}") from error

    def _open(self) -> None:
        self._rows = np.memmap(self.path, np.uint16, mode="r", shape=(2 * self.images, self.embedding_size))
        self._file = self._open_for_writing()

    def __getstate__(self) -> dict[str, Any]:
        # A loader's worker opens the file itself.
        return {name: value for name, value in vars(self).items() if name not in ("_rows", "_file")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open()

    @property
    def identity(self) -> Mapping[str, object]:
        """Whose embeddings these are, as the header says it."""
        return self._identity

    @property
    def read_only(self) -> bool:
        """Whether the file cannot be written: a full one serves all the same."""
        return self._file is None

    def _create(self) -> None:
        """Reserve the file under a lock, and write the header when it is there."""
        with self._claimed() as stream:
            if self._header.exists():
                return
            if _holds_anything(stream):
                raise TeacherError(
                    f"{self.path} exists without its header {self._header.name}: name another file for the cache, or "
                    "delete it"
                )
            try:
                reserve_space(stream, self.size)
                with atomic_write(self._header) as header:
                    header.write((json.dumps(self._identity, indent=2) + "\n").encode())
            except OSError as error:
                stream.truncate(0)
                os.unlink(os.path.realpath(self.path))
                free = readable_size(shutil.disk_usage(self.path.resolve().parent).free)
                raise TeacherError(
                    f"no room for the cache {self.path}: {error.strerror or error}; it takes "
                    f"{readable_size(self.size)} ({self.images} images, two views, {self.embedding_size} numbers each) "
                    f"and {free} are free"
                ) from error

    @contextlib.contextmanager
    def _claimed(self) -> Iterator[IO[bytes]]:
        """The file, open and locked against other processes that want to make it."""
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
            with os.fdopen(descriptor, "r+b", buffering=0) as stream:
                lock_file(stream.fileno(), wait=True)
                # Whoever held the lock may have found no room and taken the file away.
                if self.path.exists() and os.path.samestat(os.fstat(stream.fileno()), self.path.stat()):
                    yield stream
                    return

    def _check_header(self) -> None:
        found, wanted = _read_header(self.path, self._header), self._identity
        differing = [
            f"another {called} (it has {_short(found.get(name))}, this run {_short(wanted.get(name))})"
            for name, called in _ENTRIES.items()
            if found.get(name) != wanted.get(name)
        ]
        if differing:
            raise TeacherError(
                f"the cache {self.path} was made for {' and '.join(differing)}: name another file for the cache, or "
                f"delete it and {self._header.name}"
            )

    def _check_size(self) -> None:
        size = self.path.stat().st_size if self.path.exists() else 0
        if size != self.size:
            raise TeacherError(
                f"the cache {self.path} has {size} bytes and should have {self.size}: it is cut short or another file; "
                f"delete it and {self._header.name} to start anew"
            )

    def _open_for_writing(self) -> FileIO | None:
        try:
            stream = FileIO(self.path, "r+")
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                return None
            raise
        weakref.finalize(self, stream.close)
        return stream

    def _positions(self, index: Tensor, flipped: Tensor) -> NDArray[Any]:
        positions = index.cpu().numpy() * 2 + flipped.cpu().numpy()
        if len(positions) and not (positions.min() >= 0 and positions.max() < 2 * self.images):
            raise IndexError(f"images {index.tolist()[:5]} are not all in 0 .. {self.images - 1}")
        return cast("NDArray[Any]", positions)

    def look_up(self, index: Tensor, flipped: Tensor) -> tuple[Tensor, Tensor]:
        """Unit vectors (B, D) fp32 on the CPU of some views, NaN where missing, and which are known, (B,)."""
        return _decoded(self._rows[self._positions(index, flipped)])

    def store(self, index: Tensor, flipped: Tensor, embeddings: Tensor) -> None:
        """Keep the teacher's embeddings (B, D), of any norm, of some views.

        Raises:
            TeacherError: one is zero, NaN or inf, or the file is read-only.
        """
        positions = self._positions(index, flipped)
        rows = ~normalize(embeddings.detach().float()).to("cpu", torch.float16).numpy().view(np.uint16)
        _, sound = _decoded(rows)
        if not sound.all():
            where = index.cpu()[~sound][:5].tolist()
            raise TeacherError(f"the teacher's embeddings of images {where} are zero, NaN or inf: look at these images")
        if self._file is None:
            raise TeacherError(
                f"the cache {self.path} is read-only and not full: let somebody who may write it fill it with "
                "`arcface-kd cache`, or name another file"
            )
        # Through the map, a full disk would end the process and a kill could come between the bytes of a number.
        for position, row in zip(positions.tolist(), rows, strict=True):
            _write_at(self._file, position * 2 * self.embedding_size, row.tobytes())

    def known(self, start: int, stop: int) -> NDArray[Any]:
        """Which rows of images ``start`` to ``stop`` are there, (n, 2) bool: plain, mirrored; reads them all."""
        none = torch.zeros(0, dtype=torch.bool)
        found: NDArray[Any] = torch.cat([none, *(known for _, known in self.blocks(start, stop))]).view(-1, 2).numpy()
        return found

    def blocks(self, start: int, stop: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All rows of a range of images as :meth:`look_up` gives them, a few thousand at a time, in little memory."""
        rows_at_once = max(2, _NUMBERS_AT_ONCE // self.embedding_size)
        for first in range(2 * start, 2 * stop, rows_at_once):
            count = min(2 * stop - first, rows_at_once) * self.embedding_size
            try:
                numbers = np.fromfile(self.path, np.uint16, count, offset=2 * first * self.embedding_size)
            except OSError as error:
                raise TeacherError(f"the cache {self.path} cannot be read: {error.strerror or error}") from error
            if len(numbers) < count:
                raise TeacherError(f"the cache {self.path} was cut short while it was read")
            yield _decoded(numbers.reshape(-1, self.embedding_size))

    def filled(self) -> int:
        """Rows that are there, of 2 x images; reads the whole file."""
        return int(self.known(0, self.images).sum())


def _header_of(path: Path) -> Path:
    # A folder such as "." has no name; it is refused later.
    return Path(f"{path}.json")


def _not_there(path: Path, flags: Sequence[str]) -> str:
    return f"there is no cache of a teacher's embeddings at {path}: {fill_hint(path, flags)}"


def _refuse_special_files(*paths: Path) -> None:
    """A pipe would wait for ever and a device has no end."""
    for path in paths:
        if path.exists() and not path.is_file():
            raise TeacherError(f"the cache {path} is {describe(path)}: name a file for the teacher's embeddings")


def _read_header(path: Path, header: Path) -> dict[str, Any]:
    with open(header, "rb") as stream:
        text = stream.read(_LARGEST_HEADER)
    # The JSON reader answers deep nesting with a RecursionError.
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(text)
        if isinstance(found, dict):
            return found
    raise TeacherError(f"{header} is no cache header; delete it and {path} to start anew")


def _decoded(rows: NDArray[Any]) -> tuple[Tensor, Tensor]:
    """Unit vectors (B, D) out of a file's rows, NaN where a row is no unit vector, and (B,) bool whether it is one."""
    values = torch.from_numpy(np.invert(np.asarray(rows)).view(np.float16)).float()
    norms = values.norm(dim=1)
    known = (norms - 1).abs() < _NORM_TOLERANCE
    return values / norms.where(known, torch.nan).unsqueeze(1), known


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    if isinstance(value, str) and len(text) > 16:
        return text[:12] + "..."
    return text if len(text) <= 120 else text[:117] + "..."


def _holds_anything(stream: IO[bytes]) -> bool:
    """Whether a file has a byte that is not zero."""
    while block := stream.read(1 << 24):
        if np.frombuffer(block, np.uint8).any():
            return True
    return False


def _write_at(stream: FileIO, offset: int, data: bytes) -> None:
    stream.seek(offset)
    rest = memoryview(data)
    while rest:
        rest = rest[stream.write(rest) :]
