"""Names with options, what they build, and the name that a checkpoint carries."""

import copy
import io
from collections import OrderedDict

import pytest
import torch
from torch import nn

from arcface_kd.backbones import get_backbone, is_network
from arcface_kd.backbones.network_name import NetworkName, carried_names, parse_name
from arcface_kd.errors import ConfigError
from tests.backbones.layout import layout_digest, parameter_count
from tests.networks import tiny


def test_a_name_is_read() -> None:
    assert parse_name("r50") == NetworkName("r50", {})
    assert parse_name("mbf:width=1,se=True") == NetworkName("mbf", {"width": 1.0, "se": True})
    assert parse_name("timm:edgenext_x_small:rank=0.6") == NetworkName("timm:edgenext_x_small", {"rank": 0.6})
    assert parse_name("ghostfacenet:version=1,stride=2").options == {"version": 1, "stride": 2}


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("mbf:widht=1", "'width'"),
        ("mbf:width", "'width'"),
        ("mbf:width=1,width=2", "each once"),
        ("mbf:width=wide", "a number"),
        ("mbf:width=nan", "a number"),
        ("mbf:se=1", "true or false"),
        ("mbf:", "NAME:OPTION=VALUE"),
        ("r50:se=true", "none"),
        ("ghostfacenet:stride=1.5", "a whole number"),
        ("timm:edgenext_small:rnk=0.6", "'rank'"),
        ("timm:hf-hub:somebody/face", "NAME:OPTION=VALUE"),
    ],
)
def test_what_is_no_name_is_refused(name: str, named: str) -> None:
    assert not is_network(name)
    with pytest.raises(ConfigError, match=named):
        get_backbone(name)


@pytest.mark.parametrize("name", ["mbf:width=0", "mbf:width=17", "ghostfacenet:version=3", "ghostfacenet:stride=0"])
def test_values_out_of_range_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=name.partition(":")[2].partition("=")[0]):
        get_backbone(name)


def test_default_options_are_the_plain_network() -> None:
    with torch.device("meta"):
        for name in ("mbf:width=2", "mbf_large:width=4,se=false", "ghostfacenet:version=2,width=1.3,stride=1"):
            plain = get_backbone(name.partition(":")[0])
            assert layout_digest(get_backbone(name)) == layout_digest(plain)


@pytest.mark.parametrize("name", ["mbf:width=0.5", "mbf:width=1.5,se=true", "ghostfacenet:version=1,width=0.5"])
def test_any_width_embeds(name: str) -> None:
    with torch.device("meta"):
        assert get_backbone(name, num_features=8)(torch.empty(2, 3, 112, 112)).shape == (2, 8)


def test_squeeze_and_excitation_weights_channels() -> None:
    torch.manual_seed(0)
    network = get_backbone("mbf:width=0.25,se=true", num_features=8).eval()
    # Of 15 bottlenecks: 5 of 128 hidden channels, 9 of 256 and one of 512, each with a bias and a slope.
    gates = sum(2 * c * c // 4 + c + 2 * (c // 4) for c in [128] * 5 + [256] * 9 + [512])
    assert parameter_count(network) - parameter_count(get_backbone("mbf:width=0.25", num_features=8)) == gates
    images = torch.rand(2, 3, 112, 112) * 2 - 1
    before = network(images)
    # A hard sigmoid of -3 and below is 0: nothing but the shortcuts is left of a bottleneck.
    for key, parameter in network.named_parameters():
        if key.endswith("gate.3.bias"):
            nn.init.constant_(parameter, -1e3)
    assert not torch.allclose(network(images), before)
    assert torch.allclose(network(images)[0], network(images)[1])


# Multiply-adds as the authors count them (60.3 M and 215.7 M), which is with batch norms and activations.
@pytest.mark.parametrize(("stride", "theirs"), [(2, 60.3), (1, 215.7)])
def test_ghostfacenet_costs_what_its_authors_say(stride: int, theirs: float) -> None:
    from arcface_kd.evaluation.report.cost import multiply_adds

    counted = multiply_adds(get_backbone(f"ghostfacenet:version=1,stride={stride}").eval())
    assert counted is not None
    assert 0.96 * theirs < counted / 1e6 < theirs


def saved(state: object) -> object:
    stream = io.BytesIO()
    torch.save(state, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=True)


@pytest.mark.parametrize("name", ["mbf:width=0.25", "python:tests.networks:tiny"])
def test_a_checkpoint_carries_the_name_and_loads_anywhere(name: str) -> None:
    network = get_backbone(name, num_features=8).eval()
    state = saved(network.state_dict())
    assert carried_names(state) == carried_names(saved(nn.ModuleDict({"module": network}).state_dict())) == [name]
    with torch.no_grad():
        assert network(torch.zeros(2, 3, 112, 112)).shape == (2, 8)
    # Strictly, into a network that knows nothing of it, and with the same keys.
    other = copy.deepcopy(network)
    other._state_dict_hooks.clear()
    assert list(other.state_dict()) == list(network.state_dict())
    other.load_state_dict(state, strict=True)  # type: ignore[arg-type]
    assert carried_names(saved(other.state_dict())) == []


def test_notes_may_be_anything() -> None:
    state = OrderedDict(tiny(8).state_dict())
    notes: object
    for notes in (None, 3, {"": 3}, {"": {"arcface_kd.network": 3}}, {3: {}}):
        state._metadata = notes  # type: ignore[attr-defined]
        assert carried_names(state) == []
    assert carried_names({}) == carried_names(None) == []
