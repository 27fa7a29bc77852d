"""Random batches and class centers that the tests of losses, methods and shards have in common."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from arcface_kd.losses.margin import Margin

ARCFACE = Margin(64.0, 1.0, 0.5, 0.0)
COSFACE = Margin(64.0, 1.0, 0.0, 0.4)
COMBINED = Margin(32.0, 1.1, 0.3, 0.2)
MARGINS = {
    "arcface": ARCFACE,
    "cosface": COSFACE,
    "combined": COMBINED,
    "sphereface": Margin(30.0, 1.35, 0.0, 0.0),
    # Beyond a scale of 64 the running maximum is followed.
    "arcface-steep": Margin(80.0, 1.0, 0.5, 0.0),
    "arcface-filtered": Margin(64.0, 1.0, 0.5, 0.0, filter_threshold=0.2),
    "combined-filtered": Margin(32.0, 1.1, 0.3, 0.2, filter_threshold=0.1),
}


class Problem(NamedTuple):
    """A batch and the class centers of the whole data set; some rows have no label and some classes occur twice."""

    embeddings: Tensor
    labels: Tensor
    centers: Tensor


def random_problem(
    seed: int, batch: int = 12, classes: int = 23, dimension: int = 6, dtype: torch.dtype = torch.float64
) -> Problem:
    """Rows at all angles to their class center, of all lengths.

    Row 0 lies against its class center, so that theta + m passes pi; from 6 rows on, rows 1 and 2 share a class and
    row 3 has no label.
    """
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(classes, dimension, generator=generator, dtype=torch.float64)
    labels = torch.randint(classes, (batch,), generator=generator)
    if batch >= 6:
        labels[2] = labels[1]
        labels[3] = -1
    noise = torch.randn(batch, dimension, generator=generator, dtype=torch.float64)
    pull = torch.rand(batch, 1, generator=generator, dtype=torch.float64) * 4 - 1
    embeddings = noise + pull * normalize(centers[labels.clamp_min(0)])
    if batch:
        embeddings[0] = 0.1 * noise[0] - normalize(centers[labels[0]], dim=0)
    embeddings = embeddings * torch.rand(batch, 1, generator=generator, dtype=torch.float64).add(0.2) * 3
    return Problem(embeddings.to(dtype), labels, centers.to(dtype))
