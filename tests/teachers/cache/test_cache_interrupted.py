"""The cache of the teacher's embeddings on full disks and in processes that are killed."""

import errno
import os
import random
import resource
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
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


def test_a_disk_that_is_full_at_the_start_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(descriptor: int, start: int, size: int) -> None:
        os.truncate(descriptor, size // 2)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", no_room)
    with pytest.raises(TeacherError) as refused:
        EmbeddingCache(tmp_path / "rows", identity(images=10**6))
    message = str(refused.value)
    assert message.startswith(f"no room for the cache {tmp_path / 'rows'}: No space left on device; it takes 96.0 MB")
    assert "\n" not in message
    assert list(tmp_path.iterdir()) == []


def test_a_limit_on_file_sizes_leaves_nothing(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(TeacherError, match=r"no room for the cache .*: File too large; it takes 9\.6 MB"):
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


def _fill(path: str, ready: Connection, order: int) -> None:
    """Open or make the cache, then write what is missing, row by row."""
    torch.set_num_threads(1)
    index, flipped = both_views(LARGE["images"])
    rows = embeddings_of(index, flipped, LARGE["embedding_size"])
    ready.send(True)
    cache = EmbeddingCache(path, identity(**LARGE))
    for row in np.random.default_rng(order).permutation(len(index)).tolist():
        part = slice(row, row + 1)
        if not cache.look_up(index[part], flipped[part])[1].all():
            cache.store(index[part], flipped[part], rows[part])


def _start(path: Path, order: int) -> Any:
    ours, theirs = CONTEXT.Pipe()
    process = CONTEXT.Process(target=_fill, args=(str(path), theirs, order), daemon=True)
    process.start()
    assert ours.poll(60)
    return process


@pytest.mark.slow
def test_killed_again_and_again_it_never_holds_a_wrong_row(tmp_path: Path) -> None:
    path, chance = tmp_path / "rows", random.Random(0)
    counts, pause = [], 0.004
    for attempt in range(30):
        process = _start(path, attempt)
        time.sleep(chance.uniform(0, pause))
        process.kill()
        process.join()
        count = assert_whole_rows(EmbeddingCache(path, identity(**LARGE)))
        counts.append(count)
        if count == 2 * LARGE["images"]:
            # So quick a machine has finished: begin anew, with less time.
            path.unlink()
            path.with_name("rows.json").unlink()
            pause /= 2
    assert len({count for count in counts if 0 < count < 2 * LARGE["images"]}) >= 3, counts
    process = _start(path, 0)
    process.join()
    assert process.exitcode == 0
    assert assert_whole_rows(EmbeddingCache(path, identity(**LARGE))) == 2 * LARGE["images"]


def test_several_processes_make_and_fill_one_file(tmp_path: Path) -> None:
    processes = [_start(tmp_path / "rows", order) for order in range(3)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert assert_whole_rows(EmbeddingCache(tmp_path / "rows", identity(**LARGE))) == 2 * LARGE["images"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows", "rows.json"]


def _kill_before(function: Callable[..., Any]) -> Callable[..., Any]:
    def killed(*arguments: Any, **keywords: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    return killed


def _kill_after(function: Callable[..., Any]) -> Callable[..., Any]:
    def killed(*arguments: Any, **keywords: Any) -> Any:
        function(*arguments, **keywords)
        os.kill(os.getpid(), signal.SIGKILL)

    return killed


def _kill_half_way(function: Callable[..., Any]) -> Callable[..., Any]:
    def killed(descriptor: int, start: int, size: int) -> Any:
        function(descriptor, start, size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    return killed


def _make(path: str, module: str, name: str, wrap: Callable[..., Any]) -> None:
    place = {"os": os, "embedding_cache": embedding_cache, "Path": Path}[module]
    setattr(place, name, wrap(getattr(place, name)))
    EmbeddingCache(path, identity())


@pytest.mark.parametrize(
    ("module", "name", "wrap"),
    [
        ("embedding_cache", "_lock", _kill_before),
        ("embedding_cache", "reserve_space", _kill_before),
        ("os", "posix_fallocate", _kill_half_way),
        ("embedding_cache", "reserve_space", _kill_after),
        ("Path", "replace", _kill_before),
        ("Path", "replace", _kill_after),
    ],
    ids=["empty", "locked", "half", "reserved", "header-not-there", "header-there"],
)
def test_killed_while_it_is_made_it_is_made_by_the_next(
    tmp_path: Path, module: str, name: str, wrap: Callable[..., Any]
) -> None:
    process = CONTEXT.Process(target=_make, args=(str(tmp_path / "rows"), module, name, wrap))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert (tmp_path / "rows").exists()
    cache = EmbeddingCache(tmp_path / "rows", identity())
    index, flipped = both_views()
    assert cache.filled() == 0
    cache.store(index, flipped, embeddings_of(index, flipped))
    assert assert_whole_rows(cache) == 2 * IMAGES
