"""The main job in one command: data, a teacher, a small student alone and distilled, a table and a report."""

import json
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from easydict import EasyDict

from arcface_kd.backbones import get_backbone
from arcface_kd.config.arcface_torch import BASE
from arcface_kd.config.kd import CLASS_MEANS, KDConfig, option_items
from arcface_kd.data.dataset import RecordDataset
from arcface_kd.data.formats.verification_bin import list_bins
from arcface_kd.distillation.distiller import Distiller
from arcface_kd.errors import ConfigError, DataError
from arcface_kd.evaluation.report.bootstrap import Interval
from arcface_kd.evaluation.report.comparison import (
    ComparedSet,
    Comparison,
    compare,
    read_runs,
    run_contestant,
    teacher_contestant,
)
from arcface_kd.evaluation.report.page import write_report
from arcface_kd.evaluation.report.pictures import require_matplotlib
from arcface_kd.evaluation.score_table import aligned, heading
from arcface_kd.evaluation.scoring import Score
from arcface_kd.evaluation.verification import tar_name
from arcface_kd.system.device import default_device
from arcface_kd.system.files import atomic_write
from arcface_kd.teachers.base import Teacher, load_teacher
from arcface_kd.teachers.cache.fill import fill_cache
from arcface_kd.teachers.options import Preprocessing
from arcface_kd.training.trainer import TrainResult, train

TEACHER_NETWORK, NETWORK = "thin_r18", "thin_r10"
FAR_LEVELS = (1e-1, 1e-2, 1e-3)

# Synthetic identities: the teacher knows those of the students and many more, as the teacher of a real run does; the
# pairs are of identities that neither has seen.
_STUDENT_IDENTITIES, _TEACHER_IDENTITIES, _IMAGES = 150, 400, 12
_HELDOUT_IDENTITIES, _PAIRS = 150, 1200
_TEACHER_EPOCHS = 6
# With many classes and few epochs, a teacher does not learn with the large margin that suits few classes.
_TEACHER_MARGIN = (1.0, 0.0, 0.15)
# With a handful of images a class, centers that average over them (the plain alpha stays larger) carry further than
# centers that follow the image at hand: on 985 real identities TAR@FAR=1e-2 was 62 % weighted and 69 % plain.
_FEW_IMAGES = {"adadistill.alpha": "plain"}
# Rows of a batch, where there are as many faces.
_BATCH = 128
_TARS = tuple(map(tar_name, FAR_LEVELS))
_NEXT = """Next, on your own faces (112x112, a folder for each person; the first line prints num_classes and num_image):
  arcface-kd data pack FACES records
  arcface-kd train configs/ms1mv2_mbf_adadistill.py --kd-teacher TEACHER --set rec=records num_classes=N num_image=M
  arcface-kd compare work_dirs/ms1mv2_mbf_adadistill --kd-teacher TEACHER --data FOLDER_WITH_LFW_BIN"""


@dataclass(frozen=True)
class DemoSettings:
    """Settings of the demo."""

    out: Path  # folder for everything it writes
    data: Path | None = None  # folder with ``train.rec`` and ``.bin`` sets; None draws synthetic faces
    # ``kd*`` keys as in a config. Without ``kd`` it is AdaDistill, ``adadistill.alpha`` is ``plain`` unless the options
    # say otherwise, without ``kd_teacher`` one is trained on the same data, without ``kd_cache`` the teacher's
    # embeddings are kept in ``out`` and made anew.
    keys: Mapping[str, Any] = field(default_factory=dict)
    seeds: int = 1  # how often each student is trained
    epochs: int | None = None  # of the students; None chooses for the data
    network: str = NETWORK  # the students', as a config names it

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ConfigError(f"seeds is {self.seeds}; it must be at least 1")
        if self.epochs is not None and self.epochs < 1:
            raise ConfigError(f"epochs is {self.epochs}; it must be at least 1")

    @property
    def all_keys(self) -> dict[str, Any]:
        """The keys with the demo's own choices where there are none."""
        keys = {"kd": "adadistill", "kd_cache": str(self.out / "teacher.cache"), **self.keys}
        methods = KDConfig.from_config({"kd": keys["kd"]}).methods
        chosen = {name: value for name, value in _FEW_IMAGES.items() if name.partition(".")[0] in methods}
        return {**keys, "kd_option": {**chosen, **dict(option_items(keys.get("kd_option")))}}

    @property
    def kd(self) -> KDConfig:
        """The keys, read."""
        return KDConfig.from_config(self.all_keys)

    @property
    def method(self) -> str:
        """What the student is distilled with."""
        return "+".join(self.kd.methods)


@dataclass
class Row:
    """One line of the table: a model on one verification set, means over seeds."""

    score: Score  # as ``arcface-kd eval`` gives it; the model is ``teacher``, ``alone`` or the method's name
    accuracy_by_seed: list[float]  # ten-fold verification accuracy for each seed, in [0, 1]
    parameters: int | None  # number of weights; None where the teacher does not tell
    multiply_adds: int | None  # of one image; None where they run outside torch
    ms_per_image: float  # milliseconds, in batches of 32, on this machine
    images_per_second: float | None = None  # of training; None for a teacher that was given
    kd_overhead: float | None = None  # extra training time per image relative to the student alone; 0.1 is 10 % more
    # Of the distilled student over the student alone: difference and its 95 % interval by statistic; empty for the
    # others.
    gain: dict[str, tuple[float, Interval]] = field(default_factory=dict)

    def as_row(self) -> dict[str, Any]:
        """A JSON-able dict: a row of ``arcface-kd eval`` with the demo's own numbers behind it."""
        own = {key: value for key, value in vars(self).items() if key not in ("score", "gain")}
        gain = {name: [value, *interval] for name, (value, interval) in self.gain.items()}
        return {**self.score.as_row(), **own, "gain": gain}


@dataclass(frozen=True)
class _Job:
    """What is checked before anything is written: the method, its keys and its teacher."""

    kd: KDConfig
    teacher: Teacher | None
    fills_first: bool


@dataclass
class _Trained:
    """The runs of one kind, one for each seed."""

    model: str
    results: list[TrainResult] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """What the comparison calls them: their folders' names."""
        return [result.output.name for result in self.results]

    @property
    def images_per_second(self) -> float | None:
        return statistics.fmean(r.images_per_second for r in self.results) if self.results else None


def run_demo(settings: DemoSettings) -> list[Row]:
    """Run the main job and leave ``report.html``, ``results.txt`` and ``results.json`` in ``settings.out``."""
    began = time.perf_counter()
    require_matplotlib()
    # What cannot run ends before the first file is written, and not when the teacher and a student are trained.
    job = _checked(settings)
    base = None if settings.data is None else _config_for(settings.data, settings)
    drawn = settings.data is None
    own_teacher = job.teacher is None
    stages = _Stages(drawn + (drawn and own_teacher) + own_teacher + job.fills_first + 2 * settings.seeds + 1)
    settings.out.mkdir(parents=True, exist_ok=True)
    if "kd_cache" not in settings.keys:
        cache = Path(str(job.kd.cache))
        for stale in (cache, cache.with_name(cache.name + ".json")):
            stale.unlink(missing_ok=True)
    if base is None:
        base = _config_for(_draw_faces(settings.out / "faces", stages), settings)
    of_teacher = _Trained("teacher")
    teacher = job.teacher
    if teacher is None:
        config = _teacher_config(base, settings.out, stages) if drawn else EasyDict(base, network=TEACHER_NETWORK)
        config.output = str(settings.out / "teacher")
        of_teacher.results.append(train(config, title=stages.next("teacher")))
        teacher = load_teacher(Path(config.output) / "model.pt", {"network": config.network})
    if job.fills_first:
        stages.next("embedding all faces with the teacher")
        fill_cache({**base, **settings.all_keys}, teacher=teacher)
    alone, distilled = _Trained("alone"), _Trained(settings.method)
    for seed in range(settings.seeds):
        for runs, distiller in ((alone, None), (distilled, Distiller(job.kd, teacher))):
            config = EasyDict(base, seed=base.seed + seed, output=str(settings.out / f"{runs.model}_seed{seed}"))
            title = stages.next(f"student {runs.model}, seed {seed}")
            runs.results.append(train(config, distiller=distiller, title=title))
    stages.next("judging all models")
    comparison = _compared(settings, teacher, (of_teacher, alone, distilled), Path(base.rec))
    rows = _rows(comparison, str(teacher.preprocessing), of_teacher, alone, distilled)
    write_report(comparison, settings.out)
    _write(settings, rows)
    print(f"\n{table(rows)}\n\n{verdict(rows, settings.method)}\n")
    print(f"{settings.out}: report.html, results.txt and results.json; {time.perf_counter() - began:.0f} s\n\n{_NEXT}")
    return rows


def _checked(settings: DemoSettings) -> _Job:
    """Load the given teacher, if any, and check that the method works with it."""
    kd = settings.kd
    if kd.teacher is None and "teacher" in kd.options:
        raise ConfigError("teacher options were given without a teacher; add --kd-teacher FILE")
    get_backbone(settings.network)
    teacher = load_teacher(kd.teacher, kd.options.get("teacher")) if kd.teacher is not None else None
    wiring = Distiller(kd, teacher if teacher is not None else load_teacher(get_backbone(TEACHER_NETWORK)))
    wiring.refuse_dimension(BASE["embedding_size"], wiring.teacher_embedding_size)
    return _Job(kd, teacher, wiring.methods.from_cache_alone or kd.classifier == CLASS_MEANS)


class _Stages:
    """Names the stages on the progress bars: ``[2/5] teacher``."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0

    def next(self, name: str) -> str:
        self.done += 1
        title = f"[{self.done}/{self.total}] {name}"
        if not sys.stderr.isatty():
            print(title, flush=True)
        return title


def _draw_faces(folder: Path, stages: _Stages) -> Path:
    from arcface_kd.data.synthetic_faces import write_dataset

    write_dataset(
        folder,
        identities=_STUDENT_IDENTITIES,
        images_per_identity=_IMAGES,
        pairs=_PAIRS,
        heldout_identities=_HELDOUT_IDENTITIES,
        heldout_from=_TEACHER_IDENTITIES,
        title=stages.next("drawing faces"),
        processes=os.cpu_count() or 1,
    )
    return folder


def _teacher_config(base: EasyDict, out: Path, stages: _Stages) -> EasyDict:
    """The config of a teacher that is trained on several times as many synthetic identities as the students."""
    from arcface_kd.data.synthetic_faces import write_dataset

    write_dataset(
        out / "teacher_faces",
        identities=_TEACHER_IDENTITIES,
        images_per_identity=_IMAGES,
        pairs=20,
        heldout_identities=2,
        title=stages.next("drawing the teacher's faces"),
        processes=os.cpu_count() or 1,
    )
    return EasyDict(
        base,
        rec=str(out / "teacher_faces"),
        num_classes=_TEACHER_IDENTITIES,
        num_image=_TEACHER_IDENTITIES * _IMAGES,
        network=TEACHER_NETWORK,
        num_epoch=_TEACHER_EPOCHS,
        margin_list=_TEACHER_MARGIN,
    )


def _config_for(data: Path, settings: DemoSettings) -> EasyDict:
    """An arcface_torch config for a student on this data."""
    records = RecordDataset(data, on_bad_record=settings.kd.on_bad_record)
    if not list_bins(data):
        raise DataError(f"{data} has no verification set (*.bin); the demo's numbers come from held-out identities")
    config = EasyDict(BASE)
    config.update(
        network=settings.network,
        rec=str(data),
        num_classes=max(int(records.labels().max()) + 1, records.stated_classes or 0),
        num_image=len(records),
        num_epoch=settings.epochs or 12,
        warmup_epoch=0,
        # All models are judged at the end, together.
        val_targets=[],
        fp16=True,
        batch_size=min(_BATCH, len(records)),
        lr=0.1,
        margin_list=(1.0, 0.5, 0.0),
        weight_decay=5e-4,
        verbose=10**9,
        frequent=max(1, min(10, len(records) // _BATCH)),
        num_workers=0,
    )
    # The student alone has the keys that mean something without a method.
    plain = [key.name for key in KDConfig.keys().values() if not key.distils]
    config.update({name: value for name, value in settings.keys.items() if name in plain})
    return config


def _compared(settings: DemoSettings, teacher: Teacher, trained: Sequence[_Trained], data: Path) -> Comparison:
    """Judge the teacher and all students on the verification sets beside the records."""
    device = default_device()
    models = [
        replace(run_contestant(run, device, [settings.network]), is_teacher=run.name == "teacher")
        for run in read_runs([result.output for runs in trained for result in runs.results])
    ]
    if settings.kd.teacher is not None:
        models.insert(0, teacher_contestant(settings.kd.teacher, teacher.to(device)))
    return compare(models, list_bins(data), device, progress=True)


def _rows(
    comparison: Comparison, teacher_input: str, teacher: _Trained, alone: _Trained, distilled: _Trained
) -> list[Row]:
    """A row for each model and set."""
    rows = []
    for runs, names in ((teacher, ["teacher"]), (alone, alone.names), (distilled, distilled.names)):
        costs = [comparison.costs[name] for name in names]
        overhead = None
        if runs is distilled and runs.images_per_second and alone.images_per_second:
            overhead = alone.images_per_second / runs.images_per_second - 1
        for compared in comparison.sets:
            results = [compared.judgements[name].result for name in names]
            of_seeds = [result.as_row() for result in results]
            numbers = {key: _mean([row[key] for row in of_seeds]) for key in of_seeds[0]}
            shown_as = teacher_input if runs is teacher else str(Preprocessing())
            rows.append(
                Row(
                    score=Score(runs.model, compared.pairs.name, "pairs", shown_as, numbers),
                    accuracy_by_seed=[float(result.accuracy) for result in results],
                    parameters=costs[0].parameters,
                    multiply_adds=costs[0].multiply_adds,
                    ms_per_image=1e3 / max(cost.images_per_second for cost in costs),
                    images_per_second=runs.images_per_second,
                    kd_overhead=overhead,
                    gain=_gains(compared, distilled, alone) if runs is distilled else {},
                )
            )
    return rows


def _gains(compared: ComparedSet, distilled: _Trained, alone: _Trained) -> dict[str, tuple[float, Interval]]:
    found = {name: compared.gain(distilled.names, alone.names, name) for name in ("accuracy", *_TARS)}
    return {name: gain for name, gain in found.items() if gain is not None}


def _mean(values: Sequence[int | float | None]) -> int | float | None:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    # Numbers of pairs are those of the set.
    return known[0] if isinstance(known[0], int) else statistics.fmean(known)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


def _millions(number: int | None) -> str:
    return "-" if number is None else f"{number / 1e6:.1f} M"


def table(rows: Sequence[Row]) -> str:
    """The rows as a text table; accuracy and TAR in percent. A TAR that no set has pairs for is left out."""
    shown = ["accuracy", *(name for name in _TARS if any(row.score.numbers[name] is not None for row in rows))]
    cells = [["model", "set", *map(heading, shown), "parameters", "multiply-adds", "ms/image"]]
    for row in rows:
        numbers = [_percent(row.score.numbers[name]) for name in shown]
        cost = [_millions(row.parameters), _millions(row.multiply_adds), f"{row.ms_per_image:.2f}"]
        cells.append([row.score.model, row.score.set, *numbers, *cost])
    return aligned(cells)


def verdict(rows: Sequence[Row], method: str) -> str:
    """What distillation gained on each set, in words, whichever way it went; a line for each set and statistic."""
    lines = []
    for row in rows:
        if row.score.model != method:
            continue
        for name, (value, interval) in row.gain.items():
            low, high = (100 * end for end in interval)
            told = f"{100 * value:+.2f} points (95 % interval {low:+.2f} to {high:+.2f})"
            sure = "" if low > 0 or high < 0 else ": too few pairs to tell from no difference"
            lines.append(f"{row.score.set}: {heading(name)} of {method} against alone: {told}{sure}")
    adds = {row.score.model: row.multiply_adds for row in rows}
    teacher, student = adds.get("teacher"), adds.get(method)
    if teacher and student:
        lines.append(f"the student needs 1/{teacher / student:.1f} of the teacher's multiply-adds")
    return "\n".join(lines)


def _write(settings: DemoSettings, rows: Sequence[Row]) -> None:
    numbers = json.dumps([row.as_row() for row in rows], indent=2, allow_nan=False)
    words = f"{table(rows)}\n\n{verdict(rows, settings.method)}"
    for name, text in (("results.json", numbers), ("results.txt", words)):
        with atomic_write(settings.out / name) as stream:
            stream.write((text + "\n").encode())
