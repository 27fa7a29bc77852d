"""Students of real faces over epochs, views and seeds: each is trained and judged, and gives rows of curves.csv.

    ARCFACE_KD_REAL_DATA=DIR python -m benchmarks.curves --kd embedding --epochs 12 30 --augment flip quality

Runs whose rows are there are passed over and runs that were stopped go on, so that days of training come in pieces.
The settings are those of docs/results.md.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path
from statistics import fmean

from benchmarks import record
from benchmarks.plots import PICTURES, draw_curves

CURVES = record.ROOT / "benchmarks" / "curves.csv"

_LOW_RES = (14, 28, 56)
_TEACHER = ["teacher.channels=bgr", "teacher.mean=127", "teacher.std=128"]
_CONFIG = """\
from easydict import EasyDict

config = EasyDict(
    rec={records!r}, num_classes=985, num_image=6433, val_targets=[], embedding_size=512, fp16=True, batch_size=128,
    lr=0.1, weight_decay=5e-4, warmup_epoch=0, margin_list=(1.0, 0.5, 0.0), num_workers=1, frequent=50, verbose=10**9,
    save_all_states=True,
)
"""


@dataclass(frozen=True)
class Student:
    """What is trained.

    Attributes:
        network: of the student.
        kd: the method, empty for the student alone.
        options: of the method, separated by blanks.
        augment: ``student.augment``.
        sees: ``student.augment.teacher``.
        schedule: keys of the config that differ, as ``KEY=VALUE`` separated by blanks.
        epochs: of the whole run, whose learning rate falls to 0 in them.
        seed: of the run.
    """

    network: str
    kd: str
    options: str
    augment: str
    sees: str
    schedule: str
    epochs: int
    seed: int

    @property
    def name(self) -> str:
        """Its folder, the same for all of its rows."""
        values = (str(getattr(self, field.name)) for field in fields(Student))
        return "-".join(values).replace(" ", "_").replace("/", "_")


@dataclass(frozen=True)
class Row(Student):
    """A student on one set of pairs, accuracy and TAR in percent; ``hours`` is the training's wall time."""

    pairs: str
    accuracy: float
    tar: float
    hours: float
    commit: str


def read(path: Path = CURVES) -> list[Row]:
    """The rows that are there."""
    return record.read(path, Row) if path.is_file() else []


def _run(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "arcface_kd", *arguments], check=True)


def _train(student: Student, data: Path, work: Path) -> float:
    """Train one student, or go on with it; returns the hours that all of its pieces took."""
    folder = work / student.name
    folder.mkdir(parents=True, exist_ok=True)
    config = work / "real_faces.py"
    config.write_text(_CONFIG.format(records=str(data / "faces_real")))
    arguments = ["train", str(config), "--kd", student.kd]
    views = [f"student.augment={student.augment}", f"student.augment.teacher={student.sees}"]
    if student.kd:
        arguments += ["--kd-teacher", str(data / "teachers" / "mobilefacenet_512.onnx")]
        views += _TEACHER
        if student.sees == "clean":
            arguments += ["--kd-cache", str(work / "teacher.cache")]
    arguments += ["--kd-option", *views, *student.options.split()]
    resume = (folder / "checkpoint_gpu_0.pt").is_file()
    keys = {"network": student.network, "num_epoch": student.epochs, "seed": student.seed, "output": folder}
    arguments += ["--set", *(f"{key}={value}" for key, value in keys.items()), f"resume={resume}"]
    arguments += student.schedule.split()
    hours = folder / "hours"
    before = float(hours.read_text()) if resume and hours.is_file() else 0.0
    began = time.time()
    try:
        _run(*arguments)
    finally:
        total = before + (time.time() - began) / 3600
        hours.write_text(f"{total}")
    return total


def measure(student: Student, data: Path, work: Path) -> list[Row]:
    """Train and judge one student.

    Args:
        student: what is trained.
        data: the folder of real faces.
        work: where the runs and the teacher's cache are kept.

    Returns:
        One row for the pairs as they are, and two for each low resolution.
    """
    hours = _train(student, data, work)
    folder = work / student.name
    found = folder / "eval.json"
    resolutions = ",".join(map(str, _LOW_RES))
    _run(
        *("eval", str(folder), "--data", str(data / "faces_real" / "lfw_dev.bin")),
        *("--low-res", resolutions, "--out", str(found)),
    )
    return [
        Row(
            **asdict(student),
            pairs=result["low_res"] or "as they are",
            accuracy=round(100 * result["accuracy"], 2),
            tar=round(100 * result["tar@far=1e-2"], 2),
            hours=round(hours, 3),
            commit=record.commit(),
        )
        for result in json.loads(found.read_text())
        if result.get("protocol") == "pairs"
    ]


def curves(rows: Sequence[Row], network: str) -> dict[str, dict[int, float]]:
    """Accuracy on the pairs as they are by student and epochs, the mean of the seeds."""
    found: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        if row.network == network and row.pairs == "as they are":
            views = "" if row.augment == "flip" else row.augment
            own = (option.removeprefix(f"{row.kd}.") for option in row.options.split())
            name = " ".join(filter(None, (row.kd or "alone", *own, views, row.schedule)))
            found.setdefault(name, {}).setdefault(row.epochs, []).append(row.accuracy)
    return {
        name: {epochs: fmean(accuracies) for epochs, accuracies in lengths.items()} for name, lengths in found.items()
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every student asked for that has no rows yet, and draw accuracy over epochs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.curves", description=main.__doc__)
    parser.add_argument("--network", default="thin_r18", help="the student (default: thin_r18)")
    parser.add_argument("--kd", nargs="+", default=[""], help="methods; '' is the student alone")
    parser.add_argument("--options", default="", help="options of the method, separated by blanks")
    parser.add_argument("--augment", nargs="+", default=["flip"], help="what the student sees")
    parser.add_argument("--sees", default="clean", choices=["clean", "same"], help="what the teacher sees")
    parser.add_argument("--schedule", default="", help="other keys of the config, KEY=VALUE separated by blanks")
    parser.add_argument("--epochs", nargs="+", type=int, default=[12], help="epochs of the whole run")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1], help="seeds")
    parser.add_argument("--work", type=Path, default=Path("work_dirs/curves"), help="where the runs are kept")
    parser.add_argument("--out", type=Path, default=CURVES, help="the CSV file")
    parser.add_argument("--pictures", type=Path, default=PICTURES, help="the folder of the picture")
    options = parser.parse_args(arguments)
    data = Path(os.environ["ARCFACE_KD_REAL_DATA"]).resolve()
    for seed, epochs, kd, augment in product(options.seeds, options.epochs, options.kd, options.augment):
        student = Student(options.network, kd, options.options, augment, options.sees, options.schedule, epochs, seed)
        if student.name in {row.name for row in read(options.out)}:
            print(f"there already: {student.name}")
            continue
        rows = measure(student, data, options.work)
        record.append(options.out, rows, Row)
        print(f"{student.name}: {rows[0].accuracy} / {rows[0].tar}, {rows[0].hours:.2f} h", flush=True)
    print(f"drawn: {draw_curves(curves(read(options.out), options.network), options.pictures)}")


if __name__ == "__main__":
    main()
