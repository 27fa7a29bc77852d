"""A few gloo processes that stay for the whole test session and run one function after the other."""

import os
import pickle
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import distributed

from arcface_kd.distributed.ranks import RankGroup
from tests.forked import CONTEXT

P = ParamSpec("P")
T = TypeVar("T")

LARGEST_WORLD = 4
# On a busy machine, importing torch alone has taken 100.
_STARTING_SECONDS = 600.0


class RankError(Exception):
    """A rank raised or did not answer; the message holds every rank's traceback."""


def _serve(rank: int, store: str, pipe: Connection) -> None:
    """One rank: join the world, then run what comes through the pipe."""
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    distributed.init_process_group(
        "gloo", init_method=Path(store).as_uri(), rank=rank, world_size=LARGEST_WORLD, timeout=timedelta(minutes=5)
    )
    # Worlds of one to four ranks, made once: every process has to take part in making each.
    groups = [distributed.new_group(list(range(size))) for size in range(1, LARGEST_WORLD + 1)]
    pipe.send_bytes(pickle.dumps((True, None)))
    while True:
        try:
            function, world_size, arguments, keywords = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            answer = (True, function(RankGroup(groups[world_size - 1]), *arguments, **keywords))
        except BaseException:
            answer = (False, traceback.format_exc())
        pipe.send_bytes(pickle.dumps(answer))


class RankPool:
    """Up to four processes with a gloo group for every world size.

    Ranks that take more than ``patience`` seconds for a function count as hanging.
    """

    def __init__(self, patience: float = 120.0) -> None:
        self.patience = patience
        self._workers: list[tuple[BaseProcess, Connection]] = []

    def run(
        self, world_size: int, function: Callable[Concatenate[RankGroup, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> list[T]:
        """Run a function of a module on ranks 0 to world_size - 1; returns every rank's result, in order.

        It is called with the rank's :class:`RankGroup` and the arguments, and its result must be picklable.

        Raises:
            RankError: a rank raised, died or did not answer in time. The processes are replaced.
        """
        if not self._workers:
            self._start()
        for _, pipe in self._workers[:world_size]:
            pipe.send_bytes(pickle.dumps((function, world_size, args, kwargs)))
        return self._collect(world_size, self.patience)

    def _start(self) -> None:
        if sys.platform == "linux":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        with tempfile.TemporaryDirectory() as folder:
            for rank in range(LARGEST_WORLD):
                ours, theirs = CONTEXT.Pipe()
                process = CONTEXT.Process(target=_serve, args=(rank, f"{folder}/store", theirs), daemon=True)
                process.start()
                theirs.close()
                self._workers.append((process, ours))
            self._collect(LARGEST_WORLD, _STARTING_SECONDS)

    def _collect(self, world_size: int, patience: float) -> list[Any]:
        deadline = time.monotonic() + patience
        pending = {pipe: rank for rank, (_, pipe) in enumerate(self._workers[:world_size])}
        results: list[Any] = [None] * world_size
        faults: dict[int, str] = {}
        while pending:
            ready = wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                assert isinstance(pipe, Connection)
                rank = pending.pop(pipe)
                try:
                    succeeded, value = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    process, _ = self._workers[rank]
                    process.join(5)
                    succeeded, value = False, f"died with exit code {process.exitcode}\n"
                if succeeded:
                    results[rank] = value
                else:
                    faults[rank] = value
                    # The others may wait for this one in a collective: they get a moment to say what they met.
                    deadline = min(deadline, time.monotonic() + 2.0)
        if not pending and not faults:
            return results
        for rank in pending.values():
            faults[rank] = "waits for another rank\n" if faults else f"did not answer within {patience:.0f} s\n"
        self.close()
        raise RankError("\n" + "\n".join(f"rank {rank} of {world_size}: {faults[rank]}" for rank in sorted(faults)))

    def close(self) -> None:
        """End the processes."""
        for process, pipe in self._workers:
            pipe.close()
            process.kill()
        for process, _ in self._workers:
            process.join()
        self._workers = []
