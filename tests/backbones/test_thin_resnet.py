"""The demo's network."""

import torch

from arcface_kd.backbones.thin_resnet import ThinResNet


def test_feature_map_is_192_channels_of_4_by_4_in_channels_last() -> None:
    feature_map = ThinResNet().feature_map(torch.zeros(2, 3, 112, 112))
    assert feature_map.shape == (2, 192, 4, 4)
    assert feature_map.is_contiguous(memory_format=torch.channels_last)
