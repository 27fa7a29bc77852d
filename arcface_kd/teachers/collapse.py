"""Warn before the first step if a teacher's embeddings of different faces are all alike."""

import logging

import numpy as np
import torch
from torch import Tensor, distributed
from torch.nn.functional import normalize

from arcface_kd.data.dataset import FaceDataset
from arcface_kd.errors import DataError
from arcface_kd.teachers.base import Teacher
from arcface_kd.teachers.cache.embedding_cache import EmbeddingCache

logger = logging.getLogger(__name__)

_FACES = 24
_FEWEST = 8
_ALIKE = 0.9
"""Mean cosine of different people: about 0 for good teachers, 0.67 for random weights, 0.998 and more for an input that
is normalised twice."""


def warn_of_collapse(
    teacher: Teacher,
    faces: FaceDataset,
    cache: EmbeddingCache | None = None,
    device: torch.device | str | None = None,
) -> None:
    """Embed two dozen faces of different people and warn if all embeddings are alike; on rank 0 only.

    Fewer than eight people are not judged, nor faces whose embeddings are all in the cache.
    """
    if len(faces) == 0 or not _is_first_rank():
        return
    places = np.unique(np.linspace(0, len(faces) - 1, _FACES).round().astype(np.int64))
    if cache is not None and all(cache.known(place, place + 1)[0, 0] for place in places.tolist()):
        return
    images: dict[int, Tensor] = {}
    for place in places.tolist():
        try:
            sample = faces[place]
        # The run reports the record when it reads it.
        except DataError:
            continue
        # Records without an identity are taken for different people.
        images.setdefault(sample.label if sample.label >= 0 else -1 - place, sample.image)
    if len(images) < _FEWEST:
        return
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    shown = torch.stack(list(images.values())).to(device).float() / 127.5 - 1
    warn_if_alike(teacher, normalize(teacher(shown)))


def warn_if_alike(teacher: Teacher, embeddings: Tensor) -> None:
    """Warn if unit embeddings (N, D) of different faces are all alike; on rank 0 only, from eight on."""
    count = len(embeddings)
    if count < _FEWEST or not _is_first_rank():
        return
    # The mean over pairs of different faces, by the norm of the sum.
    cosine = float((embeddings.sum(0).square().sum() - count) / (count * (count - 1)))
    if not cosine < _ALIKE:
        logger.warning(
            "the teacher's embeddings of %d different faces are all alike: their mean cosine is %.3f, and a good "
            "teacher's is near 0. Its input may be normalised twice, or not as it was trained (in use: %s): try "
            "`arcface-kd check` with verification pairs, and the options teacher.channels, mean and std",
            count,
            cosine,
            teacher.preprocessing,
        )


def _is_first_rank() -> bool:
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0
