"""IJB-B and IJB-C: faces pooled into templates, 1:1 verification of templates, 1:N identification.

As InsightFace does it: the embeddings of a face and of its mirror image are added and weighted with the detector's
score; their own lengths stay, since a network embeds a blurred face short. Faces of one medium are averaged, so that a
video counts as much as a picture; the media of a template are added, and the sum is L2-normalised. A template's faces
pass by once, in batches; nothing is kept that grows with their number.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from arcface_kd.data.formats.ijb import IJBSet
from arcface_kd.errors import DataError
from arcface_kd.evaluation.embedding import embed_files, normalize
from arcface_kd.evaluation.identification import IdentificationResult, identification, search
from arcface_kd.evaluation.roc import area_under_curve, equal_error_rate, roc_curve, tar_at_far
from arcface_kd.evaluation.verification import FAR_LEVELS, far_name

_PAIRS_IN_CACHE = 4096


class TemplatePooling:
    """Templates as sums over their faces, taken in as they come; ``numbers`` are theirs, rising."""

    def __init__(self, templates: NDArray[Any], media: NDArray[np.int64], weights: NDArray[Any] | None = None) -> None:
        """Say which face belongs where: its template, its medium and its weight, 1 when None."""
        if not len(templates) or len({len(templates), len(media), len(templates if weights is None else weights)}) > 1:
            raise DataError(
                f"{len(templates)} templates, {len(media)} media and "
                f"{'no' if weights is None else len(weights)} weights: wanted one of each for every face"
            )
        self.numbers, self._rows = np.unique(templates, return_inverse=True)
        _, medium = np.unique(media, return_inverse=True)
        _, group, sizes = np.unique(self._rows * (medium.max() + 1) + medium, return_inverse=True, return_counts=True)
        self._weights = (1.0 if weights is None else weights) / sizes[group]
        self._sums: NDArray[Any] | None = None
        self._taken = 0

    def add(self, embeddings: NDArray[Any]) -> None:
        """Take in the embeddings (B, D) of the next faces, in the order of ``templates``."""
        faces = slice(self._taken, self._taken + len(embeddings))
        if faces.stop > len(self._rows):
            raise DataError(f"{faces.stop} embeddings for {len(self._rows)} faces")
        if self._sums is None:
            self._sums = np.zeros((len(self.numbers), embeddings.shape[1]))
        np.add.at(self._sums, self._rows[faces], embeddings * self._weights[faces, None])
        self._taken = faces.stop

    def templates(self) -> NDArray[Any]:
        """The pooled templates (T, D), L2-normalised, in the order of ``numbers``; all faces must be in."""
        if self._sums is None or self._taken < len(self._rows):
            raise DataError(f"{self._taken} embeddings for {len(self._rows)} faces")
        return normalize(self._sums)


class Templates(NamedTuple):
    """All templates of a set, as one model embeds them: (T, D), L2-normalised, and their numbers, rising."""

    rows: NDArray[Any]
    numbers: NDArray[Any]

    def of(self, numbers: NDArray[Any]) -> NDArray[Any]:
        """The templates of these numbers, int64 of any shape, with D behind."""
        return self.rows[np.searchsorted(self.numbers, numbers)]


def pair_scores(templates: Templates, pairs: NDArray[Any], enrolled: Templates | None = None) -> NDArray[Any]:
    """Cosines of pairs of templates; ``enrolled`` are of the first side, where another model has embedded it."""
    scores = np.empty(len(pairs))
    for start in range(0, len(pairs), _PAIRS_IN_CACHE):
        block = slice(start, start + _PAIRS_IN_CACHE)
        first, second = (enrolled or templates).of(pairs[block, 0]), templates.of(pairs[block, 1])
        scores[block] = np.einsum("ij,ij->i", first, second)
    return scores


@dataclass(frozen=True)
class TemplateVerification:
    """1:1 verification of templates."""

    genuine_pairs: int  # pairs of one person
    impostor_pairs: int  # pairs of two persons
    # TAR at the loosest threshold whose FAR does not exceed the level; ``None`` with fewer than 1 / level impostor
    # pairs. InsightFace takes the point of the curve whose FAR is nearest to the level, above it or below.
    tar: dict[float, float | None]
    auc: float  # area under the ROC curve, in [0, 1]
    eer: float  # equal error rate, in [0, 1]
    fpr: NDArray[Any]  # (K,) float64, FAR of the ROC curve, rising
    tpr: NDArray[Any]  # (K,) float64, its TAR


@dataclass(frozen=True)
class IJBResult:
    """A model on an IJB set; None where the set lists no pairs, or no galleries."""

    templates: int
    faces: int
    verification: TemplateVerification | None
    identification: IdentificationResult | None

    def as_rows(self) -> dict[str, dict[str, int | float | None]]:
        """The numbers without the curves, a row by protocol (``1:1``, ``1:N``), for ``json.dumps`` and tables."""
        rows: dict[str, dict[str, int | float | None]] = {}
        if self.verification is not None:
            one = self.verification
            rows["1:1"] = {
                "genuine_pairs": one.genuine_pairs,
                "impostor_pairs": one.impostor_pairs,
                "auc": one.auc,
                "eer": one.eer,
                **{f"tar@far={far_name(level)}": tar for level, tar in one.tar.items()},
            }
        if self.identification is not None:
            many = self.identification
            rows["1:N"] = {
                "mated_searches": many.mated,
                "stranger_searches": many.strangers,
                **{f"rank-{rank}": rate for rank, rate in many.rank.items()},
                **{f"tpir@fpir={far_name(level)}": rate for level, rate in many.tpir.items()},
            }
        return rows


def embed_templates(
    model: nn.Module,
    faces: IJBSet,
    *,
    batch_size: int = 128,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> Templates:
    """Embed all faces of a set and pool them."""
    pooling = TemplatePooling(faces.templates, faces.media, faces.detector_scores)
    for embeddings in embed_files(model, faces, batch_size=batch_size, device=device, progress=progress):
        pooling.add(embeddings)
    return Templates(pooling.templates(), pooling.numbers)


def judge_templates(faces: IJBSet, templates: Templates, enrolled: Templates | None = None) -> IJBResult:
    """Score what an IJB set lists.

    ``enrolled`` are the first of each pair and the galleries, where another model has embedded them.
    """
    verification = None
    if len(faces.pairs):
        scores = pair_scores(templates, faces.pairs, enrolled)
        genuine, impostor = scores[faces.is_same], scores[~faces.is_same]
        fpr, tpr = roc_curve(genuine, impostor)
        verification = TemplateVerification(
            genuine_pairs=len(genuine),
            impostor_pairs=len(impostor),
            tar=tar_at_far(genuine, impostor, FAR_LEVELS),
            auc=area_under_curve(genuine, impostor),
            eer=equal_error_rate(genuine, impostor),
            fpr=fpr,
            tpr=tpr,
        )
    identified = None
    if faces.probes is not None:
        probes = templates.of(faces.probes.templates)
        searches = [
            search(probes, faces.probes.subjects, (enrolled or templates).of(gallery.templates), gallery.subjects)
            for gallery in faces.galleries.values()
        ]
        identified = identification(searches)
    return IJBResult(len(templates.numbers), len(faces.files), verification, identified)
