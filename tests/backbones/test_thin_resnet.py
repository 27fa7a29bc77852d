"""The demo's network: shapes, units, and that it learns."""

import pytest
import torch
from torch import nn

from arcface_kd.backbones.thin_resnet import ThinResNet, ThinUnit


def test_feature_map_is_192_channels_of_4_by_4_in_channels_last() -> None:
    feature_map = ThinResNet().feature_map(torch.zeros(2, 3, 112, 112))
    assert feature_map.shape == (2, 192, 4, 4)
    assert feature_map.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("channels", "stride"), [((4, 4), 1), ((4, 6), 2), ((4, 6), 1)])
def test_unit_is_residual_plus_shortcut(channels: tuple[int, int], stride: int) -> None:
    torch.manual_seed(0)
    unit = ThinUnit(*channels, stride)
    features = torch.randn(2, channels[0], 8, 8)
    untouched = features.clone()
    expected = unit.residual(features) + unit.shortcut(features)
    assert torch.equal(unit(features), expected)
    assert torch.equal(features, untouched)
    assert isinstance(unit.shortcut, nn.Identity) == (channels[0] == channels[1] and stride == 1)


def test_learns_to_tell_a_few_images_apart() -> None:
    torch.manual_seed(0)
    network = ThinResNet(fp16=True, num_features=16)
    images = torch.rand(8, 3, 112, 112) * 2 - 1
    labels = torch.arange(8)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(12):
        loss = nn.functional.cross_entropy(network(images)[:, :8], labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
