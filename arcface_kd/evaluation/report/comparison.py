"""Several models on the same verification sets: scores with intervals, who is best, hardest pairs, cost."""

import ast
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from arcface_kd.data.formats.pair_identities import PairIdentities, pair_identities
from arcface_kd.data.formats.verification_bin import VerificationSet, decode
from arcface_kd.data.joined import verification_folder
from arcface_kd.errors import DataError
from arcface_kd.evaluation.pair_views import Sizes, embed_sizes, pair_views
from arcface_kd.evaluation.report.bootstrap import REPLICATES, Interval, bootstrap, interval
from arcface_kd.evaluation.report.cost import Cost, costs, machine
from arcface_kd.evaluation.report.run_folder import RunFolder, read_run
from arcface_kd.evaluation.scoring import Score as PlainScore
from arcface_kd.evaluation.scoring import TemplateSet, group_scores, require_one_dimension, score
from arcface_kd.evaluation.verification import (
    FAR_LEVELS,
    VerificationResult,
    distinct_names,
    fold_numbers,
    pair_distances,
    read_sets,
    tar_name,
    verify,
)
from arcface_kd.teachers.base import Teacher
from arcface_kd.teachers.checkpoint import backbone_file, weights_file

HARDEST = 5
# The statistics of which less is more.
_ERRORS = ("eer",)


@dataclass(frozen=True)
class Contestant:
    """A model to compare."""

    name: str  # what to call it
    # Gives (B, 3, 112, 112) images in [-1, 1] to (B, D) embeddings, in evaluation mode, on the device.
    load: Callable[[], nn.Module]
    method: str  # the ``kd`` key of its run; what it is elsewhere
    network: str  # its architecture, as far as known
    run: RunFolder | None = None  # its run; None for a teacher's file
    parameters: int | None = None  # number of weights where torch does not see them; None counts them
    is_teacher: bool = False  # whether it is judged beside the students and not among them
    file: Path | None = None  # what it is read from, as far as that is one file


@dataclass(frozen=True)
class Score:
    """One number of a model on a set.

    ``best``: no other student's is better; never set for a teacher. ``close``: of a student, not the best, but the
    interval of the difference to the best one, on the same draws, holds 0.
    """

    value: float | None
    interval: Interval | None
    best: bool = False
    close: bool = False


@dataclass(frozen=True, eq=False)
class Judgement:
    """One model on one verification set."""

    result: VerificationResult  # the verification scores
    similarities: NDArray[np.float64]  # (P,) cosines of the pairs
    scores: Mapping[str, Score]  # ``accuracy``, ``tar@far=...``, ``auc`` and ``eer``, each with its interval
    # (R,) the same in each bootstrap replicate, as far as the set has pairs for them.
    draws: Mapping[str, NDArray[np.float64]]

    def hardest(self, is_same: NDArray[np.bool_], genuine: bool, count: int = HARDEST) -> list[int]:
        """The genuine pairs that look least alike, or the impostor pairs that look most alike, worst first."""
        pairs = np.flatnonzero(is_same == genuine)
        order = np.argsort(self.similarities[pairs] * (1 if genuine else -1), kind="stable")
        return [int(pair) for pair in pairs[order][:count]]


@dataclass(frozen=True, eq=False)
class ComparedSet:
    """All models on one verification set; ``views`` has accuracies by view and model."""

    pairs: VerificationSet
    identities: PairIdentities
    judgements: Mapping[str, Judgement]
    views: Mapping[str, Mapping[str, Score]] = field(default_factory=dict)

    @property
    def resampled(self) -> str:
        """What the bootstrap draws, in words for the reader of an interval."""
        persons = len(np.unique(self.identities.numbers))
        if self.identities.source == "stated":
            return f"{persons:,} identities, as the file beside the set names them"
        if self.identities.source == "shared images":
            return (
                f"identities as far as the set tells: it names none, but images that occur in several pairs tie these "
                f"together, {persons:,} persons at most; one who is not recognised again makes the intervals too narrow"
            )
        return (
            "pairs: the set names no identities and no image occurs twice, so the pairs are taken as independent; the "
            "intervals are too narrow where persons recur"
        )

    @property
    def columns(self) -> list[str]:
        """The statistics that the set has pairs for."""
        first = next(iter(self.judgements.values()))
        return [name for name, score in first.scores.items() if score.value is not None]

    def gain(self, models: Sequence[str], over: Sequence[str], column: str) -> tuple[float, Interval] | None:
        """What some models have over others, on average: the difference and its interval, by a paired bootstrap."""
        if column not in self.columns:
            return None
        means, draws = [], []
        for side in (models, over):
            judged = [self.judgements[name] for name in side]
            means.append(np.mean([judgement.scores[column].value or 0.0 for judgement in judged]))
            draws.append(np.mean([judgement.draws[column] for judgement in judged], axis=0))
        return float(means[0] - means[1]), interval(draws[0] - draws[1])


@dataclass(frozen=True, eq=False)
class Comparison:
    """Everything that a report shows; ``scores`` of groups, IJB and TinyFace have no intervals."""

    contestants: Sequence[Contestant]
    sets: Sequence[ComparedSet]
    costs: Mapping[str, Cost]
    machine: str
    replicates: int
    scores: Sequence[PlainScore] = ()

    @property
    def students(self) -> list[str]:
        """The names of the models that are ranked."""
        return _students(self.contestants)


def _students(contestants: Sequence[Contestant]) -> list[str]:
    names = [contestant.name for contestant in contestants if not contestant.is_teacher]
    return names or [contestant.name for contestant in contestants]


def model_names(
    sources: Sequence[str | os.PathLike[str]], gallery: str | None = None, taken: Collection[str] = ()
) -> dict[str, str]:
    """What to call runs and files, and the gallery's model beside, which may be one of them.

    These are their own names, with those of the folders above where two are the same, or one is ``taken``.
    """
    paths = [Path(source).resolve() for source in sources]
    if len(set(paths)) < len(paths):
        twice = next(path for place, path in enumerate(paths) if path in paths[:place])
        raise DataError(f"{twice} is given twice; wanted different runs")
    places = {os.fspath(source): path for source, path in zip(sources, paths, strict=True)}
    if gallery is not None:
        places[gallery] = Path(gallery).resolve()
    different = list(dict.fromkeys(places.values()))
    names = dict(zip(different, distinct_names(different, taken), strict=True))
    return {source: names[path] for source, path in places.items()}


def read_runs(folders: Sequence[str | os.PathLike[str]], names: Mapping[str, str] | None = None) -> list[RunFolder]:
    """Read several runs, called as :func:`model_names` has it."""
    called = model_names(folders) if names is None else names
    return [read_run(folder, called[os.fspath(folder)]) for folder in folders]


def run_contestant(
    run: RunFolder, device: torch.device | str = "cpu", own_networks: Collection[str] = ()
) -> Contestant:
    """A run's student as a model to compare; ``own_networks`` may be imported."""
    run.check_network(own_networks)
    return Contestant(
        run.name, lambda: run.load(device, own_networks), run.method, run.network, run, file=backbone_file(run.folder)
    )


def file_contestant(source: str, model: Teacher, name: str) -> Contestant:
    """An exported student to compare, and what to call it."""
    return Contestant(name, lambda: model, "exported", "ONNX", parameters=model.parameter_count, file=Path(source))


def teacher_contestant(source: str | os.PathLike[str] | tuple[str, ...], teacher: Teacher) -> Contestant:
    """A teacher to judge beside the students; the folder it came from is left out of the report."""
    sources = source if isinstance(source, tuple) else (os.fspath(source),)
    description = teacher.description
    for each in sources:
        description = description.replace(each, Path(each).name)
    file = weights_file(Path(sources[0]).expanduser())
    return Contestant(
        "teacher",
        lambda: teacher,
        "teacher",
        description,
        parameters=teacher.parameter_count,
        is_teacher=True,
        file=file if len(sources) == 1 else None,
    )


def data_of(runs: Sequence[RunFolder]) -> Path:
    """The folder of the records that all runs were trained on, of several sets the first one's."""
    folders = {_folder_of(run.settings["rec"]) if "rec" in run.settings else None for run in runs}
    (only,) = folders if len(folders) == 1 else (None,)
    if only is None or not Path(only).is_dir():
        names = ", ".join(sorted(folder or "one does not say" for folder in folders))
        raise DataError(f"the runs name no one folder of data that is here ({names}); say with --data where to judge")
    return Path(only)


def _folder_of(rec: str) -> str:
    """Where verification sets lie beside what a log says of ``rec``."""
    try:
        # Several sets are a list there.
        return verification_folder(ast.literal_eval(rec) if rec.startswith(("[", "(")) else rec)
    except (SyntaxError, TypeError, ValueError):
        return rec


def compare(
    contestants: Sequence[Contestant],
    files: Sequence[Path],
    device: torch.device | str = "cpu",
    *,
    others: Sequence[TemplateSet] = (),
    low_res: Sequence[int] = (),
    groups: Mapping[str, Sequence[Path]] | None = None,
    gallery: tuple[str, nn.Module] | None = None,
    replicates: int = REPLICATES,
    progress: bool = False,
) -> Comparison:
    """Judge models of different names on verification sets, and on ``others`` without intervals.

    ``low_res``, ``groups`` and ``gallery`` are those of :mod:`arcface_kd.evaluation.scoring`.
    """
    sets = read_sets(files)
    identities = [pair_identities(pairs.path or pairs.name, pairs) for pairs in sets]
    models = {contestant.name: contestant.load() for contestant in contestants}
    if gallery is not None:
        require_one_dimension(models, gallery)
    found = costs(
        models,
        device,
        parameters={contestant.name: contestant.parameters for contestant in contestants},
        files={contestant.name: contestant.file for contestant in contestants},
    )
    students, compared = _students(contestants), []
    for pairs, known in zip(sets, identities, strict=True):
        # Decoded, a set takes half a gigabyte: one at a time.
        faces = decode(pairs)

        def embedded(model: nn.Module, faces: torch.Tensor = faces) -> Sizes:
            return embed_sizes(model, faces, low_res, device=device, progress=progress)

        sizes = {name: embedded(model) for name, model in models.items()}
        enrolled = None if gallery is None else (gallery[0], embedded(gallery[1]))
        judged = _compared(pairs, known, {name: rows[None] for name, rows in sizes.items()}, replicates, students)
        compared.append(replace(judged, views=_views(judged, sizes, enrolled, replicates, students)))
    scores = list(score(models, others, gallery=gallery, device=torch.device(device), progress=progress))
    plain = [
        PlainScore(name, one.pairs.name, "pairs", "", {"accuracy": judgement.result.accuracy})
        for one in compared
        for name, judgement in one.judgements.items()
    ]
    plain += [
        PlainScore(name, one.pairs.name, "pairs", "", {"accuracy": found.value}, view)
        for one in compared
        for view, accuracies in one.views.items()
        for name, found in accuracies.items()
    ]
    grouped = list(group_scores(groups or {}, sets, plain))
    where = machine(torch.device(device))
    return Comparison(contestants, compared, found, where, replicates, [*grouped, *scores])


def _views(
    judged: ComparedSet,
    sizes: Mapping[str, Sizes],
    enrolled: tuple[str, Sizes] | None,
    replicates: int,
    students: Sequence[str],
) -> dict[str, dict[str, Score]]:
    """Accuracies by way to show the pairs, and by model."""
    rows: dict[str, dict[str, NDArray[Any]]] = {}
    for name, own in sizes.items():
        shown = [(view, found) for view, found in pair_views(own, own) if view]
        if enrolled is not None:
            against = f"gallery of {enrolled[0]}"
            shown += [(f"{against}, {view}".rstrip(", "), found) for view, found in pair_views(own, enrolled[1])]
        for view, found in shown:
            rows.setdefault(view, {})[name] = found
    views = {}
    for view, embeddings in rows.items():
        judgements = _compared(judged.pairs, judged.identities, embeddings, replicates, students, ()).judgements
        views[view] = {name: judgement.scores["accuracy"] for name, judgement in judgements.items()}
    return views


def _compared(
    pairs: VerificationSet,
    known: PairIdentities,
    embeddings: Mapping[str, NDArray[Any]],
    replicates: int,
    students: Sequence[str],
    far_levels: Sequence[float] = FAR_LEVELS,
) -> ComparedSet:
    results = {name: verify(rows, pairs.is_same, far_levels=far_levels) for name, rows in embeddings.items()}
    levels = [level for level in far_levels if all(result.tar[level] is not None for result in results.values())]
    folds = fold_numbers(len(pairs.is_same))
    similarities: dict[str, NDArray[np.float64]] = {}
    draws: dict[str, dict[str, NDArray[np.float64]]] = {}
    for name, rows in embeddings.items():
        distances = pair_distances(rows)
        correct = (distances < results[name].fold_thresholds[folds]) == pairs.is_same
        similarities[name] = 1 - distances / 2
        draws[name] = bootstrap(-distances, pairs.is_same, correct, known.numbers, levels, replicates=replicates)
    values = {name: _values(result) for name, result in results.items()}
    scores: dict[str, dict[str, Score]] = {name: {} for name in results}
    for column in next(iter(values.values())):
        column_draws = {name: drawn.get(column) for name, drawn in draws.items()}
        column_values = {name: found[column] for name, found in values.items()}
        for name, ranked in _ranked(column, column_values, column_draws, students).items():
            scores[name][column] = ranked
    judgements = {
        name: Judgement(result, similarities[name], scores[name], draws[name]) for name, result in results.items()
    }
    return ComparedSet(pairs, known, judgements)


def _values(result: VerificationResult) -> dict[str, float | None]:
    tar: dict[str, float | None] = {tar_name(level): value for level, value in result.tar.items()}
    return {"accuracy": result.accuracy, **tar, "auc": result.auc, "eer": result.eer}


def _ranked(
    column: str, values: Mapping[str, float | None], draws: Mapping[str, Any], students: Sequence[str]
) -> dict[str, Score]:
    """Mark the best student of a column and those that the draws cannot tell from it."""
    known = {name: value for name, value in values.items() if value is not None and draws[name] is not None}
    if len(known) < len(values):
        return {name: Score(None, None) for name in values}
    sign = -1 if column in _ERRORS else 1
    ranked = {name: Score(value, interval(draws[name])) for name, value in known.items()}
    winner = max(students, key=lambda name: sign * known[name])
    best = sign * known[winner]
    for name in students:
        value = known[name]
        low, high = interval(draws[name] - draws[winner])
        is_best = sign * value == best
        ranked[name] = Score(value, interval(draws[name]), is_best, not is_best and low <= 0 <= high)
    return ranked
