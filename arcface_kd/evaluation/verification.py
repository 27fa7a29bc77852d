"""1:1 verification of image pairs by InsightFace's ten-fold protocol, with equal numbers in a fraction of the time.

Squared L2 distances of normalised embeddings; ten contiguous folds; for each fold the first threshold of
0, 0.01, ..., 3.99 that is most accurate on the other nine folds is applied to it. A pair counts as one identity when
its distance is *below* the threshold. No loop runs over the grid: each distance is filed under the first threshold
above it, and cumulative counts a fold give the accuracy at every threshold at once.
"""

import os
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from arcface_kd.data.formats.verification_bin import VerificationSet, decode, read_bin
from arcface_kd.errors import DataError
from arcface_kd.evaluation.embedding import embed
from arcface_kd.evaluation.roc import area_under_curve, equal_error_rate, roc_curve, tar_at_far

FOLDS = 10
FAR_LEVELS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
_VAL_FAR = 1e-3
# Grids of InsightFace's protocol, made by the same call: 3 * 0.01 and np.arange's fourth element differ in a bit.
_ACCURACY_THRESHOLDS = np.arange(0, 4, 0.01)
_VAL_THRESHOLDS = np.arange(0, 4, 0.001)
_ROWS_IN_CACHE = 64
_NORM_TOLERANCE = 0.01


def far_name(level: float) -> str:
    """A FAR level as tables and JSON write it: ``1e-3``."""
    return np.format_float_scientific(level, trim="-", exp_digits=1)


def tar_name(level: float) -> str:
    """TAR at a FAR level, likewise: ``tar@far=1e-3``."""
    return f"tar@far={far_name(level)}"


@dataclass(frozen=True)
class VerificationResult:
    """What a verification set says about a model.

    Attributes:
        genuine_pairs: pairs of one identity.
        impostor_pairs: pairs of two identities.
        accuracy: mean accuracy of the ten folds, as InsightFace prints it ("Accuracy-Flip").
        accuracy_std: its standard deviation over the folds (population).
        fold_accuracies: (10,) float64.
        fold_thresholds: (10,) float64, squared L2 distance below which a pair of that fold counts as one identity.
        auc: area under the ROC curve, in [0, 1].
        eer: equal error rate, in [0, 1].
        tar: TAR at the loosest threshold whose FAR does not exceed the level; ``None`` where the set has fewer than
            1 / level impostor pairs.
        val: InsightFace's ten-fold VAL (a TAR) at FAR 1e-3; ``None`` when a fold lacks genuine or impostor pairs.
        val_std: its standard deviation over the folds; ``None`` with ``val``.
        val_far: mean FAR of the folds at that operating point; ``None`` with ``val``.
        fpr: (K,) float64, FAR of the ROC curve, rising from 0 to 1.
        tpr: (K,) float64, TAR of the ROC curve, rising from 0 to 1.
    """

    genuine_pairs: int
    impostor_pairs: int
    accuracy: float
    accuracy_std: float
    fold_accuracies: NDArray[Any]
    fold_thresholds: NDArray[Any]
    auc: float
    eer: float
    tar: dict[float, float | None]
    val: float | None
    val_std: float | None
    val_far: float | None
    fpr: NDArray[Any]
    tpr: NDArray[Any]

    def as_row(self) -> dict[str, int | float | None]:
        """The numbers without the curves, for ``json.dumps`` and tables: ``tar@far=1e-3`` and so on."""
        return {
            "genuine_pairs": self.genuine_pairs,
            "impostor_pairs": self.impostor_pairs,
            "accuracy": self.accuracy,
            "accuracy_std": self.accuracy_std,
            "auc": self.auc,
            "eer": self.eer,
            **{tar_name(level): tar for level, tar in self.tar.items()},
            f"val@far={far_name(_VAL_FAR)}": self.val,
        }


def pair_distances(embeddings: NDArray[Any]) -> NDArray[Any]:
    """Squared L2 distances (P,), in [0, 4], of rows 2i and 2i + 1 of normalised embeddings."""
    distances = np.empty(len(embeddings) // 2)
    # A row's sum does not depend on its neighbours, so blocks that fit the cache change no bit.
    for start in range(0, len(distances), _ROWS_IN_CACHE):
        block = embeddings[2 * start : 2 * (start + _ROWS_IN_CACHE)]
        difference = np.subtract(block[0::2], block[1::2])
        np.sum(np.square(difference, out=difference), axis=1, out=distances[start : start + _ROWS_IN_CACHE])
    return distances


def fold_numbers(pairs: int) -> NDArray[np.int64]:
    """The fold of each pair: contiguous, the first ``pairs % 10`` folds one longer, as scikit-learn's KFold."""
    sizes = np.full(FOLDS, pairs // FOLDS)
    sizes[: pairs % FOLDS] += 1
    return np.repeat(np.arange(FOLDS), sizes)


def _accepted(distances: NDArray[Any], folds: NDArray[Any], thresholds: NDArray[Any]) -> NDArray[Any]:
    """(10, T) number of distances in each fold that are below each threshold."""
    first_above = np.searchsorted(thresholds, distances, side="right")
    columns = len(thresholds) + 1
    counts = np.bincount(folds * columns + first_above, minlength=FOLDS * columns)
    return counts.reshape(FOLDS, columns)[:, :-1].cumsum(axis=1)


def ten_fold_accuracy(distances: NDArray[Any], is_same: NDArray[np.bool_]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Accuracy of each fold at the first of the thresholds that are best on the other nine; both (10,)."""
    folds = fold_numbers(len(distances))
    sizes = np.bincount(folds, minlength=FOLDS)
    accepted_genuine = _accepted(distances[is_same], folds[is_same], _ACCURACY_THRESHOLDS)
    accepted_impostor = _accepted(distances[~is_same], folds[~is_same], _ACCURACY_THRESHOLDS)
    impostors = np.bincount(folds[~is_same], minlength=FOLDS)
    correct = accepted_genuine + impostors[:, None] - accepted_impostor
    best = np.argmax(correct.sum(axis=0) - correct, axis=1)
    return correct[np.arange(FOLDS), best] / sizes, _ACCURACY_THRESHOLDS[best]


def ten_fold_val(
    distances: NDArray[Any], is_same: NDArray[np.bool_], far: float
) -> tuple[NDArray[Any], NDArray[Any]] | None:
    """InsightFace's validation rate: TAR and FAR (10,) of the folds at the threshold with a FAR on the other nine.

    The threshold lies on the straight line between the last of 0, 0.001, ..., 3.999 whose FAR on the nine folds does
    not exceed ``far``, in (0, 1], and the next one (what ``interp1d(kind="slinear")`` gave before scipy refused a curve
    with repeated values); it is 0 when the FAR never reaches ``far``. Distances (P,) are squared L2, P >= 10. None when
    a fold lacks genuine or impostor pairs.
    """
    folds = fold_numbers(len(distances))
    genuine = np.bincount(folds[is_same], minlength=FOLDS)
    impostors = np.bincount(folds[~is_same], minlength=FOLDS)
    if not (genuine.all() and impostors.all()):
        return None
    accepted = _accepted(distances[~is_same], folds[~is_same], _VAL_THRESHOLDS)
    training_far = (accepted.sum(axis=0) - accepted) / (impostors.sum() - impostors)[:, None]
    thresholds = np.zeros(FOLDS)
    for fold, curve in enumerate(training_far):
        above = int(np.searchsorted(curve, far, side="right"))
        if above < len(curve):
            share = (far - curve[above - 1]) / (curve[above] - curve[above - 1])
            lower, upper = _VAL_THRESHOLDS[above - 1 : above + 1]
            thresholds[fold] = lower + share * (upper - lower)
        elif curve[-1] == far:
            thresholds[fold] = _VAL_THRESHOLDS[-1]
    below = distances < thresholds[folds]
    val = np.bincount(folds[is_same], weights=below[is_same], minlength=FOLDS) / genuine
    return val, np.bincount(folds[~is_same], weights=below[~is_same], minlength=FOLDS) / impostors


def _require_both_kinds(is_same: NDArray[np.bool_]) -> None:
    if len(is_same) < FOLDS:
        raise DataError(f"{len(is_same)} pairs: ten-fold verification wants at least {FOLDS}")
    if is_same.all() or not is_same.any():
        raise DataError(
            f"all {len(is_same)} pairs are of {'the same identity' if is_same.all() else 'different identities'}: "
            "verification wants both kinds"
        )


def read_pairs(path: str | os.PathLike[str]) -> VerificationSet:
    """Read a verification set whole, and check that it can be scored before any of its images is embedded.

    Raises:
        DataError: not a verification set, fewer than ten pairs, one kind of pair only, or an image that cannot be
            decoded.
    """
    pairs = read_bin(path)
    try:
        _require_both_kinds(pairs.is_same)
        decode(pairs)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    return pairs


def distinct_names(paths: Sequence[Path], taken: Collection[str] = ()) -> list[str]:
    """The names of different files or folders, with as many of the folders above as tell them and ``taken`` apart."""
    names = [path.name for path in paths]
    for depth in range(2, 1 + max((len(path.parts) for path in paths), default=0)):
        times = Counter([*names, *taken])
        names = [
            "/".join(path.parts[-depth:]) if times[name] > 1 else name for path, name in zip(paths, names, strict=True)
        ]
    return names


def read_sets(files: Sequence[Path]) -> list[VerificationSet]:
    """Read several verification sets, each once; those of one name get their folders' before it."""
    different = list({file.resolve(): file for file in files}.values())
    names = distinct_names([Path(os.path.abspath(file)).with_suffix("") for file in different])
    return [replace(read_pairs(file), name=name) for file, name in zip(different, names, strict=True)]


def _checked(embeddings: NDArray[Any], is_same: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """The embeddings in float64 and the pairs' kinds as booleans, or what is wrong with them."""
    rows = np.asarray(embeddings, dtype=np.float64)
    same = np.asarray(is_same).astype(bool)
    if same.ndim != 1 or rows.ndim != 2 or len(rows) != 2 * len(same):
        raise DataError(
            f"embeddings of shape {rows.shape} for pairs of shape {same.shape}: wanted (2P, D) for (P,), rows 2i and "
            "2i + 1 being pair i"
        )
    _require_both_kinds(same)
    norms = np.sqrt(np.einsum("ij,ij->i", rows, rows))
    bad = np.flatnonzero(~np.isfinite(norms))
    if len(bad):
        raise DataError(
            f"{len(bad)} of {len(rows)} embeddings hold NaN or infinite values, the first is number {bad[0]} (pair "
            f"{bad[0] // 2}): look for a diverged training or an overflow in half precision"
        )
    bad = np.flatnonzero((np.abs(norms - 1) > _NORM_TOLERANCE) & (norms > 1e-12))
    if len(bad):
        raise DataError(
            f"{len(bad)} of {len(rows)} embeddings are not L2-normalised, number {bad[0]} has length "
            f"{norms[bad[0]]:.4g}: pass them through arcface_kd.evaluation.normalize first"
        )
    return rows, same


def verify(
    embeddings: NDArray[Any], is_same: NDArray[np.bool_], *, far_levels: Sequence[float] = FAR_LEVELS
) -> VerificationResult:
    """Score pairs of embeddings.

    Accuracy, its deviation and VAL equal those of InsightFace's ``eval/verification.py`` to the last digit when the
    embeddings do (float64, as ``normalize`` returns them). AUC, EER and TAR@FAR are those of the exact curve over all
    pairs.

    Args:
        embeddings: (2P, D) L2-normalised, rows 2i and 2i + 1 being pair i; P >= 10. A zero vector is allowed.
        is_same: (P,) bool or 0 / 1, both kinds present.
        far_levels: FAR levels to give TAR at, in (0, 1].

    Returns:
        The scores.

    Raises:
        DataError: shapes that do not fit, fewer than ten pairs, one kind of pair only, NaN or infinite embeddings,
            embeddings that are not normalised.
        ConfigError: a FAR level out of range.
    """
    rows, same = _checked(embeddings, is_same)
    distances = pair_distances(rows)
    genuine, impostor = -distances[same], -distances[~same]
    accuracies, thresholds = ten_fold_accuracy(distances, same)
    val = ten_fold_val(distances, same, _VAL_FAR)
    fpr, tpr = roc_curve(genuine, impostor)
    return VerificationResult(
        genuine_pairs=len(genuine),
        impostor_pairs=len(impostor),
        accuracy=float(np.mean(accuracies)),
        accuracy_std=float(np.std(accuracies)),
        fold_accuracies=accuracies,
        fold_thresholds=thresholds,
        auc=area_under_curve(genuine, impostor),
        eer=equal_error_rate(genuine, impostor),
        tar=tar_at_far(genuine, impostor, far_levels),
        val=None if val is None else float(np.mean(val[0])),
        val_std=None if val is None else float(np.std(val[0])),
        val_far=None if val is None else float(np.mean(val[1])),
        fpr=fpr,
        tpr=tpr,
    )


def evaluate(
    model: nn.Module,
    verification_set: VerificationSet | str | os.PathLike[str],
    *,
    batch_size: int = 128,
    flip: bool = True,
    device: torch.device | str | None = None,
    far_levels: Sequence[float] = FAR_LEVELS,
    progress: bool = False,
) -> VerificationResult:
    """Decode a verification set, embed it and score it.

    Args:
        model: (B, 3, 112, 112) float32 RGB images in [-1, 1] to (B, D) embeddings.
        verification_set: the pairs, or their ``.bin`` file.
        batch_size: images a forward pass.
        flip: add the embedding of the mirrored image, as InsightFace does.
        device: where the batches go, ``None`` for where the model's parameters are.
        far_levels: FAR levels to give TAR at, in (0, 1].
        progress: show a bar, on a terminal only.

    Returns:
        The scores.

    Raises:
        DataError: a file or an image that cannot be read, or what ``embed`` and ``verify`` refuse.
        ConfigError: a FAR level out of range.
    """
    pairs = verification_set if isinstance(verification_set, VerificationSet) else read_pairs(verification_set)
    settings: dict[str, Any] = {"batch_size": batch_size, "flip": flip, "device": device, "progress": progress}
    rows = embed(model, decode(pairs), dtype=np.float64, **settings)
    return verify(rows, pairs.is_same, far_levels=far_levels)
