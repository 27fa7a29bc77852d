"""Checks in processes of their own: one that fails, hangs or takes its process down does not stop the others."""

import contextlib
import importlib
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from arcface_kd.distributed.step_graph import NOT_RECORDED
from arcface_kd.losses.fused import FALLBACK
from benchmarks.gpu.checks import Check, Findings, Place, Skipped

_SHOWN = 3000
# In the environment of all that a check starts.
_MARK = "ARCFACE_KD_CHECK"


def new_process(place: Place, function: Callable[..., None], *arguments: Any, inside: bool = False) -> Any:
    """A process that is not yet started: a bare one on a GPU, whose driver no fork survives.

    Args:
        place: of the run.
        function: of a module.
        arguments: of the function.
        inside: whether a check starts it, which on a CPU has all imports done.
    """
    kind = "spawn" if place.device.type == "cuda" else "fork" if inside else "forkserver"
    context: Any = multiprocessing.get_context(kind)
    if kind == "forkserver":
        context.set_forkserver_preload(["torch", "torch._dynamo", "arcface_kd.training.trainer"])
    return context.Process(target=function, args=arguments)


def run_check(check: Check, place: Place, seconds: float) -> dict[str, Any]:
    """Run a check in a process of its own.

    Args:
        check: the check.
        place: where.
        seconds: after which it is ended, with all that it has started.

    Returns:
        ``number``, ``title``, ``status`` (passed, failed, skipped, timed out), ``seconds``, ``numbers``, ``faults``,
        ``goals``.
    """
    found, log = (place.scratch / f"check_{check.number}.{kind}" for kind in ("json", "log"))
    Findings(found).save()
    mark = f"{place.scratch}/{check.number}."
    process = new_process(place, _inside, check.function, place, found, log, mark)
    began = time.monotonic()
    process.start()
    process.join(seconds)
    hangs = process.is_alive()
    _end(process, mark)
    outcome = json.loads(found.read_text(encoding="utf-8"))
    skipped = outcome.pop("skipped", None)
    if hangs:
        status = "timed out"
        outcome["faults"].append(f"still ran after {seconds:.0f} s; it had printed: {_tail(log)}")
    elif skipped is not None:
        status = "skipped"
        outcome["faults"] = [skipped]
    else:
        if process.exitcode:
            outcome["faults"].append(f"ended with {process.exitcode}: {_tail(log)}")
        outcome["faults"] += fallbacks(log)
        status = "failed" if outcome["faults"] else "passed"
    spent = round(time.monotonic() - began, 1)
    return {"number": check.number, "title": check.title, "status": status, "seconds": spent, **outcome}


def _end(process: Any, mark: str) -> None:
    """End a check's process and whatever of its own it has left behind."""
    if process.is_alive():
        process.kill()
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.join()
    # torchrun's workers are in groups of their own, and outlive it.
    wanted = f"{_MARK}={mark}\0".encode()
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if wanted in environment.read_bytes():
                os.kill(int(environment.parent.name), signal.SIGKILL)


def fallbacks(log: Path) -> list[str]:
    """The warnings in a log of what was not compiled or recorded: numbers are right without, but not speed."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    return sorted({line for line in lines if FALLBACK in line or NOT_RECORDED in line})


def _tail(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")[-_SHOWN:].strip() if log.exists() else "nothing"


def _inside(function: str, place: Place, file: Path, log: Path, mark: str) -> None:
    # A group of its own can be ended whole; what leaves it bears the mark.
    os.setsid()
    os.environ[_MARK] = mark
    with log.open("wb") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    module, _, name = function.partition(":")
    found = Findings(file)
    try:
        getattr(importlib.import_module(module if "." in module else f"benchmarks.gpu.{module}"), name)(place, found)
        found.save()
    except Skipped as reason:
        content = {"numbers": found.numbers, "faults": [], "goals": {}, "skipped": str(reason)}
        file.write_text(json.dumps(content), encoding="utf-8")
    except BaseException:
        traceback.print_exc()
        sys.exit(1)
