"""IResNet's parts against the definition written out."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from arcface_kd.backbones.iresnet import ResidualUnit


def batch_norm(norm: nn.BatchNorm2d, features: Tensor) -> Tensor:
    mean = features.mean((0, 2, 3), keepdim=True)
    variance = features.var((0, 2, 3), keepdim=True, unbiased=False)
    scaled = (features - mean) / (variance + norm.eps).sqrt()
    return scaled * norm.weight[:, None, None] + norm.bias[:, None, None]


@pytest.mark.parametrize(("channels", "stride"), [((4, 4), 1), ((4, 6), 2), ((4, 4), 2), ((4, 6), 1)])
def test_unit_is_its_formula(channels: tuple[int, int], stride: int) -> None:
    torch.manual_seed(0)
    unit = ResidualUnit(*channels, stride).double()
    for parameter in unit.parameters():
        nn.init.normal_(parameter)
    features = torch.randn(3, channels[0], 8, 8, dtype=torch.float64)
    residual = functional.conv2d(batch_norm(unit.bn1, features), unit.conv1.weight, padding=1)
    residual = batch_norm(unit.bn2, residual)
    residual = torch.where(residual > 0, residual, residual * unit.prelu.weight[:, None, None])
    residual = batch_norm(unit.bn3, functional.conv2d(residual, unit.conv2.weight, padding=1, stride=stride))
    shortcut = features
    if stride != 1 or channels[0] != channels[1]:
        assert isinstance(unit.downsample, nn.Sequential)
        conv, norm = unit.downsample
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        shortcut = batch_norm(norm, functional.conv2d(features, conv.weight, stride=stride))
    else:
        assert unit.downsample is None
    torch.testing.assert_close(unit(features), residual + shortcut)
