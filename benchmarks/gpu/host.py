"""Check 7: arcface_torch's own train_v2.py on one rank, over nccl, in fp16."""

import math
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from arcface_kd.host.checkout import find_checkout
from arcface_kd.host.patching import patch_checkout
from benchmarks.gpu.checks import Findings, Place, Skipped
from benchmarks.gpu.processes import fallbacks
from benchmarks.gpu.runs import Runs

_TWENTY_STEPS = ("embedding", "kd", "gkd", "crosskd", "tcs")
# Of the first loss, and of the others: on a GPU two runs with the same seed part by and by.
_APART = {"cpu": (0.0, 0.0), "cuda": (1e-3, 0.1)}


class _Trainers:
    """Copies of the host: patched with the flag, and without it."""

    def __init__(self, place: Place) -> None:
        if place.host is None:
            raise Skipped("ARCFACE_TORCH is not set: it names a checkout of insightface/recognition/arcface_torch")
        self.place = place
        needed = ["current_stack", *([] if place.device.type == "cuda" else ["cpu_gloo"])]
        self.folders = {}
        for name in ("flag", "plain"):
            folder = place.scratch / f"host_{name}"
            shutil.copytree(find_checkout(place.host), folder, ignore=shutil.ignore_patterns("work_dirs", ".git"))
            patch_checkout(folder, needed)
            # The folder may have been patched before.
            patch_checkout(folder, ["kd_flag"], revert=name == "plain")
            if find_spec("sklearn") is None:
                _stand_in_for_sklearn(folder / "sklearn")
            self.folders[name] = folder

    def start(self, config: Mapping[str, Any], *flags: str, host: str = "flag", compiles: bool = True) -> "_Running":
        """Start a run in a trainer's folder; several may run at once."""
        folder, output = self.folders[host], Path(config["output"])
        lines = ["from easydict import EasyDict as edict", "config = edict()"]
        lines += [f"config.{key} = {value!r}" for key, value in config.items()]
        (folder / "configs" / f"{output.name}.py").write_text("\n".join([*lines, ""]), encoding="utf-8")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=1"]
        launch += ["--master_addr=127.0.0.1", f"--master_port={port}", "train_v2.py", f"configs/{output.name}", *flags]
        log = self.place.scratch / f"{output.name}.log"
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if not compiles:
            environment["TORCH_COMPILE_DISABLE"] = "1"
        with log.open("ab") as stream:
            process = subprocess.Popen(launch, cwd=folder, env=environment, stdout=stream, stderr=subprocess.STDOUT)
        return _Running(process, log, output)


def _stand_in_for_sklearn(folder: Path) -> None:
    """What the host's verification imports and these runs, which verify nothing, never call."""
    folder.mkdir()
    for file, name in {"__init__": "__version__", "decomposition": "PCA", "model_selection": "KFold"}.items():
        (folder / f"{file}.py").write_text(f"{name} = None\n", encoding="utf-8")


class _Running:
    def __init__(self, process: "subprocess.Popen[bytes]", log: Path, output: Path) -> None:
        self.process, self.log, self.output = process, log, output

    def losses(self, name: str, found: Findings) -> dict[int, float]:
        """Wait for the end; the losses that the host wrote, by step, empty where the run failed."""
        code = self.process.wait()
        if code:
            # What torchrun has to say comes last, and does not tell why.
            said, *_ = self.log.read_text("utf-8", "replace").partition("failed (exitcode")
            found.expect(False, f"{name} ended with {code}: {said[-1500:]}")
            return {}
        for line in fallbacks(self.log):
            found.expect(False, f"{name}: {line}")
        losses = _trace(self.output)
        found.expect(
            len(losses) > 0 and all(math.isfinite(loss) for loss in losses.values()), f"{name}: no finite losses"
        )
        return losses


def _trace(output: Path) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util.tensor_util import make_ndarray

    losses: dict[int, float] = {}
    for path in sorted(
        (output / "tensorboard").glob("events.out.tfevents.*"), key=lambda file: file.stat().st_mtime_ns
    ):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.tag == "loss":
                    losses[event.step] = float(make_ndarray(value.tensor))
    return losses


def _mean(losses: Sequence[float]) -> float:
    return sum(losses) / len(losses)


def trainer(place: Place, found: Findings) -> None:
    """150 steps of AdaDistill, the last third resumed; 20 of others; without ``--kd`` the trainer is what it was."""
    trainers = _Trainers(place)
    name, long, short, batch = ("thin_r18", 4, 4, 8) if place.tiny else ("r50", 256, 100, 40)
    student = "mbf"
    # The host's own mbf has no other.
    runs, little = (Runs(place, name, student, identities, batch, dimension=512) for identities in (long, short))
    size = {"frequent": 1, "num_workers": 2, "fp16": not place.tiny}
    whole = runs.config("host_adadistill", num_epoch=2, **size)
    first = trainers.start(whole, "--kd", "adadistill", *_teacher(runs))
    others = {}
    if not place.tiny:
        cache = ["--kd-cache", str(little.cache)]
        for method in _TWENTY_STEPS:
            classifier = ["--kd-classifier", "class-means"] if method in ("kd", "gkd") else []
            flags = ["--kd", method, *_teacher(little), *cache, *classifier]
            # Twenty steps take less time than to compile kernels, which check 3 does for each method.
            others[method] = trainers.start(little.config(f"host_{method}", **size), *flags, compiles=False)
    off = {host: trainers.start(little.config(f"host_off_{host}", **size), host=host) for host in trainers.folders}
    before = first.losses("adadistill", found)
    again = trainers.start({**whole, "num_epoch": 3, "resume": True}, "--kd", "adadistill", *_teacher(runs))
    for method, running in others.items():
        losses = running.losses(method, found)
        found.add(f"{method}: steps", len(losses) and max(losses))
        found.add(f"{method}: last loss", losses[max(losses)] if losses else "none")
    _compare_off({host: running.losses(f"off, {host}", found) for host, running in off.items()}, place, found)
    after = again.losses("adadistill, resumed", found)
    found.add("adadistill: steps", max(after, default=0))
    found.expect(max(after, default=0) == 3 * runs.steps, f"the resumed run ended after step {max(after, default=0)}")
    if before and after:
        begin = _mean([before[step] for step in sorted(before)[:3]])
        saved = max(before)
        last, first_again = _mean(list(before.values())[-3:]), _mean([after[saved + step] for step in (2, 3)])
        found.add("adadistill: first losses", begin)
        found.add("adadistill: losses before the stop", last)
        found.add("adadistill: losses after it", first_again)
        found.expect(last < begin, f"the loss went from {begin:.3g} to {last:.3g}")
        if not place.tiny:
            found.expect(first_again < (begin + last) / 2, "the resumed run does not go on where it stopped")


def _teacher(runs: Runs) -> list[str]:
    return ["--kd-teacher", str(runs.teacher_path)]


def _compare_off(losses: Mapping[str, Mapping[int, float]], place: Place, found: Findings) -> None:
    flag, plain = losses["flag"], losses["plain"]
    found.expect(bool(plain) and flag.keys() == plain.keys(), "without --kd, patched and unpatched trainer part")
    apart = [abs(flag[step] - plain[step]) / abs(plain[step]) for step in sorted(plain) if step in flag]
    if apart:
        found.add("without --kd: relative difference of the first loss from the unpatched trainer", apart[0])
        found.add("without --kd: largest relative difference of a loss from the unpatched trainer", max(apart))
        first, others = _APART[place.device.type]
        held = apart[0] <= first and max(apart) <= others
        found.expect(held, f"without --kd the losses differ by {apart[0]:.1e} at first, then {max(apart):.1e}")
