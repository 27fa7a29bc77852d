"""Verification pairs at low resolution, and with one side embedded by another model.

The first image of a pair stands for the enrolled one, the second for the camera's.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from arcface_kd.evaluation.embedding import embed

Sizes = Mapping[int | None, NDArray[Any]]
"""(2P, D) embeddings of all images of a set, by the side they were downscaled to; None for images as they are."""


def downscaled(images: Tensor, side: int) -> Tensor:
    """Scale uint8 images down to a side by the mean of each area, as a coarser sensor would, and back by cubics.

    F-SKD (Shin et al., arXiv 2303.04681) scales bilinearly both ways without smoothing, whose aliasing no camera has.
    """
    import cv2

    height, width = images.shape[2:]
    found = np.empty((len(images), height, width, 3), dtype=np.uint8)
    for number, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        small = cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA)
        cv2.resize(small, (width, height), dst=found[number], interpolation=cv2.INTER_CUBIC)
    return torch.from_numpy(found).permute(0, 3, 1, 2).contiguous()


def embed_sizes(
    model: nn.Module,
    images: Tensor,
    sides: Sequence[int] = (),
    *,
    batch_size: int = 128,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> Sizes:
    """Embed images (2P, 3, H, W), uint8 RGB, as they are and downscaled to each side: float64, L2-normalised."""
    return {
        side: embed(
            model,
            images if side is None else downscaled(images, side),
            batch_size=batch_size,
            device=device,
            dtype=np.float64,
            progress=progress,
        )
        for side in (None, *sides)
    }


def pair_views(probes: Sizes, templates: Sizes) -> Iterator[tuple[str, NDArray[Any]]]:
    """All ways to show the pairs: what is of low resolution (empty for nothing) and the (2P, D) embeddings.

    Probes are the second image of each pair, templates the first.
    """
    for side, rows in probes.items():
        if side is not None:
            yield f"{side} px, one side", _paired(templates[None], rows)
        yield f"{side} px, both sides" if side is not None else "", _paired(templates[side], rows)


def _paired(first: NDArray[Any], second: NDArray[Any]) -> NDArray[Any]:
    if first is second:
        return first
    rows = second.copy()
    rows[0::2] = first[0::2]
    return rows
