"""Jobs that are killed again and again, at random moments and at every kind of change to their folder."""

import json
import os
import random
import runpy
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from easydict import EasyDict

from arcface_kd.checkpoints.files import checkpoints_in_force, read_checkpoint
from arcface_kd.checkpoints.shards import open_shards
from arcface_kd.checkpoints.tensor_file import archive_fault
from arcface_kd.config.arcface_torch import BASE
from arcface_kd.data.dataset import RecordDataset, open_dataset
from arcface_kd.data.fingerprint import fingerprint
from arcface_kd.data.pack import pack_folder
from arcface_kd.errors import CheckpointError, DataError, RankError
from arcface_kd.evaluation.report.scalars import read_scalars
from arcface_kd.export import onnx as onnx_export
from arcface_kd.system.files import atomic_write
from arcface_kd.teachers.base import load_teacher
from arcface_kd.teachers.cache.embedding_cache import EmbeddingCache, identity_of
from arcface_kd.teachers.cache.fill import fill_cache
from arcface_kd.training.trainer import train
from tests.compatibility.same_losses import losses_of
from tests.forked import free_port, ranks_environment, start, wait
from tests.host.trainer.faces import Faces
from tests.host.trainer.host import settings
from tests.host.trainer.launch import write_config

_PATIENCE = 400.0
_CHANGES = ("open", "os.rename", "os.remove", "os.truncate", "os.chmod", "os.mkdir")


def count_changes(folder: str, kill_at: int | None) -> Callable[[], int]:
    """Count this process's changes below a folder, and kill it before change ``kill_at``, from 1; None for never."""
    changes = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal changes
        if event not in _CHANGES or not (arguments and str(arguments[0]).startswith(folder)):
            return
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        changes += 1
        if changes == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return lambda: changes


def _run(work: Callable[..., Any], arguments: Sequence[Any], folder: str, kill_at: int | None, tally: str) -> int:
    changes = count_changes(folder, kill_at)
    try:
        work(*arguments)
    except RankError:
        return 3
    Path(tally).write_text(str(changes()))
    return 0


@dataclass
class Job:
    """Something that is begun, killed and begun again until it is done."""

    folder: Path  # what it writes; the campaign's own
    faces: Faces
    teacher: Path
    ranks: int = 1
    seconds: float = field(default=0.0, init=False)  # that it takes undisturbed
    changes: int = field(default=1, init=False)  # to its folder that it makes undisturbed
    name: ClassVar[str] = ""
    codes: ClassVar[frozenset[int]] = frozenset({0, 3, -signal.SIGKILL})  # of its processes when one was killed
    always_a_group: ClassVar[bool] = False  # whether a lone process meets itself too

    def work(self) -> tuple[Callable[..., Any], Sequence[Any]]:
        """A function and its arguments, which begin the job or go on with it."""
        raise NotImplementedError

    def check_whole(self) -> None:
        """Hold every file against what it should be after a kill: old or new."""
        raise NotImplementedError

    def outcome(self) -> Any:
        """What the job came to, to be compared bit for bit."""
        raise NotImplementedError

    def agrees(self, found: Any, wanted: Any) -> bool:
        """Whether an outcome is that of the undisturbed job."""
        return same(found, wanted)

    def _start(self, kill_at: int | None = None, killed_rank: int = 0) -> list[BaseProcess]:
        function, arguments = self.work()
        grouped = self.ranks > 1 or self.always_a_group
        port = free_port() if grouped else 0
        return [
            start(
                *(_run, function, arguments, str(self.folder), kill_at if rank == killed_rank else None),
                str(self.folder.parent / f"{self.name}{rank}.changes"),
                log=self.folder.parent / f"{self.name}{rank}.log",
                environment=ranks_environment(self.ranks, port, rank) if grouped else None,
            )
            for rank in range(self.ranks)
        ]

    def _said(self) -> str:
        logs = [self.folder.parent / f"{self.name}{rank}.log" for rank in range(self.ranks)]
        return "\n".join(log.read_text()[-3000:] for log in logs)

    def finish(self) -> None:
        """Run it to its end, and note how long that takes and how many changes it makes."""
        began = time.monotonic()
        codes = wait(self._start(), _PATIENCE)
        assert codes == [0] * self.ranks, (self.name, codes, self._said())
        self.seconds = time.monotonic() - began
        self.changes = int((self.folder.parent / f"{self.name}0.changes").read_text())

    def kill(self, draw: random.Random) -> bool:
        """Run it and kill one of its ranks or all, at a moment or before a change; False where it had ended before."""
        if draw.random() < 0.5:
            victim = draw.randrange(self.ranks)
            # Ranks other than 0 write less, and what goes on writes less than what begins.
            processes = self._start(draw.randint(1, max(2, self.changes // 2) if victim == 0 else 6), victim)
        else:
            processes = self._start()
            processes[0].join(draw.uniform(0.0, 0.8 * self.seconds))
            for process in draw.sample(processes, draw.randint(1, self.ranks)):
                process.kill()
        codes = wait(processes, _PATIENCE)
        assert set(codes) <= self.codes, (self.name, codes, self._said())
        return any(code != 0 for code in codes)

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()


def _config(faces: Faces, output: Path, teacher: Path, **keys: Any) -> EasyDict:
    made: dict[str, Any] = {
        **BASE,
        **{"network": "thin_r18", "rec": str(faces.folder), "num_classes": faces.num_classes},
        **{"num_image": faces.num_image, "num_epoch": 3, "warmup_epoch": 0, "val_targets": [], "embedding_size": 16},
        **{"batch_size": 4, "frequent": 1, "num_workers": 0, "output": str(output), "save_all_states": True},
        **{"kd": "adadistill", "kd_teacher": str(teacher)},
    }
    return EasyDict({**made, **keys})


def same(one: Any, other: Any) -> bool:
    """Whether two nested values are equal, tensors to the bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, Mapping):
        return isinstance(other, Mapping) and one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


class Training(Job):
    """Training with checkpoints, the cache filled on the way."""

    name = "training"

    def work(self) -> tuple[Callable[..., Any], Sequence[Any]]:
        output = self.folder / "run"
        resume = (output / "checkpoint_gpu_0.pt").exists()
        keys = {"resume": resume, "kd_cache": str(self.folder / "rows"), "gradient_acc": 3}
        return train, [_config(self.faces, output, self.teacher, **keys)]

    def check_whole(self) -> None:
        output = self.folder / "run"
        for path in [*output.glob("*.pt"), *output.glob("*.pt.next")]:
            assert archive_fault(path) is None, path
            torch.load(path, weights_only=True)
        files = checkpoints_in_force(output) if output.exists() else {}
        steps = {read_checkpoint(path)["global_step"] for path in files.values()}
        assert len(steps) <= 1, steps
        assert not files or len(files) == self.ranks
        assert not files or (output / "model.pt").exists()
        _check_cache(self.folder / "rows", self.faces)

    def outcome(self) -> Any:
        output = self.folder / "run"
        assert not list(output.glob(".*.part"))
        assert not list(output.glob("*.next"))
        scalars = read_scalars(output / "tensorboard")
        states = [torch.load(output / f"checkpoint_gpu_{rank}.pt", weights_only=True) for rank in range(self.ranks)]
        curves = {name: scalars[name].y.tolist() for name in ("loss", "kd/ce", "kd/alpha_mean", "learning_rate")}
        return [
            {"steps": scalars["loss"].x.tolist(), **curves},
            torch.load(output / "model.pt", weights_only=True),
            states,
            (self.folder / "rows").read_bytes(),
        ]


def _check_cache(file: Path, faces: Faces) -> None:
    header = file.with_name(file.name + ".json")
    if header.exists():
        identity = json.loads(header.read_text())
        assert file.stat().st_size == 4 * faces.num_image * 16
        # A row is there or it is not: half of one, which only a machine that lost its power leaves, counts as missing.
        EmbeddingCache(file, identity, create=False).filled()


def _train_in_host(checkout: str, config: str, arguments: Sequence[str]) -> None:
    os.chdir(checkout)
    sys.path.insert(0, checkout)
    sys.argv = ["train_v2.py", f"configs/{config}", *arguments]
    runpy.run_path("train_v2.py", run_name="__main__")


class TrainingInTheHost(Job):
    """Distilling in arcface_torch, the cache filled on the way, by one process or several.

    The host writes its checkpoints over the old ones, rank by rank: killed there, it leaves what nobody can go on
    with. Then our reader must say so, and the run goes on from the copies that its user has kept.
    """

    name = "host"
    # What a rank of the host ends with when another one is gone.
    codes = frozenset({0, 1, -signal.SIGKILL})
    always_a_group = True
    steps = 6

    def work(self) -> tuple[Callable[..., Any], Sequence[Any]]:
        output = self.folder / "run"
        self.resumed_at = self._saved_step()
        keys = {"num_epoch": 3, "num_workers": 0, "embedding_size": 16, "resume": self.resumed_at > 0}
        keys["batch_size"] = self.faces.num_image // (self.ranks * self.steps // 3)
        checkout = self.folder.parent / "arcface_torch"
        name = write_config(checkout, f"{self.name}{self.ranks}", settings(self.faces, output, **keys))
        flags = ["--kd", "adadistill", "--kd-teacher", str(self.teacher), "--kd-cache", str(self.folder / "rows")]
        return _train_in_host, [str(checkout), name, flags]

    def _saved_step(self) -> int:
        output = self.folder / "run"
        if not (output / "checkpoint_gpu_0.pt").exists():
            return 0
        return int(read_checkpoint(output / "checkpoint_gpu_0.pt")["global_step"])

    def check_whole(self) -> None:
        _check_cache(self.folder / "rows", self.faces)
        output, kept = self.folder / "run", self.folder / "kept"
        kept.mkdir(exist_ok=True)
        names = [f"checkpoint_gpu_{rank}.pt" for rank in range(self.ranks)]
        steps = {}
        for path in [output / name for name in names if (output / name).exists()]:
            # A file that torch is in the middle of has no end, where the list of its records is.
            if archive_fault(path) is None:
                steps[path.name] = read_checkpoint(path)["global_step"]
        if len(steps) == self.ranks and len(set(steps.values())) == 1:
            assert open_shards(output).world_size == self.ranks
            for name in names:
                shutil.copy(output / name, kept)
            return
        with pytest.raises(CheckpointError) as caught:
            open_shards(output)
        assert "\n" not in str(caught.value)
        for name in names:
            (output / name).unlink(missing_ok=True)
            if (kept / name).exists():
                shutil.copy(kept / name, output)

    def outcome(self) -> Any:
        output = self.folder / "run"
        traces = {tag: losses_of(output, tag) for tag in ("kd/ce", "kd/alpha_mean", "kd/adadistill")}
        # What the first process of all has written may have died with it; from the last checkpoint on all is there.
        assert set(range(self.resumed_at + 1, self.steps + 1)) <= set(traces["kd/ce"]) <= set(range(1, self.steps + 1))
        states = [torch.load(output / f"checkpoint_gpu_{rank}.pt", weights_only=True) for rank in range(self.ranks)]
        rows = (self.folder / "rows").read_bytes()
        return traces, [torch.load(output / "model.pt", weights_only=True), states, rows]

    def agrees(self, found: Any, wanted: Any) -> bool:
        (traces, files), (straight, wanted_files) = found, wanted
        return same(files, wanted_files) and all(
            value == straight[tag][step] for tag, trace in traces.items() for step, value in trace.items()
        )


class CacheBuilding(Job):
    """``arcface-kd cache``."""

    name = "cache"

    def work(self) -> tuple[Callable[..., Any], Sequence[Any]]:
        return fill_cache, [_config(self.faces, self.folder, self.teacher, kd_cache=str(self.folder / "rows"))]

    def check_whole(self) -> None:
        _check_cache(self.folder / "rows", self.faces)

    def outcome(self) -> Any:
        faces = open_dataset(self.faces.folder)
        teacher = load_teacher(self.teacher)
        cache = EmbeddingCache(self.folder / "rows", identity_of(teacher, fingerprint(faces), len(faces)))
        assert cache.filled() == 2 * len(faces)
        index = torch.arange(len(faces)).repeat_interleave(2)
        rows, _ = cache.look_up(index, torch.tensor([False, True]).repeat(len(faces)))
        # An image may stand in a batch of another size, which the last bits of its embedding may depend on.
        return (rows * 500).round()


def _pack(source: str, out: str) -> None:
    try:
        pack_folder(source, out)
    except DataError as error:
        # What a writer that was killed in the last moment has left is for a person to take away.
        if "train.rec exists without its index" not in str(error):
            raise
        (Path(out) / "train.rec").unlink()
        pack_folder(source, out)


class Packing(Job):
    """``arcface-kd data pack``."""

    name = "packing"

    def work(self) -> tuple[Callable[..., Any], Sequence[Any]]:
        source = self.folder.parent / "images"
        if not source.exists():
            faces = RecordDataset(self.faces.folder)
            for index in range(len(faces)):
                (source / str(faces.label(index))).mkdir(parents=True, exist_ok=True)
                (source / str(faces.label(index)) / f"{index}.jpg").write_bytes(faces.image_bytes(index))
        if (self.folder / "packed" / "train.idx").exists():
            shutil.rmtree(self.folder / "packed")
        return _pack, [str(source), str(self.folder / "packed")]

    def check_whole(self) -> None:
        packed = self.folder / "packed"
        if (packed / "train.idx").exists():
            assert (packed / "property").exists()
            faces = RecordDataset(packed, num_classes=self.faces.num_classes)
            assert len(faces) == self.faces.num_image
            for index in range(len(faces)):
                faces[index]

    def outcome(self) -> Any:
        packed = self.folder / "packed"
        return {path.name: path.read_bytes() for path in packed.iterdir()}


def _export(student: str, out: str, content: str) -> None:
    """Export, but convert once: what is killed is the check and the writing."""
    convert = onnx_export.to_onnx

    def converted(student: Any) -> bytes:
        if not Path(content).exists():
            with atomic_write(content) as stream:
                stream.write(convert(student))
        return Path(content).read_bytes()

    onnx_export.to_onnx = converted
    onnx_export.export(student, out)


class Exporting(Job):
    """``arcface-kd export`` over an older file."""

    name = "exporting"
    older: ClassVar[bytes] = b"an older file"

    def work(self) -> tuple[Callable[..., Any], Sequence[Any]]:
        out = self.folder / "student.onnx"
        if not out.exists():
            out.write_bytes(self.older)
        return _export, [str(self.teacher), str(out), str(self.folder.parent / "converted.onnx")]

    def check_whole(self) -> None:
        content = (self.folder / "student.onnx").read_bytes()
        whole = (self.folder.parent / "converted.onnx").read_bytes()
        assert content in (self.older, whole)
        (self.folder / "student.onnx").write_bytes(self.older)

    def outcome(self) -> Any:
        return {path.name: path.read_bytes() for path in self.folder.iterdir()}


def campaign(job: Job, kills: int, draw: random.Random) -> tuple[int, int]:
    """Kill a job so often, and see that it always comes to what it comes to undisturbed: kills and ends."""
    job.clear()
    job.finish()
    wanted = job.outcome()
    job.clear()
    killed = finished = 0
    while killed < kills:
        if job.kill(draw):
            killed += 1
            job.check_whole()
            continue
        assert job.agrees(job.outcome(), wanted), f"{job.name}: another outcome after {killed} kills"
        finished += 1
        job.clear()
    job.finish()
    assert job.agrees(job.outcome(), wanted), f"{job.name}: another outcome after {killed} kills"
    return killed, finished + 1
