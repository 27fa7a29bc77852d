"""Downscaled pairs, and pairs whose sides are of two models."""

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from arcface_kd.evaluation.embedding import embed
from arcface_kd.evaluation.pair_views import downscaled, embed_sizes, pair_views

IMAGES = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 3, 112, 112), dtype=np.uint8))


class Means(nn.Module):
    """Embeds an image by the mean squares of its patches, which blur lowers."""

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(images.square(), 3).flatten(1)


@pytest.mark.parametrize("side", [14, 56])
def test_images_are_scaled_by_the_means_of_areas_and_back_by_cubics(side: int) -> None:
    met = downscaled(IMAGES, side)
    assert met.dtype == torch.uint8
    assert met.is_contiguous()
    means = nn.functional.avg_pool2d(IMAGES.double(), 112 // side).round().to(torch.uint8)
    for small, low in zip(means.permute(0, 2, 3, 1).numpy(), met.permute(0, 2, 3, 1).numpy(), strict=True):
        wanted = cv2.resize(small, (112, 112), interpolation=cv2.INTER_CUBIC)
        assert np.abs(low.astype(int) - wanted).max() <= 2


def test_each_side_is_what_its_view_says() -> None:
    low = downscaled(IMAGES, 14)
    own = embed_sizes(Means(), IMAGES, [14])
    shift = nn.Sequential(Means(), nn.Linear(27, 27))
    templates = embed_sizes(shift, IMAGES, [14])
    for first, model in ((own, Means()), (templates, shift)):
        views = dict(pair_views(own, first))
        shown = {"": (IMAGES, IMAGES), "14 px, one side": (IMAGES, low), "14 px, both sides": (low, low)}
        assert list(views) == list(shown)
        for view, (enrolled, probe) in shown.items():
            np.testing.assert_array_equal(views[view][0::2], embed(model, enrolled, dtype=np.float64)[0::2])
            np.testing.assert_array_equal(views[view][1::2], embed(Means(), probe, dtype=np.float64)[1::2])
