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
    """Embed probes and gallery.

    Args:
        model: (B, 3, 112, 112) float32 RGB images in [-1, 1] to (B, D) embeddings.
        faces: the set.
        batch_size: faces a forward pass, at least 1.
        device: where the batches go, ``None`` for where the model's parameters are.
        progress: show a bar, on a terminal only.

    Returns:
        (N, D) float32, L2-normalised.

    Raises:
        DataError: a face that cannot be read, an embedding that is not finite, a batch size below 1.
    """
    batches = embed_files(model, faces, batch_size=batch_size, device=device, progress=progress)
    return np.concatenate([normalize(batch).astype(np.float32) for batch in batches])


def judge_tinyface(
    faces: TinyFaceSet, embeddings: NDArray[Any], enrolled: NDArray[Any] | None = None
) -> dict[str, int | float | None]:
    """Search for each probe.

    Args:
        faces: the set.
        embeddings: of :func:`embed_tinyface`.
        enrolled: the same of another model, from which the gallery is taken.

    Returns:
        ``mated_searches``, ``gallery_faces`` and ``rank-1``, ``rank-5``, ``rank-20``, for ``json.dumps`` and tables.
    """
    gallery = (embeddings if enrolled is None else enrolled)[faces.probes :]
    found = search(embeddings[: faces.probes], faces.persons[: faces.probes], gallery, faces.persons[faces.probes :])
    rates = identification([found], ranks=RANKS).rank
    return {
        "mated_searches": len(found.mate_ranks),
        "gallery_faces": len(gallery),
        **{f"rank-{rank}": rate for rank, rate in rates.items()},
    }
