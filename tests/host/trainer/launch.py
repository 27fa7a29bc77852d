"""Running a trainer as its users do, and reading what it leaves."""

import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import torch

from tests.forked import free_port, start_ranks


class Run(NamedTuple):
    """How a run ended: the first exit code that is not 0, and what its ranks printed, one after the other."""

    exit_code: int
    printed: str


class Turn(NamedTuple):
    """One of several runs in the same process: a name, what follows ``train_v2.py``, and stand-ins it asks for."""

    name: str
    arguments: Sequence[str]
    stand_ins: Sequence[str] = ()


def launch(folder: Path, config: str, *arguments: str, ranks: int = 1, torchrun: bool = False) -> Run:
    """Train with ``configs/CONFIG`` in a trainer's folder, on CPUs.

    ``torchrun`` starts the ranks as its users do; without it they get the same environment from here, which saves a
    process and its imports.
    """
    return _start(folder, ["train_v2.py", f"configs/{config}", *arguments], ranks, torchrun)


def launch_in_turn(folder: Path, turns: Sequence[Turn], ranks: int = 1, torchrun: bool = False) -> Run:
    """Train several times in a trainer's folder, one after the other in the same ranks, see ``in_turn.py``.

    The first run that fails is the last one.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as plan:
        json.dump([turn._asdict() for turn in turns], plan)
        plan.flush()
        return _start(folder, [str(Path(__file__).with_name("in_turn.py")), plan.name], ranks, torchrun)


def _start(folder: Path, trainer: list[str], ranks: int, torchrun: bool) -> Run:
    alone = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONDONTWRITEBYTECODE": "1"}
    if torchrun:
        options = [f"--nproc_per_node={ranks}", "--master_addr=127.0.0.1", f"--master_port={free_port()}"]
        command = [sys.executable, "-m", "torch.distributed.run", *options, *trainer]
        environment = {**os.environ, **alone}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1200)
        return Run(done.returncode, done.stdout + done.stderr)
    with tempfile.TemporaryDirectory() as logs:
        words = (_run_script, str(folder), trainer)
        exit_code = _wait(start_ranks(ranks, *words, logs=Path(logs), environment=alone, may_fork=True))
        printed = [Path(logs, f"rank{rank}.log").read_text(errors="replace") for rank in range(ranks)]
        return Run(exit_code, "\n".join(printed))


def _run_script(folder: str, words: list[str]) -> None:
    """What ``python WORDS`` does in a folder."""
    os.chdir(folder)
    sys.path.insert(0, folder)
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


def _wait(processes: list[BaseProcess], seconds: float = 1200) -> int:
    """Wait for all, or until one fails or time is up; the others would wait for it."""
    deadline = time.monotonic() + seconds
    try:
        while any(process.exitcode is None for process in processes):
            failed = [process.exitcode for process in processes if process.exitcode]
            if failed:
                return failed[0]
            assert time.monotonic() < deadline, f"the trainer still ran after {seconds} seconds"
            time.sleep(0.05)
        return next((process.exitcode for process in processes if process.exitcode), 0)
    finally:
        for process in processes:
            process.kill()
            process.join()


def train(folder: Path, config: str, *arguments: str, ranks: int = 1, torchrun: bool = False) -> str:
    """As ``launch``, for a run that must succeed; returns what it printed."""
    run = launch(folder, config, *arguments, ranks=ranks, torchrun=torchrun)
    assert run.exit_code == 0, run.printed[-8000:]
    return run.printed


def write_config(folder: Path, name: str, keys: Mapping[str, object], last_line: str = "") -> str:
    """Write ``configs/NAME.py`` with these keys, and perhaps a last line; returns the name."""
    lines = ["from easydict import EasyDict as edict", "", "config = edict()"]
    lines += [f"config.{key} = {value!r}" for key, value in keys.items()]
    (folder / "configs" / f"{name}.py").write_text("\n".join([*lines, last_line, ""]), encoding="utf-8")
    return name


def head_state(output: Path, rank: int = 0) -> dict[str, torch.Tensor]:
    """The head's part of ``checkpoint_gpu_RANK.pt``."""
    state = torch.load(output / f"checkpoint_gpu_{rank}.pt", weights_only=True)
    head: dict[str, torch.Tensor] = state["state_dict_softmax_fc"]
    return head
