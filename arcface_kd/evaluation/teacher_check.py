"""``arcface-kd check``: what a teacher is, and whether its input is prepared the way it was trained with."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from arcface_kd.data.formats.verification_bin import VerificationSet, decode
from arcface_kd.errors import DataError, TeacherError
from arcface_kd.evaluation.embedding import embed
from arcface_kd.evaluation.verification import verify
from arcface_kd.teachers.base import Teacher
from arcface_kd.teachers.options import Channels, Preprocessing, Triple

# What face networks and ImageNet networks are usually fed: mean and std in 0..255.
_USUAL: tuple[tuple[Triple, Triple], ...] = (
    ((127.5, 127.5, 127.5), (127.5, 127.5, 127.5)),
    ((127.5, 127.5, 127.5), (128.0, 128.0, 128.0)),
    ((127.0, 127.0, 127.0), (128.0, 128.0, 128.0)),
    ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    ((0.0, 0.0, 0.0), (255.0, 255.0, 255.0)),
    ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
)
_SCREENING_PAIRS = 100
_CLEAR_LOSS = 0.02
_RESAMPLES = 500
_CONFIDENCE = 0.99


@dataclass(frozen=True)
class Trial:
    """One preprocessing on verification pairs."""

    preprocessing: Preprocessing  # what was tried
    # Distance of the mean cosine of same and of different pairs, in standard deviations (d'). It tells preprocessings
    # apart where accuracy has saturated.
    separation: float
    accuracy: float | None = None  # ten-fold accuracy in 0..1; None where the trial went no further than the screening


@dataclass(frozen=True)
class TeacherReport:
    """What ``arcface-kd check`` found."""

    teacher: Teacher  # as the run would use it
    trials: tuple[Trial, ...] = ()  # the usual preprocessings, best first; empty without a verification set
    in_use: Trial | None = None  # the trial of the preprocessing in use; None without a verification set
    screened: int = 0  # number of pairs behind the separations
    pairs: int = 0  # number of pairs behind the accuracies
    warning: str | None = None  # set when another preprocessing is better by a clear margin
    doubt: str | None = None  # set when the pairs are too few to tell

    @property
    def best(self) -> Trial | None:
        """The best of the trials; None without a verification set."""
        return self.trials[0] if self.trials else None

    def __str__(self) -> str:
        teacher, count = self.teacher, self.teacher.parameter_count
        lines = [
            f"teacher      {teacher.description}",
            f"embedding    {teacher.embedding_size} dimensions",
            f"parameters   {'unknown' if count is None else f'{count:,}'}",
            f"input        {teacher.preprocessing}",
            f"precision    {teacher.precision}",
            f"fingerprint  {teacher.fingerprint}",
        ]
        if self.best is None or self.in_use is None:
            return "\n".join(lines)
        lines += ["", f"separation  preprocessing ({self.screened} pairs)"]
        lines += [f"{trial.separation:10.3f}  {trial.preprocessing}" for trial in self.trials]
        lines += ["", f"accuracy on {self.pairs} pairs:"]
        for word, trial in (("best", self.best), ("in use", self.in_use)):
            if trial.accuracy is not None:
                lines.append(f"  {word:7} {100 * trial.accuracy:6.2f} %  {trial.preprocessing}")
        if self.warning is not None:
            lines += ["", f"WARNING: {self.warning}"]
        if self.doubt is not None:
            lines += ["", f"NOTE: {self.doubt}"]
        return "\n".join(lines)


def _in_order(values: Triple, channels: Channels) -> Triple:
    """ImageNet's means and deviations, which are told in RGB, in the order of the channels."""
    red, green, blue = values
    return values if channels == "rgb" else (blue, green, red)


def _candidates(in_use: Preprocessing) -> Iterator[Preprocessing]:
    yield in_use
    channels: Channels
    for channels in get_args(Channels):
        for mean, std in _USUAL:
            candidate = Preprocessing(channels, _in_order(mean, channels), _in_order(std, channels), in_use.size)
            if candidate != in_use:
                yield candidate


def _subset(pairs: VerificationSet, count: int) -> VerificationSet:
    """As many same pairs as different ones as the set allows, evenly over its length."""
    same = np.asarray(pairs.is_same, dtype=bool)
    chosen: list[int] = []
    for kind in (same, ~same):
        numbers = np.flatnonzero(kind)
        wanted = min(len(numbers), count // 2)
        chosen += numbers[np.linspace(0, len(numbers) - 1, wanted).round().astype(int)].tolist()
    chosen.sort()
    images = [image for number in chosen for image in pairs.images[2 * number : 2 * number + 2]]
    return VerificationSet(pairs.name, images, same[chosen])


def _cosines(embeddings: NDArray[Any]) -> NDArray[Any]:
    return cast("NDArray[Any]", np.einsum("ij,ij->i", embeddings[0::2], embeddings[1::2]))


def _separation(cosines: NDArray[Any], is_same: NDArray[np.bool_]) -> float:
    same, different = cosines[is_same], cosines[~is_same]
    spread = np.sqrt((same.var() + different.var()) / 2)
    value = (same.mean() - different.mean()) / spread if spread > 0 else 0.0
    return float(value) if np.isfinite(value) else -np.inf


def _clearly_better(best: NDArray[Any], used: NDArray[Any], is_same: NDArray[np.bool_]) -> bool:
    """Whether the gain in separation is worth a word, by chance or not."""
    return _separation(used, is_same) < (1 - _CLEAR_LOSS) * _separation(best, is_same)


def _surely_better(best: NDArray[Any], used: NDArray[Any], is_same: NDArray[np.bool_]) -> bool:
    """Whether the gain is clear and holds in nearly all resamples of the pairs."""
    if not _clearly_better(best, used, is_same):
        return False
    generator = np.random.default_rng(0)
    same, different = np.flatnonzero(is_same), np.flatnonzero(~is_same)
    wins = 0
    for _ in range(_RESAMPLES):
        picked = np.concatenate([generator.choice(same, len(same)), generator.choice(different, len(different))])
        wins += _separation(best[picked], is_same[picked]) > _separation(used[picked], is_same[picked])
    return wins >= _CONFIDENCE * _RESAMPLES


def _embedded(teacher: Teacher, images: torch.Tensor, batch_size: int) -> NDArray[Any]:
    embeddings = embed(teacher, images, batch_size=batch_size, flip=False, device=teacher.device)
    return embeddings.astype(np.float64)


def check_teacher(
    teacher: Teacher, verification_set: VerificationSet | None = None, *, pairs: int = 600, batch_size: int = 64
) -> TeacherReport:
    """Describe a teacher and, given verification pairs, find out how its input should be prepared.

    The usual preprocessings (RGB and BGR with each of six means and deviations) and the one in use are ranked by how
    far apart they hold same and different pairs on 100 pairs, taken evenly from the set, without flips. Accuracy, by
    InsightFace's ten folds, is then taken of the best and of the one in use on up to ``pairs`` pairs, 20 or more. The
    warning comes when the separation in use is more than 2 % below the best one and stays below it in 99 % of 500
    resamples; a note says so when it does not stay, or when the set has fewer than 100 pairs.

    Raises:
        DataError: fewer than five pairs of a kind, too few ``pairs``, or an image that cannot be decoded.
    """
    if verification_set is None:
        return TeacherReport(teacher)
    same = np.asarray(verification_set.is_same, dtype=bool)
    if min(same.sum(), (~same).sum()) < 5:
        raise DataError(
            f"{verification_set.name}: {same.sum()} same and {(~same).sum()} different pairs; wanted 5 or more of each"
        )
    if pairs < 20:
        raise DataError(f"{pairs} pairs cannot tell preprocessings apart; wanted 20 or more")
    screening = _subset(verification_set, min(_SCREENING_PAIRS, pairs))
    images = decode(screening)
    trials: list[Trial] = []
    candidates = list(_candidates(teacher.preprocessing))
    for candidate in tqdm(candidates, desc="preprocessings", disable=None, leave=False, dynamic_ncols=True):
        try:
            cosines = _cosines(_embedded(teacher.with_preprocessing(candidate), images, batch_size))
        except TeacherError:
            # Overflow under a foreign scale, in half precision: as wrong as a preprocessing can be.
            trials.append(Trial(candidate, -np.inf))
        else:
            trials.append(Trial(candidate, _separation(cosines, screening.is_same)))
    trials.sort(key=lambda trial: -trial.separation)
    report = TeacherReport(teacher, screened=len(screening.is_same))
    return _with_accuracies(report, trials, _subset(verification_set, pairs), batch_size)


def _with_accuracies(
    report: TeacherReport, trials: list[Trial], chosen: VerificationSet, batch_size: int
) -> TeacherReport:
    teacher, images = report.teacher, decode(chosen)
    measured: dict[Preprocessing, tuple[Trial, NDArray[Any]]] = {}
    wanted = dict.fromkeys((trials[0].preprocessing, teacher.preprocessing))
    for preprocessing in tqdm(wanted, desc="accuracy", disable=None, leave=False, dynamic_ncols=True):
        embeddings = _embedded(teacher.with_preprocessing(preprocessing), images, batch_size)
        (screened,) = (trial for trial in trials if trial.preprocessing == preprocessing)
        accuracy = verify(embeddings, chosen.is_same).accuracy
        measured[preprocessing] = (Trial(preprocessing, screened.separation, accuracy), _cosines(embeddings))
    best, best_cosines = measured[trials[0].preprocessing]
    used, used_cosines = measured[teacher.preprocessing]
    warning = doubt = None
    count = len(chosen.is_same)
    if best is not used and _surely_better(best_cosines, used_cosines, chosen.is_same):
        warning = (
            f"this teacher tells faces apart better with {best.preprocessing} than with {used.preprocessing}, the "
            f"input in use; give --kd-option {best.preprocessing.as_options()}"
        )
    elif best is not used and _clearly_better(best_cosines, used_cosines, chosen.is_same):
        doubt = f"{count} pairs are too few to tell whether {best.preprocessing} is better than {used.preprocessing}"
    elif count < _SCREENING_PAIRS:
        doubt = f"{count} pairs are too few to tell preprocessings apart"
    if doubt is not None:
        doubt += "; give a larger set, such as lfw.bin with its 6,000 pairs"
    return replace(
        report,
        trials=tuple(measured.get(trial.preprocessing, (trial,))[0] for trial in trials),
        in_use=used,
        pairs=count,
        warning=warning,
        doubt=doubt,
    )
