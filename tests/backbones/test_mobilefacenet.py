"""MobileFaceNet's parts, and the two sets of parameter names over one topology."""

import math

import pytest
import torch
from torch import nn

from arcface_kd.backbones.mobilefacenet import MobileFaceNet, NarrowMobileFaceNet


def test_narrow_network_is_the_wide_one_at_scale_one_under_other_names() -> None:
    torch.manual_seed(0)
    narrow = NarrowMobileFaceNet(num_features=16)
    unscaled = MobileFaceNet((1, 4, 6, 2), width=1, num_features=16)
    theirs = iter(narrow.state_dict().values())
    state = {
        k: v if k.startswith("features.layers.3.") and k.endswith(("weight", "bias")) else next(theirs)
        for k, v in unscaled.state_dict().items()
    }
    unscaled.load_state_dict(state, strict=True)
    images = torch.rand(4, 3, 112, 112)
    torch.testing.assert_close(narrow(images), unscaled(images))


def test_shortcuts_are_added() -> None:
    """With the last norm of every shortcut bottleneck at zero, a residual stage passes its input on."""
    network = MobileFaceNet((2, 1, 1, 1), width=1)
    stage = network.layers[1].get_submodule("layers")
    assert isinstance(stage, nn.Sequential)
    assert len(stage) == 2
    for unit in stage:
        norm = unit.get_submodule("layers.2.layers.1")
        assert isinstance(norm, nn.BatchNorm2d)
        nn.init.zeros_(norm.weight)
    features = torch.randn(2, 64, 8, 8)
    assert torch.equal(stage(features), features)


def test_convolutions_start_by_fan_out() -> None:
    torch.manual_seed(0)
    last = MobileFaceNet((1, 4, 6, 2), width=2).conv_sep.get_submodule("layers.0")
    assert isinstance(last, nn.Conv2d)
    assert last.weight.std().item() == pytest.approx(math.sqrt(2 / 512), rel=2e-2)
