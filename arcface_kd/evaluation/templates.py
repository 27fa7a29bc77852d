"""IJB-B and IJB-C: faces pooled into templates, 1:1 verification of templates, 1:N identification.

As InsightFace does it: the embeddings of a face and of its mirror image are added and weighted with the detector's
score; their own lengths stay, since a network embeds a blurred face short. Faces of one medium are averaged, so that a
video counts as much as a picture; the media of a template are added, and the sum is L2-normalised. A template's faces
pass by once, in batches; nothing is kept that grows with their number.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from arcface_kd.data.formats.ijb import IJBSet
from arcface_kd.evaluation.embedding import embed_files, normalize
from arcface_kd.evaluation.identification import IdentificationResult, identification, search
from arcface_kd.evaluation.roc import area_under_curve, equal_error_rate, tar_at_far
from arcface_kd.evaluation.verification import FAR_LEVELS, far_name, tar_name

_PAIRS_IN_CACHE = 4096


class Templates(NamedTuple):
    """All templates of a set, as one model embeds them: (T, D), L2-normalised, and their numbers, rising."""

    rows: NDArray[Any]
    numbers: NDArray[Any]

    def of(self, numbers: NDArray[Any]) -> NDArray[Any]:
        """The templates of these numbers, int64 of any shape, with D behind."""
        return self.rows[np.searchsorted(self.numbers, numbers)]


def pooled(
    templates: NDArray[Any], media: NDArray[Any], weights: NDArray[Any], batches: Iterable[NDArray[Any]]
) -> Templates:
    """Sum up faces, of which ``templates``, ``media`` and ``weights`` tell one each; batches (B, D) in their order."""
    numbers, rows = np.unique(templates, return_inverse=True)
    _, medium = np.unique(media, return_inverse=True)
    _, group, sizes = np.unique(rows * (medium.max() + 1) + medium, return_inverse=True, return_counts=True)
    shares = weights / sizes[group]
    sums: NDArray[Any] | None = None
    start = 0
    for embeddings in batches:
        faces = slice(start, start + len(embeddings))
        sums = np.zeros((len(numbers), embeddings.shape[1])) if sums is None else sums
        np.add.at(sums, rows[faces], embeddings * shares[faces, None])
        start = faces.stop
    assert sums is not None
    return Templates(normalize(sums), numbers)


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


@dataclass(frozen=True)
class IJBResult:
    """A model on an IJB set; None where the set lists no pairs, or no galleries."""

    templates: int
    faces: int
    verification: TemplateVerification | None
    identification: IdentificationResult | None

    def as_rows(self) -> dict[str, dict[str, int | float | None]]:
        """The numbers, a row by protocol (``1:1``, ``1:N``), for ``json.dumps`` and tables."""
        rows: dict[str, dict[str, int | float | None]] = {}
        if self.verification is not None:
            one = self.verification
            rows["1:1"] = {
                "genuine_pairs": one.genuine_pairs,
                "impostor_pairs": one.impostor_pairs,
                "auc": one.auc,
                "eer": one.eer,
                **{tar_name(level): tar for level, tar in one.tar.items()},
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
    batches = embed_files(model, faces, batch_size=batch_size, device=device, progress=progress)
    return pooled(faces.templates, faces.media, faces.detector_scores, batches)


def judge_templates(faces: IJBSet, templates: Templates, enrolled: Templates | None = None) -> IJBResult:
    """Score what an IJB set lists.

    ``enrolled`` are the first of each pair and the galleries, where another model has embedded them.
    """
    verification = None
    if len(faces.pairs):
        scores = pair_scores(templates, faces.pairs, enrolled)
        genuine, impostor = scores[faces.is_same], scores[~faces.is_same]
        verification = TemplateVerification(
            genuine_pairs=len(genuine),
            impostor_pairs=len(impostor),
            tar=tar_at_far(genuine, impostor, FAR_LEVELS),
            auc=area_under_curve(genuine, impostor),
            eer=equal_error_rate(genuine, impostor),
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
