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
def test_images_are_scaled_as_opencv_does_it(side: int) -> None:
    met = downscaled(IMAGES, side)
    assert met.dtype == torch.uint8
    assert met.is_contiguous()
    for image, low in zip(IMAGES, met, strict=True):
        small = cv2.resize(image.permute(1, 2, 0).numpy(), (side, side), interpolation=cv2.INTER_LINEAR)
        wanted = cv2.resize(small, (112, 112), interpolation=cv2.INTER_LINEAR)
        assert np.array_equal(low.permute(1, 2, 0).numpy(), wanted)


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
