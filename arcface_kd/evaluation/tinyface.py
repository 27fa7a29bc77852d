"""TinyFace: closed-set search for low-resolution faces among many, as AdaFace and CVLface judge it.

A face is the sum of its embedding and its mirror image's, compared by cosine. A search is right at rank k when one of
the k most similar faces of the gallery, distractors included, shows the person.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from arcface_kd.data.formats.tinyface import TinyFaceSet
from arcface_kd.evaluation.embedding import embed_files, normalize
from arcface_kd.evaluation.identification import identification, search

RANKS = (1, 5, 20)


def embed_tinyface(
    model: nn.Module,
    faces: TinyFaceSet,
    *,
    batch_size: int = 128,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> NDArray[Any]:
    """Embed probes and gallery: (N, D) float32, L2-normalised."""
    batches = embed_files(model, faces, batch_size=batch_size, device=device, progress=progress)
    return np.concatenate([normalize(batch).astype(np.float32) for batch in batches])


def judge_tinyface(
    faces: TinyFaceSet, embeddings: NDArray[Any], enrolled: NDArray[Any] | None = None
) -> dict[str, int | float | None]:
    """Search for each probe; the gallery may be embedded by another model, as ``enrolled``."""
    gallery = (embeddings if enrolled is None else enrolled)[faces.probes :]
    found = search(embeddings[: faces.probes], faces.persons[: faces.probes], gallery, faces.persons[faces.probes :])
    rates = identification([found], ranks=RANKS).rank
    return {
        "mated_searches": len(found.mate_ranks),
        "gallery_faces": len(gallery),
        **{f"rank-{rank}": rate for rank, rate in rates.items()},
    }
