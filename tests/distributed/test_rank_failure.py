"""One bad rank ends the whole job in time: the others stop, and name it and its cause."""

import importlib
import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import distributed

from arcface_kd.cli import main as cli
from arcface_kd.distributed.process_group import TIMEOUT, job_timeout, process_group
from arcface_kd.errors import ConfigError, ResourceError
from arcface_kd.training.trainer import _shortages
from tests.forked import ranks_environment, start_ranks, wait
from tests.host.trainer.faces import Faces
from tests.networks import tiny
from tests.training.runs import NETWORK, config_file

# A rank that ends is noticed at once, one that hangs after the time-out; the rest is a busy machine's.
PATIENCE = 300.0
LONG: dict[str, Any] = {"num_epoch": 50, "val_targets": [], "batch_size": 4, "save_all_states": True}


def fail(how: str) -> None:
    match how:
        case "exception":
            raise ValueError("a fault of this rank")
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "exit":
            os._exit(1)
        case "memory":
            raise torch.cuda.OutOfMemoryError("tried to allocate 7.00 GiB")
        case "hang":
            time.sleep(1000)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)


def train_and_fail(config: str, bad_rank: int, how: str) -> int:
    """Train, but for one rank, which fails at its third step."""
    return run_and_fail(["train", config], bad_rank, how, "arcface_kd.distillation.head:DistillationHead.forward", 3)


def run_and_fail(words: Sequence[str], bad_rank: int, how: str, place: str, call: int) -> int:
    """Run a command, but for one rank, which fails when it calls what stands at a place for the so-maniest time.

    The place is ``module:name`` or ``module:class.name``; for the way that it fails see :func:`fail`.
    """
    module, _, name = place.partition(":")
    owner: Any = importlib.import_module(module)
    *path, name = name.split(".")
    for each in path:
        owner = getattr(owner, each)
    whole, calls = getattr(owner, name), 0

    def failing(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and int(os.environ["RANK"]) == bad_rank:
            fail(how)
        return whole(*arguments, **keywords)

    setattr(owner, name, failing)
    return cli.main(list(words))


def last_lines(log: Path) -> str:
    return "\n".join(log.read_text().splitlines()[-30:])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "bad_rank", "cause"),
    [
        ("exception", 1, "because rank 1 failed: ValueError: a fault of this rank"),
        (
            "memory",
            1,
            "because rank 1 failed: ResourceError: step 3: out of memory: lower batch_size or use more ranks",
        ),
        ("kill", 1, "because rank 1 is gone: its process was ended from outside"),
        ("exit", 1, "because rank 1 is gone"),
        ("hang", 1, "because rank 1 did not answer in time"),
        # The store goes with rank 0, where no torchrun holds it.
        ("kill", 0, "because rank 0 is gone"),
        # And where it is stopped, or out of reach, the store does not answer.
        ("stop", 0, "because rank 0 did not answer in time"),
    ],
)
def test_the_others_end_and_say_why(faces: Faces, tmp_path: Path, how: str, bad_rank: int, cause: str) -> None:
    time_out = "20" if how in ("hang", "stop") else str(PATIENCE)
    words = (str(config_file(faces, tmp_path / "run", **LONG)), bad_rank, how)
    ranks = start_ranks(2, train_and_fail, *words, logs=tmp_path, environment={TIMEOUT: time_out})
    good = ranks[1 - bad_rank]
    code = wait([good], PATIENCE)[0]
    wait(ranks, 0.0 if how in ("hang", "stop") else PATIENCE)
    said = (tmp_path / f"rank{1 - bad_rank}.log").read_text()
    assert code == 2, last_lines(tmp_path / f"rank{1 - bad_rank}.log")
    (line,) = [line for line in said.splitlines() if line.startswith("arcface-kd: ")]
    assert line.startswith(f"arcface-kd: rank {1 - bad_rank} of 2 stopped {cause}")
    if how == "memory":
        own = (tmp_path / f"rank{bad_rank}.log").read_text()
        assert "arcface-kd: rank 1: step 3: out of memory" in own
        assert "Traceback" not in own


# What goes on besides steps: a function that is called there, and how often before it fails.
CHECKPOINTING = ("arcface_kd.checkpoints.files:save_tensors", 1)
DECODING = ("arcface_kd.data.dataset:decode_rgb", 5)
MAKING = ("arcface_kd.teachers.cache.embedding_cache:EmbeddingCache.__init__", 1)
FILLING = ("arcface_kd.teachers.cache.embedding_cache:EmbeddingCache.store", 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "place", "how", "bad_rank", "cause"),
    [
        ("train", CHECKPOINTING, "kill", 1, "is gone: its process was ended from outside"),
        ("train", DECODING, "memory", 1, "failed: ResourceError: step "),
        ("cache", MAKING, "exception", 0, "ValueError: a fault of this rank"),
        ("cache", FILLING, "memory", 1, "failed: ResourceError: filling "),
        ("cache", FILLING, "kill", 1, "is gone: its process was ended from outside"),
    ],
    ids=str,
)
def test_wherever_it_fails(
    faces: Faces, tmp_path: Path, command: str, place: tuple[str, int], how: str, bad_rank: int, cause: str
) -> None:
    keys: dict[str, Any] = {"val_targets": ["pairs"]}
    if command == "cache":
        teacher = tmp_path / "teacher.pt"
        torch.save(tiny(32).state_dict(), teacher)
        keys = {"kd": "adadistill", "kd_teacher": str(teacher), "kd_cache": str(tmp_path / "rows")}
        keys["kd_option"] = f"teacher.network={NETWORK}"
    config = config_file(faces, tmp_path / "run", **LONG | keys)
    words = ([command, str(config)], bad_rank, how, *place)
    ranks = start_ranks(2, run_and_fail, *words, logs=tmp_path, environment={TIMEOUT: str(PATIENCE)})
    code = wait(ranks, PATIENCE)[1 - bad_rank]
    log = tmp_path / f"rank{1 - bad_rank}.log"
    assert code == 2, last_lines(log)
    (line,) = [line for line in log.read_text().splitlines() if line.startswith("arcface-kd: ")]
    assert line.startswith(f"arcface-kd: rank {1 - bad_rank} of 2 stopped because rank {bad_rank} ")
    if bad_rank == 1:
        assert cause in line
    else:
        # The store goes with rank 0, and what it has left there.
        assert cause in (tmp_path / "rank0.log").read_text()


_TORCHRUN = """
import os, time
from arcface_kd.distributed.process_group import process_group

with process_group():
    if os.environ["RANK"] == "1":
        raise ValueError("a fault of this rank")
    # In a collective it would end by itself, perhaps before torchrun has looked at rank 1.
    time.sleep(600)
"""


@pytest.mark.slow
def test_torchrun_ends_the_job(tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(_TORCHRUN)
    done = subprocess.run(
        [*(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"), str(script)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE,
    )
    assert done.returncode != 0
    # torchrun's own account: which rank was the first, and how it ended.
    assert "rank      : 1 (local_rank: 1)" in done.stderr
    assert "ValueError: a fault of this rank" in done.stderr


def pretend_to_join(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Let `process_group` find another rank, and think that it has joined it; what it asks for."""
    met: dict[str, Any] = {}
    for name, value in ranks_environment(2, 0, 1).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "rendezvous", lambda *_, **__: iter([(distributed.HashStore(), 1, 2)]))
    monkeypatch.setattr(distributed, "init_process_group", lambda backend, **keys: met.update(keys, backend=backend))
    monkeypatch.setattr(distributed, "is_initialized", lambda: "backend" in met)
    return met


def test_on_gpus_a_rank_names_its_own_and_aborts_when_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over nccl, which is not here: taking it down could wait for ranks that are gone, and so could the exit."""
    met = pretend_to_join(monkeypatch)
    world = SimpleNamespace(abort=lambda: met.update(aborted=True))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(distributed, "group", SimpleNamespace(WORLD=world))
    monkeypatch.setattr(distributed, "destroy_process_group", lambda: pytest.fail("it waits"))
    with pytest.raises(ConfigError, match="ours"), process_group():
        raise ConfigError("ours")
    assert (met["backend"], met["device_id"], met["aborted"]) == ("nccl", torch.device("cuda", 1), True)


def test_what_has_failed_is_gone_before_its_group(monkeypatch: pytest.MonkeyPatch) -> None:
    class Model:
        """In a cycle, as a DistributedDataParallel is."""

        def __init__(self) -> None:
            self.itself = self

    models: list[weakref.ref[Model]] = []
    left: list[Model | None] = []

    def train() -> None:
        model = Model()
        models.append(weakref.ref(model))
        raise ValueError("theirs")

    def run() -> None:
        try:
            train()
        except ValueError as error:
            raise ConfigError("ours") from error

    pretend_to_join(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(distributed, "destroy_process_group", lambda: left.extend(model() for model in models))
    with pytest.raises(ConfigError, match="ours"), process_group():
        run()
    assert left == [None]


def test_the_time_out_is_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TIMEOUT, raising=False)
    assert job_timeout() is None
    monkeypatch.setenv(TIMEOUT, "2.5")
    assert job_timeout() == timedelta(seconds=2.5)
    for text in ("0", "-1", "soon", "nan", "inf"):
        monkeypatch.setenv(TIMEOUT, text)
        with pytest.raises(ConfigError, match="must be a number of seconds above 0"):
            job_timeout()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "step 7: out of memory: lower batch_size or use more ranks"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"), "step 7: out of memory"),
        (RuntimeError("DataLoader worker (pid 5) is killed by signal: Killed."), "lower num_workers or batch_size"),
    ],
)
def test_what_the_machine_lacks_is_one_line(error: Exception, message: str) -> None:
    with pytest.raises(ResourceError, match=message) as caught, _shortages(Path("run"), lambda: 7):
        raise error
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "arcface-kd: out of memory: lower batch_size, or use a machine with more\n"),
        (torch.cuda.OutOfMemoryError("tried\n 7 GiB"), "use a machine with more (tried 7 GiB)\n"),
        (BrokenProcessPool("A process was terminated"), "arcface-kd: a process that helps with the work has ended"),
    ],
    ids=str,
)
def test_what_any_command_lacks_is_one_line(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(arguments: object) -> None:
        raise error

    monkeypatch.setattr("arcface_kd.cli.host._methods", fail)
    assert cli.main(["methods"]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1


def test_a_fault_of_ours_is_left_alone() -> None:
    with pytest.raises(RuntimeError, match=r"^ours$") as caught, _shortages(Path("run"), lambda: 7):
        raise RuntimeError("ours")
    assert type(caught.value) is RuntimeError
