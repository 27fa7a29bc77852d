r"""Train every method for a few steps in two checkouts, and compare what they log and leave, bit for bit.

    .venv/bin/python tests/compatibility/same_losses.py OLD_CHECKOUT NEW_CHECKOUT [--only WORD ...] [--keep FOLDER]

Each checkout needs a ``.venv`` with the package installed. Only the command line is used, so modules may have moved.
The exit code is 0 when nothing differs. Losses are equal to the last bit only on one machine with one torch. Commit
665d537 changed GKD's groups on purpose: compare GKD with that one or a later one. Commits 6e4d5c9 and
f347423 changed the order of the sums of EKD and RKD: these differ from earlier ones in the last digits.
"""

import argparse
import contextlib
import gc
import hashlib
import io
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

# More classes than a batch has rows, so that a sample rate leaves some out.
CLASSES, IMAGES, DIMENSION, BATCH = 24, 2, 32, 8
# Of the run, not of what it computes.
NOT_COMPARED = ("images_per_second",)

# Options under which a method computes something else than by its defaults.
VARIANTS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "adadistill": (("adadistill.alpha=plain",), ("student.projection=linear",)),
    "embedding": (("embedding.labels=none",), ("embedding.distance=cosine",), ("student.projection=linear",)),
    "gkd": (
        ("gkd.ramp_epochs=1", "gkd.group=sample", "gkd.secondary_weight=1"),
        ("gkd.ramp_epochs=0", "gkd.step=2", "gkd.ranked_by=teacher", "gkd.logits=plain"),
        ("gkd.ramp_epochs=0", "gkd.group=fixed", "gkd.size=4"),
    ),
    "kd": (("kd.logits=margin", "kd.temperature=2"),),
    "crosskd": (("crosskd.mimic=both", "crosskd.statistics=all"), ("crosskd.adapter=conv", "crosskd.tap=1")),
    "tcs": (("tcs.basis=random", "tcs.drop=0", "tcs.dimension=8"), ("tcs.rounds=2", "tcs.drop_begin=0.1")),
}
DEFAULTS: Mapping[str, tuple[str, ...]] = {"gkd": ("gkd.ramp_epochs=1",)}


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        kd: methods joined by ``+``; empty for the student alone.
        options: ``--kd-option``.
        ranks: processes.
        sample_rate: share of the classes in a step.
        cached: whether the teacher's embeddings come from a cache that was filled before.
        keys: further keys of the config.
    """

    kd: str
    options: tuple[str, ...] = ()
    ranks: int = 1
    sample_rate: float = 1.0
    cached: bool = False
    keys: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What the table calls it."""
        teacher = "" if not self.kd else ", cached" if self.cached else ", online"
        words = " ".join((*self.options, *(f"{key}={value}" for key, value in self.keys.items())))
        ranks = "1 rank" if self.ranks == 1 else f"{self.ranks} ranks"
        return f"{self.kd or 'student alone'}, {ranks}, sample_rate {self.sample_rate:g}{teacher}{words and ' '}{words}"


def cases(methods: list[str]) -> list[Case]:
    """All runs of the installed methods."""
    found: list[Case] = []
    for ranks in (1, 2):
        for rate in (1.0, 0.3):
            found.append(Case("", (), ranks, rate))
            for kd in (*(name for name in methods if name != "shkd"), "adadistill+embedding", "gkd+embedding"):
                options = DEFAULTS.get(kd.partition("+")[0], ())
                # TCS takes nothing but the cache.
                teachers = (True,) if kd == "tcs" else (False, True)
                found += [Case(kd, options, ranks, rate, cached) for cached in teachers]
        for kd, variants in VARIANTS.items():
            found += [Case(kd, options, ranks, cached=kd == "tcs") for options in variants]
        found.append(Case("adadistill", (), ranks, keys={"gradient_acc": 3, "optimizer": "adamw", "lr": 0.001}))
        found.append(Case("kd", (), ranks, cached=True, keys={"kd_classifier": "class-means"}))
        if "shkd" in methods:
            found.append(Case("shkd", ("shkd.distil=kd",), ranks))
            found.append(Case("shkd", ("shkd.distil=gkd",), ranks, 0.3, cached=True))
    return found


def losses_of(folder: Path, tag: str = "loss") -> dict[int, float]:
    """The fp32 values that a run has written to TensorBoard, by step; those of a resumed run count."""
    return scalars_of(folder).get(tag, {})


def scalars_of(folder: Path) -> dict[str, dict[int, float]]:
    """All fp32 values that a run has written to TensorBoard, by tag and step."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util.tensor_util import make_ndarray

    found: dict[str, dict[int, float]] = {}
    files = (folder / "tensorboard").glob("events.out.tfevents.*")
    for path in sorted(files, key=lambda path: path.stat().st_mtime_ns):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                found.setdefault(value.tag, {})[event.step] = float(make_ndarray(value.tensor))
    return found


def draw_images(folder: Path) -> None:
    """Identities as coarse patterns under noise, a sub-folder for each."""
    import cv2
    import numpy as np

    random = np.random.default_rng(0)
    for identity in range(CLASSES):
        (folder / f"{identity:02}").mkdir(parents=True)
        pattern = cv2.resize(random.uniform(0, 255, (6, 6, 3)), (112, 112), interpolation=cv2.INTER_CUBIC)
        for image in range(IMAGES):
            noisy = np.clip(pattern + random.normal(0, 25, pattern.shape), 0, 255).astype(np.uint8)
            assert cv2.imwrite(str(folder / f"{identity:02}" / f"{image}.png"), noisy)


def write_config(path: Path, keys: Mapping[str, Any]) -> str:
    """Write a config as arcface_torch reads it; returns its path, as a word of a command line."""
    lines = ["from easydict import EasyDict as edict", "", "config = edict()"]
    path.write_text("\n".join([*lines, *(f"config.{key} = {value!r}" for key, value in keys.items()), ""]))
    return str(path)


def settings(case: Case, data: Path, output: Path) -> dict[str, Any]:
    """The config of a run on the records and the teacher in a folder."""
    options = list(case.options)
    keys: dict[str, Any] = {
        "rec": str(data / "records"),
        "num_classes": CLASSES,
        "num_image": CLASSES * IMAGES,
        "num_epoch": 2,
        "warmup_epoch": 0,
        "val_targets": [],
        "network": "thin_r18",
        "embedding_size": DIMENSION // 2 if "student.projection=linear" in options else DIMENSION,
        "margin_list": (1.0, 0.3, 0.0),
        "sample_rate": case.sample_rate,
        "batch_size": BATCH // case.ranks,
        "lr": 0.05,
        "frequent": 1,
        "verbose": 10**6,
        "num_workers": 0,
        "save_all_states": True,
        "output": str(output),
    }
    if case.kd:
        keys |= {"kd": case.kd, "kd_teacher": str(data / "teacher" / "model.pt"), "kd_option": options}
        if not case.kd.startswith("shkd"):
            keys["kd_classifier"] = str(data / "teacher")
    return {**keys, **case.keys}


def _arcface_kd(*words: str) -> tuple[int, str]:
    """Run a command in this process; returns its exit code and what it printed to stderr."""
    (entry,) = {each.value: each for each in metadata.entry_points(group="console_scripts", name="arcface-kd")}.values()
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = entry.load()(list(words))
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException:
            return 1, traceback.format_exc()
    return code, printed.getvalue()


def run_case(case: Case, data: Path, folder: Path) -> dict[str, Any]:
    """Train once, in this process.

    Returns ``{"values": {"FOLDER TAG": {step: value}}, "weights": digest}``, or ``{"refused": line}``.
    """
    output = folder / "run"
    keys = settings(case, data, output)
    if case.cached:
        keys["kd_cache"] = str(folder / "rows")
    config = write_config(folder / "config.py", keys)
    if case.cached:
        code, said = _arcface_kd("cache", config)
        if code:
            return {"refused": said}
    code, said = _arcface_kd("train", config)
    if code:
        return {"refused": said}
    values = {
        f"{run.relative_to(output)} {tag}": {str(step): value for step, value in found.items()}
        for run in sorted(path.parent for path in output.rglob("tensorboard"))
        for tag, found in scalars_of(run).items()
        if tag not in NOT_COMPARED
    }
    return {"values": values, "weights": _digest(output)}


def _digest(output: Path) -> str:
    """Over the weights of all students, and the heads' parameters and buffers on all ranks, by name."""
    import torch

    digest = hashlib.sha256()
    for path in sorted(output.rglob("*.pt")):
        content = torch.load(path, map_location="cpu", weights_only=True)
        parts = [content] if path.name == "model.pt" else [content["state_dict_softmax_fc"]]
        for name, tensor in sorted(parts[0].items()):
            # Beside these, a head's state says what the run was begun with, in bytes.
            if not name.endswith("_extra_state"):
                digest.update(f"{path.relative_to(output)} {name}".encode())
                digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def child(plan: Path) -> None:
    """Run the cases of a file in one process, or in one of several ranks; rank 0 writes the results beside it."""
    from torch import distributed

    told = json.loads(plan.read_text())
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        # One group for all runs; the package joins a group that is there.
        distributed.init_process_group("gloo", timeout=timedelta(seconds=180))
    results = {}
    for number, words in told["cases"].items():
        case = Case(**words)
        folder = plan.parent / number
        folder.mkdir(exist_ok=True)
        if world_size > 1:
            distributed.barrier()
        results[number] = run_case(case, Path(told["data"]), folder)
        if rank == 0:
            print(f"{plan.parent.name}: {case.name}", file=sys.stderr, flush=True)
            plan.with_suffix(".results.json").write_text(json.dumps(results))
    if world_size > 1:
        # As in `process_group`: a DistributedDataParallel must not outlive its group.
        gc.collect()
        distributed.destroy_process_group()


def _python(checkout: Path) -> str:
    python = checkout.absolute() / ".venv" / "bin" / "python"
    if not python.exists():
        raise SystemExit(f"{checkout} has no .venv/bin/python: run `make test` in it, or install it there")
    return str(python)


def _start(checkout: Path, ranks: int, *words: str, **options: Any) -> "subprocess.CompletedProcess[str]":
    launch = [] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("PYTHONPATH", None)
    return subprocess.run([_python(checkout), *launch, *words], env=environment, text=True, check=True, **options)


def _run_all(checkout: Path, runs: Mapping[str, Case], data: Path, folder: Path) -> dict[str, Any]:
    """The results of all cases in one checkout."""
    results: dict[str, Any] = {}
    folder.mkdir()
    for ranks in sorted({case.ranks for case in runs.values()}):
        mine = {number: asdict(case) for number, case in runs.items() if case.ranks == ranks}
        plan = folder / f"plan{ranks}.json"
        plan.write_text(json.dumps({"cases": mine, "data": str(data)}))
        _start(checkout, ranks, str(Path(__file__).absolute()), "--child", str(plan), cwd=folder)
        results |= json.loads(plan.with_suffix(".results.json").read_text())
    return results


def _prepare(checkout: Path, folder: Path) -> None:
    """Draw records, and train a teacher on them, whose run is also its classifier."""
    draw_images(folder / "images")
    records = folder / "records"
    quiet: dict[str, Any] = {"cwd": folder, "stdout": subprocess.DEVNULL}
    _start(checkout, 1, "-m", "arcface_kd", "data", "pack", str(folder / "images"), str(records), **quiet)
    keys = settings(Case(""), folder, folder / "teacher") | {"num_epoch": 12, "margin_list": (1.0, 0.0, 0.0)}
    config = write_config(folder / "teacher.py", keys)
    _start(checkout, 1, "-m", "arcface_kd", "train", config, **quiet)


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """What differs between two results, in a few words; empty where nothing does."""
    if "refused" in old or "refused" in new:
        if "refused" in old and "refused" in new:
            return ""
        which = "old" if "refused" in old else "new"
        lines = str(old.get("refused", new.get("refused"))).strip().splitlines()
        return f"refused by the {which} checkout only: {lines[-1] if lines else 'without a word'}"
    wrong = []
    for tag, values in old["values"].items():
        if tag not in new["values"]:
            wrong.append(f"{tag} is not logged")
        elif values != (met := new["values"][tag]):
            step = next((step for step in values if met.get(step) != values[step]), None)
            told = "has more steps" if step is None else f"step {step}: {values[step]!r} and {met.get(step)!r}"
            wrong.append(f"{tag} {told}")
    if not wrong and old["weights"] != new["weights"]:
        wrong.append("the weights")
    losses_first = sorted(wrong, key=lambda text: not text.partition(" ")[2].startswith("loss"))
    return "; ".join(losses_first[:3]) + (f"; {len(wrong) - 3} more" if len(wrong) > 3 else "")


def main() -> int:
    """Compare two checkouts, or run the cases of one."""
    parser = argparse.ArgumentParser(description="Compare the losses of two checkouts, bit for bit.")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("old", type=Path, nargs="?")
    parser.add_argument("new", type=Path, nargs="?")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="cases whose names have all these words in them")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="leave the runs in this new folder")
    arguments = parser.parse_args()
    if arguments.child is not None:
        child(arguments.child)
        return 0
    if arguments.new is None:
        parser.error("two checkouts are needed: OLD_CHECKOUT NEW_CHECKOUT")
    with contextlib.ExitStack() as stack:
        if arguments.keep is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        else:
            folder = arguments.keep.absolute()
            folder.mkdir(parents=True)
        listed = _start(arguments.old, 1, "-m", "arcface_kd", "methods", cwd=folder, stdout=subprocess.PIPE).stdout
        found = [case for case in cases([line.split()[0] for line in listed.splitlines()])]
        found = [case for case in found if all(word in case.name for word in arguments.only or ())]
        runs = {str(number): case for number, case in enumerate(found)}
        data = folder / "data"
        data.mkdir()
        _prepare(arguments.old, data)
        old = _run_all(arguments.old, runs, data, folder / "old")
        new = _run_all(arguments.new, runs, data, folder / "new")
    failed, refused = 0, 0
    for number, case in runs.items():
        difference = compare(old[number], new[number])
        failed, refused = failed + bool(difference), refused + ("refused" in old[number])
        verdict = difference or ("refused by both" if "refused" in old[number] else "equal")
        print(f"{case.name:90} {verdict}")
    print(f"{len(runs)} runs: {len(runs) - failed - refused} equal, {refused} refused by both, {failed} differ")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
