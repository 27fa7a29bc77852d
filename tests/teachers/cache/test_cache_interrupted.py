"""The cache of the teacher's embeddings on full disks and in processes that are killed."""

import errno
import os
import resource
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from arcface_kd.errors import TeacherError
from arcface_kd.teachers.cache import embedding_cache
from arcface_kd.teachers.cache.embedding_cache import EmbeddingCache
from tests.forked import CONTEXT
from tests.teachers.cache.test_embedding_cache import (
    DIMENSION,
    IMAGES,
    assert_whole_rows,
    both_views,
    embeddings_of,
    identity,
)


def test_a_limit_on_file_sizes_leaves_nothing(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(TeacherError, match=r"no room for the cache .*; it takes 9\.6 MB"):
            EmbeddingCache(tmp_path / "rows", identity(images=10**5))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_no_room_for_the_header_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(path: Path) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(embedding_cache, "atomic_write", no_room)
    with pytest.raises(TeacherError, match="no room"):
        EmbeddingCache(tmp_path / "rows", identity())
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_that_reserves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(descriptor: int, start: int, size: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    index, flipped = both_views()
    cache = EmbeddingCache(tmp_path / "rows", identity())
    cache.store(index, flipped, embeddings_of(index, flipped))
    monkeypatch.delattr(os, "posix_fallocate")
    other = EmbeddingCache(tmp_path / "other", identity())
    other.store(index, flipped, embeddings_of(index, flipped))
    assert cache.filled() == other.filled() == 2 * IMAGES


class _FullDisk:
    """A file whose disk is full after some bytes."""

    def __init__(self, stream: Any, room: int) -> None:
        self.stream, self.room = stream, room

    def seek(self, offset: int) -> None:
        self.stream.seek(offset)

    def write(self, data: memoryview) -> int:
        if self.room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        written: int = self.stream.write(data[: self.room])
        self.room -= written
        return written


@pytest.mark.parametrize("room", [1, 47, 48, 49, 200])
def test_a_disk_that_fills_up_on_the_way_leaves_whole_rows(tmp_path: Path, room: int) -> None:
    index, flipped = both_views()
    cache = EmbeddingCache(tmp_path / "rows", identity())
    whole = cache._file
    cache._file = _FullDisk(whole, room)  # type: ignore[assignment]
    with pytest.raises(OSError, match="No space left"):
        cache.store(index, flipped, embeddings_of(index, flipped))
    cache = EmbeddingCache(tmp_path / "rows", identity())
    assert assert_whole_rows(cache) == room // (2 * DIMENSION)
    cache.store(index, flipped, embeddings_of(index, flipped))
    assert assert_whole_rows(cache) == 2 * IMAGES


LARGE = {"images": 120, "embedding_size": 1500}  # rows of 3000 bytes: most lie on two pages


def _fill(path: Path, order: int) -> None:
    """Open or make the cache, then write what is missing, row by row."""
    torch.set_num_threads(1)
    index, flipped = both_views(LARGE["images"])
    rows = embeddings_of(index, flipped, LARGE["embedding_size"])
    cache = EmbeddingCache(path, identity(**LARGE))
    for row in np.random.default_rng(order).permutation(len(index)).tolist():
        part = slice(row, row + 1)
        if not cache.look_up(index[part], flipped[part])[1].all():
            cache.store(index[part], flipped[part], rows[part])


def test_several_processes_make_and_fill_one_file(tmp_path: Path) -> None:
    processes = [CONTEXT.Process(target=_fill, args=(tmp_path / "rows", order)) for order in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert assert_whole_rows(EmbeddingCache(tmp_path / "rows", identity(**LARGE))) == 2 * LARGE["images"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows", "rows.json"]


def _make(path: Path, module: str, name: str, moment: str) -> None:
    """Make a cache, and be killed before a function of the way, after it, or after half of the file is reserved."""
    place = {"os": os, "embedding_cache": embedding_cache, "Path": Path}[module]
    function = getattr(place, name)

    def killed(*arguments: Any, **keywords: Any) -> None:
        if moment == "half":
            arguments = (*arguments[:2], arguments[2] // 2)
        if moment != "before":
            function(*arguments, **keywords)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(place, name, killed)
    EmbeddingCache(path, identity())


@pytest.mark.parametrize(
    ("module", "name", "moment"),
    [
        ("embedding_cache", "lock_file", "before"),
        ("embedding_cache", "reserve_space", "before"),
        ("os", "posix_fallocate", "half"),
        ("embedding_cache", "reserve_space", "after"),
        ("Path", "replace", "before"),
        ("Path", "replace", "after"),
    ],
    ids=["empty", "locked", "half", "reserved", "header-not-there", "header-there"],
)
def test_killed_while_it_is_made_it_is_made_by_the_next(tmp_path: Path, module: str, name: str, moment: str) -> None:
    process = CONTEXT.Process(target=_make, args=(tmp_path / "rows", module, name, moment))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert (tmp_path / "rows").exists()
    cache = EmbeddingCache(tmp_path / "rows", identity())
    index, flipped = both_views()
    assert cache.filled() == 0
    cache.store(index, flipped, embeddings_of(index, flipped))
    assert assert_whole_rows(cache) == 2 * IMAGES
