"""Process groups: join the ranks and, when one fails, end all of them and name the cause.

A rank that fails leaves its cause in the store through which the ranks have found each other. The others notice when a
collective breaks or runs into its time-out; they look for that cause, or for a rank whose process is gone, and end with
one line that names it. ``torchrun`` ends them sooner, and names the rank itself.
"""

import contextlib
import gc
import os
import socket
import threading
import time
import traceback
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from arcface_kd.errors import ArcfaceKDError, ConfigError, RankError

TIMEOUT = "ARCFACE_KD_TIMEOUT"

# How long a rank that finds a collective broken looks for the cause: others may be about to tell it.
_SECONDS_OF_SEARCH = 5.0
_SECONDS_BETWEEN_LOOKS = 0.1
_SECONDS_FOR_THE_STORE = 5.0
_LONGEST_CAUSE = 500


def job_timeout() -> timedelta | None:
    """How long a rank waits for the others: the environment's ``ARCFACE_KD_TIMEOUT``, in seconds.

    None for the backend's own: half an hour over gloo, ten minutes over nccl.
    """
    text = os.environ.get(TIMEOUT)
    if text is None:
        return None
    try:
        seconds = float(text)
        if not 0 < seconds < 1e9:
            raise ValueError
    except ValueError:
        raise ConfigError(f"{TIMEOUT}={text!r}; it must be a number of seconds above 0") from None
    return timedelta(seconds=seconds)


@contextlib.contextmanager
def process_group() -> Iterator[tuple[int, int, int]]:
    """Join the ranks that ``torchrun`` started, over nccl on GPUs and gloo elsewhere; a lone process joins none.

    Yields ``(rank, local_rank, world_size)``. An error that follows from another rank's becomes a RankError, which
    names that rank and the cause.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1 or distributed.is_initialized():
        ready = distributed.is_available() and distributed.is_initialized()
        rank = distributed.get_rank() if ready else 0
        yield rank, int(os.environ.get("LOCAL_RANK", "0")), distributed.get_world_size() if ready else 1
        return
    timeout = job_timeout()
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    board: _Board | None = None
    try:
        patience: dict[str, Any] = {} if timeout is None else {"timeout": timeout}
        store, rank, world_size = next(distributed.rendezvous("env://", **patience))
        board = _Board(store, rank, world_size)
        local_rank = int(os.environ["LOCAL_RANK"])
        # Else nccl guesses from the rank which GPU is this process's.
        device = torch.device("cuda", local_rank) if backend == "nccl" else None
        distributed.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=timeout, device_id=device
        )
        yield rank, local_rank, world_size
    except BaseException as error:
        cause = None if board is None else board.cause_behind(error)
        if distributed.is_initialized():
            _leave(backend, error)
        if cause is not None:
            raise RankError(cause) from error
        raise
    _let_go(None)
    distributed.destroy_process_group()


def _let_go(error: BaseException | None) -> None:
    """Free what was made in the group, and is in cycles or held by the frames that an error has ended.

    A DistributedDataParallel that outlives the group ends it with Python's lock held, and a thread of gloo that still
    needs the lock would never end.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
    gc.collect()


def _leave(backend: str, error: BaseException) -> None:
    """Leave the group after a failure, without waiting for ranks that may be gone."""
    world = distributed.group.WORLD
    if backend == "gloo" or world is None:
        _let_go(error)
        distributed.destroy_process_group()
        return
    # A kernel that waits for the others would keep the process from ending.
    with contextlib.suppress(RuntimeError):
        world.abort()


class _Board:
    """Where ranks leave what has become of them."""

    def __init__(self, store: distributed.Store, rank: int, world_size: int) -> None:
        self._store = distributed.PrefixStore("arcface_kd", store)
        self._rank, self._world_size = rank, world_size
        self._store.set(f"process/{rank}", f"{os.getpid()} {socket.gethostname()}")

    def cause_behind(self, error: BaseException) -> str | None:
        """Leave this rank's failure for the others, or find the message about the rank it follows from."""
        found: list[str | None] = []
        # A store whose process is stopped, or whose machine is out of reach, may never answer.
        asking = threading.Thread(target=lambda: found.append(self._ask(error)), daemon=True)
        asking.start()
        asking.join(_SECONDS_OF_SEARCH + _SECONDS_FOR_THE_STORE)
        if found:
            return found[0]
        return self._without_store(error, "did not answer in time") if _is_collective(error) else None

    def _ask(self, error: BaseException) -> str | None:
        try:
            # Collectives fail with errors of many kinds, all of them RuntimeErrors; ours are about this rank itself.
            if not isinstance(error, RuntimeError) or (
                isinstance(error, ArcfaceKDError) and not isinstance(error, RankError)
            ):
                self._tell(error)
                return None
            return self._find(error)
        # The store goes with the process that holds it.
        except (RuntimeError, OSError):
            return self._without_store(error, "is gone, whose own lines say why")

    def _without_store(self, error: BaseException, what: str) -> str:
        own = f"rank {self._rank} of {self._world_size}"
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            return f"{own} has lost the others: {_first_line(error)}"
        return f"{own} stopped because rank 0 {what} ({_first_line(error)})"

    def _tell(self, error: BaseException) -> None:
        self._store.compare_set("failed", "", f"{self._rank} {type(error).__name__}: {_first_line(error)}")

    def _find(self, error: RuntimeError) -> str | None:
        self._store.set(f"stopped/{self._rank}", "1")
        own = f"rank {self._rank} of {self._world_size} stopped"
        others = [rank for rank in range(self._world_size) if rank != self._rank]
        broken = _is_collective(error)
        until = time.monotonic() + (_SECONDS_OF_SEARCH if broken else 0.0)
        while True:
            if self._store.check(["failed"]):
                rank, _, cause = self._store.get("failed").decode().partition(" ")
                return f"{own} because rank {rank} failed: {cause}"
            gone = [rank for rank in others if self._is_gone(rank)] if broken else []
            if gone:
                return (
                    f"{own} because rank {_listed(gone)} is gone: its process was ended from outside, as the system "
                    "does when memory runs out"
                )
            if time.monotonic() > until:
                break
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        if not broken:
            self._tell(error)
            return None
        silent = [rank for rank in others if not self._store.check([f"stopped/{rank}"])]
        who = f"rank {_listed(silent)} did not answer in time" if silent else "the ranks lost each other"
        return f"{own} because {who} ({_first_line(error)}); {TIMEOUT} sets the time in seconds"

    def _is_gone(self, rank: int) -> bool:
        """Whether a rank's process on this machine has ended; of other machines nothing is known."""
        if not self._store.check([f"process/{rank}"]):
            return False
        number, host = self._store.get(f"process/{rank}").decode().split(" ", 1)
        if host != socket.gethostname():
            return False
        try:
            with open(f"/proc/{number}/stat", encoding="latin-1") as stream:
                # What has ended and was not yet collected by its parent is a zombie.
                return stream.read().rpartition(")")[2].split()[0] in "ZX"
        except (FileNotFoundError, ProcessLookupError):
            return os.path.isdir("/proc/self")


def _is_collective(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, distributed.DistError) or any(
        sign in text for sign in ("gloo", "nccl", "connection closed by peer", "timed out waiting")
    )


def _first_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _LONGEST_CAUSE else text[: _LONGEST_CAUSE - 3] + "..."


def _listed(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks))
