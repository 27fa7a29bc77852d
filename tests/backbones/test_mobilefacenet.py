"""MobileFaceNet's parts, and the two sets of parameter names over one topology."""

import torch

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
