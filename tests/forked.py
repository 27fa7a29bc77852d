"""Processes that start in a moment, to be killed and started again: forked from one that has the package imported."""

import faulthandler
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

_SECONDS_TO_A_TRACE = 150
# The one server of a process that runs tests; what it has imported costs those that are forked from it nothing.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "tests.forked",
        "torch.utils.tensorboard",
        "cv2",
        "arcface_kd.cli.main",
        "arcface_kd.training.trainer",
        "arcface_kd.teachers.cache.fill",
        # Every optimizer loads it, and so does DistributedDataParallel.
        "torch._dynamo",
    ]
)


# Bound and not listened on, a port is given to nobody but who asks for it by its number, as rank 0 does.
_KEPT: list[socket.socket] = []


def free_port() -> int:
    """A port of this machine that nobody listens on; it is kept for whoever is told it."""
    kept = socket.socket()
    kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    kept.bind(("127.0.0.1", 0))
    _KEPT.append(kept)
    port: int = kept.getsockname()[1]
    return port


def ranks_environment(ranks: int, port: int, rank: int, **more: str) -> dict[str, str]:
    """What ``torchrun`` tells a rank."""
    return {
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)},
        **{"RANK": str(rank), "LOCAL_RANK": str(rank)},
        **more,
    }


def _run(function: Callable[..., Any], arguments: Sequence[Any], environment: Mapping[str, str], log: str) -> None:
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    # Standard input is that of the process that they are forked from, and so is whether somebody watches.
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    # Of a process that hangs, its log says where.
    faulthandler.dump_traceback_later(_SECONDS_TO_A_TRACE, repeat=True, file=sys.stderr)
    torch.set_num_threads(1)
    # Processes of its own start as those of torchrun's ranks do, and not as this one.
    multiprocessing.set_start_method(None, force=True)
    code = function(*arguments)
    sys.exit(code if isinstance(code, int) else 0)


def start(
    function: Callable[..., Any],
    *arguments: Any,
    log: Path,
    environment: Mapping[str, str] | None = None,
    may_fork: bool = False,
) -> BaseProcess:
    """Start a process that runs a module's function; a whole number that it returns is the exit code.

    ``log`` takes what it prints, after what is there. ``may_fork`` lets it start processes of its own, which end with
    nobody else.
    """
    given = (function, arguments, dict(environment or {}), str(log))
    process = CONTEXT.Process(target=_run, args=given, daemon=not may_fork)
    process.start()
    return process


def start_ranks(
    ranks: int,
    function: Callable[..., Any],
    *arguments: Any,
    logs: Path,
    environment: Mapping[str, str] | None = None,
    may_fork: bool = False,
) -> list[BaseProcess]:
    """Start the ranks of a job, as ``torchrun`` does; they print to ``rank0.log`` and so on in a folder."""
    port = free_port()
    return [
        start(
            *(function, *arguments),
            log=logs / f"rank{rank}.log",
            environment={**ranks_environment(ranks, port, rank), **(environment or {})},
            may_fork=may_fork,
        )
        for rank in range(ranks)
    ]


def wait(processes: Sequence[BaseProcess], seconds: float) -> list[int | None]:
    """Wait for all to end, and kill what still runs then.

    Returns the exit codes: None for what had to be killed, and a signal's number is negative.
    """
    deadline = time.monotonic() + seconds
    codes: list[int | None] = []
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        codes.append(process.exitcode)
    for process in processes:
        if process.exitcode is None:
            process.kill()
            process.join()
    return codes
