"""The main job in one command: data, a teacher, the same student alone and distilled, a table and pictures."""

import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from easydict import EasyDict

from arcface_kd.backbones import get_backbone
from arcface_kd.config.arcface_torch import BASE
from arcface_kd.config.kd import CLASS_MEANS, KDConfig
from arcface_kd.data.dataset import RecordDataset
from arcface_kd.data.formats.verification_bin import list_bins, read_bin
from arcface_kd.distillation.distiller import Distiller
from arcface_kd.errors import ConfigError, DataError, OnBadRecord
from arcface_kd.evaluation.report.pictures import require_matplotlib
from arcface_kd.evaluation.report.plots import plot_alpha, plot_roc, plot_training
from arcface_kd.evaluation.report.scalars import Curve, read_scalars
from arcface_kd.evaluation.scoring import Score, heading
from arcface_kd.evaluation.verification import VerificationResult, evaluate, far_name
from arcface_kd.methods.shkd.stages import wants_stages
from arcface_kd.system.files import atomic_write
from arcface_kd.teachers.base import Teacher, load_teacher
from arcface_kd.teachers.cache.fill import fill_cache
from arcface_kd.teachers.options import Preprocessing
from arcface_kd.training.trainer import TrainResult, train

NETWORK = "thin_r18"
FAR_LEVELS = (1e-2, 1e-3)

# Synthetic identities: the teacher knows those of the students and many more, as the teacher of a real run does; the
# pairs are of identities that neither has seen.
_STUDENT_IDENTITIES, _TEACHER_IDENTITIES, _IMAGES = 150, 400, 12
_HELDOUT_IDENTITIES, _PAIRS = 150, 1200
_TEACHER_EPOCHS = 7
# A teacher of many classes and few epochs does not come under way with the margin that a few classes want.
_TEACHER_MARGIN = (1.0, 0.0, 0.15)
# With a handful of images a class, centers that average over them (the plain alpha stays larger) carry further than
# centers that follow the image at hand: on 985 real identities TAR@FAR=1e-2 was 62 % weighted and 69 % plain.
_FEW_IMAGES = {"adadistill": ("alpha=plain",)}
# Rows of a batch, where there are as many faces.
_BATCH = 128


@dataclass(frozen=True)
class DemoSettings:
    """What the demo is asked for.

    Attributes:
        out: folder for everything it writes.
        data: folder with ``train.rec`` and ``.bin`` sets; None draws synthetic faces.
        teacher: a teacher's file; None trains one on the same data.
        options: ``--kd-option`` strings; ``adadistill.alpha`` is ``plain`` unless they say otherwise.
        method: what the student is distilled with.
        classifier: the teacher's classifier, or ``class-means``, for methods that need one.
        cache: the teacher's embeddings; None keeps them in ``out`` and makes them anew.
        on_bad_record: what becomes of a record that cannot be read.
        seeds: how often each student is trained.
        epochs: of the students; None chooses for the data.
    """

    out: Path
    data: Path | None = None
    teacher: str | None = None
    options: Sequence[str] = ()
    method: str = "adadistill"
    classifier: str | None = None
    cache: Path | None = None
    on_bad_record: OnBadRecord = "stop"
    seeds: int = 1
    epochs: int | None = None

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ConfigError(f"seeds is {self.seeds}; it must be at least 1")
        if self.epochs is not None and self.epochs < 1:
            raise ConfigError(f"epochs is {self.epochs}; it must be at least 1")


@dataclass
class Row:
    """One line of the table: a model on one verification set, means over seeds.

    Attributes:
        score: as ``arcface-kd eval`` gives it; the model is ``teacher``, ``alone`` or the method's name.
        accuracy_by_seed: ten-fold verification accuracy for each seed, in [0, 1].
        parameters: number of weights; None where the teacher does not tell.
        images_per_second: of training; None for a teacher that was given.
        kd_overhead: extra training time per image relative to the student alone; 0.1 is 10 % more.
    """

    score: Score
    accuracy_by_seed: list[float]
    parameters: int | None
    images_per_second: float | None
    kd_overhead: float | None = None

    def as_row(self) -> dict[str, Any]:
        """A JSON-able dict: a row of ``arcface-kd eval`` with the demo's own numbers behind it."""
        return {**self.score.as_row(), **{key: value for key, value in vars(self).items() if key != "score"}}


@dataclass
class _Trained:
    model: str
    results: list[TrainResult] = field(default_factory=list)
    verification: list[dict[str, VerificationResult]] = field(default_factory=list)
    parameters: int | None = None
    input: str = str(Preprocessing())

    @property
    def images_per_second(self) -> float | None:
        return statistics.fmean(r.images_per_second for r in self.results) if self.results else None


def run_demo(settings: DemoSettings) -> list[Row]:
    """Run the main job and leave its table, pictures and ``results.json`` in ``settings.out``.

    Args:
        settings: what is asked for.

    Returns:
        The table's rows.

    Raises:
        ConfigError: an option that is not known, a teacher of another dimension without a projection, or no matplotlib.
        DataError: a data folder that cannot be used.
        TeacherError: a teacher that cannot be used, or a method that needs more of it than was given.
    """
    began = time.perf_counter()
    require_matplotlib()
    drawn = settings.data is None
    train_teacher = settings.teacher is None
    cache = settings.cache or settings.out / "teacher.cache"
    options = [f"{name}.{option}" for name in settings.method.split("+") for option in _FEW_IMAGES.get(name, ())]
    kd_keys = {
        "kd": settings.method,
        "kd_teacher": settings.teacher,
        "kd_cache": str(cache),
        "kd_classifier": settings.classifier,
        "kd_option": [*options, *settings.options],
        "kd_on_bad_record": settings.on_bad_record,
    }
    kd = KDConfig.from_config(kd_keys)
    if settings.teacher is None and "teacher" in kd.options:
        raise ConfigError("teacher options were given without a teacher; add --kd-teacher FILE")
    if wants_stages(kd_keys):
        raise ConfigError(
            "shkd is three runs of their own, and the demo compares one with another: start them with "
            "`arcface-kd train CONFIG --kd shkd`"
        )
    teacher = load_teacher(settings.teacher, kd.options.get("teacher")) if settings.teacher is not None else None
    # What cannot run ends before the first file is written, and not when the teacher and a student are trained.
    wiring = Distiller(kd, teacher if teacher is not None else load_teacher(get_backbone(NETWORK)))
    wiring.refuse_dimension(BASE["embedding_size"], wiring.teacher_embedding_size)
    given = None if settings.data is None else _config_for(settings.data, settings)
    fill_first = wiring.from_cache_alone or kd.classifier == CLASS_MEANS
    stages = _Stages(
        1 + int(drawn) + int(drawn and train_teacher) + int(train_teacher) + int(fill_first) + 2 * settings.seeds
    )
    settings.out.mkdir(parents=True, exist_ok=True)
    if settings.cache is None:
        for stale in (cache, cache.with_name(cache.name + ".json")):
            stale.unlink(missing_ok=True)
    data = settings.data if settings.data is not None else _draw_faces(settings.out / "faces", stages)
    base = given if given is not None else _config_for(data, settings)

    trained_teacher = _Trained("teacher")
    if teacher is None:
        config = _teacher_config(base, settings.out, stages) if drawn else EasyDict(base)
        config.output = str(settings.out / "teacher")
        result = train(config, title=stages.next("teacher"))
        trained_teacher.results.append(result)
        teacher = load_teacher(result.output / "model.pt", {"network": config.network})
    trained_teacher.parameters, trained_teacher.input = teacher.parameter_count, str(teacher.preprocessing)
    trained_teacher.verification.append(_verify_teacher(teacher, data, base.val_targets, stages))
    if fill_first:
        stages.next("embedding all faces with the teacher")
        fill_cache({**base, **kd_keys}, teacher=teacher)

    alone, distilled = _Trained("alone"), _Trained(settings.method)
    for seed in range(settings.seeds):
        for runs, distiller in ((alone, None), (distilled, Distiller(kd, teacher))):
            config = EasyDict(base, seed=base.seed + seed, output=str(settings.out / f"{runs.model}_seed{seed}"))
            result = train(config, distiller=distiller, title=stages.next(f"student {runs.model}, seed {seed}"))
            runs.results.append(result)
            runs.verification.append(dict(result.verification))
            unverified = sorted(set(base.val_targets) - result.verification.keys())
            if unverified:
                raise DataError(f"{', '.join(unverified)} could not be scored: see training.log in {result.output}")
            runs.parameters = sum(p.numel() for p in result.student.parameters())
    rows = [row for runs in (trained_teacher, alone, distilled) for row in _rows(runs, alone)]
    _write(settings, rows, (trained_teacher, alone, distilled), time.perf_counter() - began)
    return rows


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
        num_epoch=_TEACHER_EPOCHS,
        margin_list=_TEACHER_MARGIN,
        val_targets=[],
    )


def _config_for(data: Path, settings: DemoSettings) -> EasyDict:
    """An arcface_torch config for a student on this data."""
    records = RecordDataset(data, on_bad_record=settings.on_bad_record)
    targets = [path.stem for path in list_bins(data)]
    if not targets:
        raise DataError(f"{data} has no verification set (*.bin); the demo's numbers come from held-out identities")
    config = EasyDict(BASE)
    config.update(
        network=NETWORK,
        rec=str(data),
        num_classes=max(int(records.labels().max()) + 1, records.stated_classes or 0),
        num_image=len(records),
        num_epoch=settings.epochs or 12,
        warmup_epoch=0,
        val_targets=targets,
        fp16=True,
        batch_size=min(_BATCH, len(records)),
        lr=0.1,
        margin_list=(1.0, 0.5, 0.0),
        weight_decay=5e-4,
        verbose=10**9,
        frequent=max(1, min(10, len(records) // _BATCH)),
        num_workers=0,
        kd_on_bad_record=settings.on_bad_record,
    )
    return config


def _verify_teacher(
    teacher: Teacher, data: Path, names: Sequence[str], stages: _Stages
) -> dict[str, VerificationResult]:
    stages.next("verifying the teacher")
    return {name: evaluate(teacher, read_bin(data / f"{name}.bin")) for name in names}


def _rows(runs: _Trained, alone: _Trained) -> list[Row]:
    rows = []
    for name in runs.verification[0]:
        results = [results[name] for results in runs.verification]
        overhead = None
        if runs.images_per_second and alone.images_per_second and runs.model not in ("alone", "teacher"):
            overhead = alone.images_per_second / runs.images_per_second - 1
        of_seeds = [result.as_row() for result in results]
        numbers = {key: _mean([row[key] for row in of_seeds]) for key in of_seeds[0]}
        rows.append(
            Row(
                score=Score(runs.model, name, "pairs", runs.input, numbers),
                accuracy_by_seed=[float(result.accuracy) for result in results],
                parameters=runs.parameters,
                images_per_second=runs.images_per_second,
                kd_overhead=overhead,
            )
        )
    return rows


def _mean(values: Sequence[int | float | None]) -> int | float | None:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    # Numbers of pairs are those of the set.
    return known[0] if isinstance(known[0], int) else statistics.fmean(known)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


def table(rows: Sequence[Row]) -> str:
    """The rows as a text table; accuracies, AUC and TAR in percent.

    Args:
        rows: of :func:`run_demo`.

    Returns:
        Lines with aligned columns, without a final newline.
    """
    shown = ["accuracy", "auc", *(f"tar@far={far_name(far)}" for far in FAR_LEVELS)]
    heads = ["model", "set", *map(heading, shown), "parameters", "images/s", "KD overhead"]
    cells = [heads]
    for row in rows:
        cells.append(
            [
                row.score.model,
                row.score.set,
                *(_percent(row.score.numbers[name]) for name in shown),
                "-" if row.parameters is None else f"{row.parameters:,}",
                "-" if row.images_per_second is None else f"{row.images_per_second:.0f}",
                "-" if row.kd_overhead is None else f"{100 * row.kd_overhead:+.0f} %",
            ]
        )
    widths = [max(len(line[column]) for line in cells) for column in range(len(heads))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def verdict(rows: Sequence[Row], method: str) -> str:
    """Who won on each set, in words, whichever way it went.

    Args:
        rows: of :func:`run_demo`.
        method: the distilled student's name in them.

    Returns:
        A line a verification set.
    """
    accuracy = {(row.score.model, row.score.set): statistics.fmean(row.accuracy_by_seed) for row in rows}
    lines = []
    for name in sorted({row.score.set for row in rows}):
        gain = 100 * (accuracy[method, name] - accuracy["alone", name])
        outcome = "beats" if gain > 0 else "does NOT beat"
        lines.append(f"{name}: the student with {method} {outcome} the student alone: {gain:+.2f} points of accuracy")
    return "\n".join(lines)


def _write(settings: DemoSettings, rows: Sequence[Row], runs: Sequence[_Trained], seconds: float) -> None:
    out = settings.out
    text = table(rows)
    with atomic_write(out / "results.json") as stream:
        stream.write((json.dumps([row.as_row() for row in rows], indent=2, allow_nan=False) + "\n").encode())
    with atomic_write(out / "results.txt") as stream:
        stream.write((text + "\n" + verdict(rows, settings.method) + "\n").encode())
    students = runs[1:]
    for name in runs[0].verification[0]:
        curves = {run.model: run.verification[0][name] for run in runs}
        plot_roc(out / f"roc_{name}.png", {m: Curve(r.fpr, r.tpr) for m, r in curves.items()}, title=name)
    scalars = {run.model: read_scalars(run.results[0].output / "tensorboard") for run in students}
    plot_training(out / "training_curves.png", {model: found["loss"] for model, found in scalars.items()})
    alphas = {tag: curve for tag, curve in scalars[settings.method].items() if tag.startswith("kd/alpha")}
    if alphas:
        plot_alpha(out / "alpha.png", alphas)
    print(f"\n{text}\n\n{verdict(rows, settings.method)}\n{out}: table, pictures and results.json; {seconds:.0f} s")
