"""Where networks have their feature maps: found by their modules' names, or named."""

import pytest
import torch
from torch import Tensor, nn

from arcface_kd.backbones import get_backbone
from arcface_kd.backbones.feature_taps import MapPlace, find_map, map_shape
from arcface_kd.errors import ConfigError
from tests.teachers.feature_networks import Iresnet, Plain, Vit, seeded


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("thin_r18", [(192, 4, 4), (128, 7, 7), (64, 14, 14), (32, 28, 28)]),
        ("r18", [(512, 7, 7), (256, 14, 14), (128, 28, 28), (64, 56, 56)]),
        ("mbf", [(512, 7, 7), (256, 14, 14), (128, 28, 28), (128, 56, 56)]),
        ("ghostfacenet", [(1248, 7, 7), (144, 14, 14), (52, 28, 28), (32, 56, 56)]),
        ("mobilefacenet", [(512, 7, 7), (128, 14, 14), (64, 28, 28), (64, 56, 56)]),
    ],
)
def test_maps_of_our_networks(name: str, wanted: list[tuple[int, int, int]]) -> None:
    with torch.device("meta"):
        network = get_backbone(name)
        shapes = [map_shape(network, find_map(network, tap=tap), 112) for tap in range(4)]
    assert shapes == wanted


@pytest.mark.parametrize("name", ["thin_r18", "mobilefacenet"])
def test_the_last_map_is_what_the_tail_takes(name: str) -> None:
    network = get_backbone(name).eval()
    found: list[Tensor] = []
    find_map(network).watch(network, found.append)
    images = torch.rand(1, 3, 112, 112)
    with torch.no_grad():
        embeddings = network(images)
        assert torch.equal(network.tail(found[0]), embeddings)


def test_tokens_of_a_vit_are_a_square() -> None:
    """Those that its own head takes: in training all of them, where it has left some out before."""
    network = seeded(Vit(), 0)
    place = find_map(network)
    assert str(place) == "the input of 'feature'"
    assert map_shape(network, place, 16) == (8, 4, 4)
    found: list[Tensor] = []
    place.watch(network, found.append)
    rows: list[Tensor] = []
    network.get_submodule("feature").register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0]))
    for training in (False, True):
        network.train(training)
        network(torch.rand(3, 3, 16, 16))
        # The token in the second row and third column.
        assert torch.equal(found[-1][:, :, 1, 2], rows[-1].reshape(3, 16, 8)[:, 6])
        assert torch.equal(place.from_map(found[-1], 2), rows[-1])
    assert not found[-1][:, :, 3].any()


def test_tokens_that_are_no_square_stand_in_a_column() -> None:
    place = MapPlace("x")
    tokens = torch.rand(2, 6, 3)
    assert place.to_map(tokens).shape == (2, 3, 6, 1)
    assert torch.equal(place.from_map(place.to_map(tokens), 3), tokens)
    grid = torch.rand(2, 3, 4, 4)
    assert place.to_map(grid) is place.from_map(grid, 4) is grid


def test_the_gradient_of_a_watched_map_reaches_the_network() -> None:
    network = seeded(Plain(), 0)
    found: list[Tensor] = []
    handle = find_map(network, "second").watch(network, found.append)
    network(torch.rand(2, 3, 16, 16))
    found[0].square().sum().backward()
    gradient = next(network.parameters()).grad
    assert gradient is not None
    assert gradient.abs().max() > 0
    handle.remove()
    network(torch.rand(2, 3, 16, 16))
    assert len(found) == 1


def test_finding_the_shape_changes_nothing() -> None:
    network = Iresnet().train()
    network.bn2.eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert map_shape(network, find_map(network), 32) == (8, 2, 2)
    assert torch.equal(torch.get_rng_state(), state)
    assert network.training
    assert network.fc.training
    assert not network.bn2.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not network.get_submodule("layer4")._forward_hooks


@pytest.mark.parametrize(
    ("network", "name", "tap", "said"),
    [
        (Plain(), None, 0, r"where Plain has its .* one of first, second, head"),
        (Plain(), "third", 0, "'third'; it has first, second, head"),
        (Plain(), "", 0, "Plain has no module ''"),
        (Iresnet(), None, 4, "no feature map 4 stages"),
        (Iresnet(), None, -1, "no feature map -1 stages"),
        (Vit(), None, 1, "tap is 1, wanted 0"),
    ],
)
def test_maps_that_are_not_there(network: nn.Module, name: str | None, tap: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        find_map(network, name, tap)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "size", "said"),
    [
        ("head", 16, r"'head' is no feature map but \(2, 5\)"),
        ("head.2", 17, "Plain cannot be run on 17x17 images: mat1 and mat2"),
        ("unused", 16, "passes 0 times through the output of 'unused'"),
    ],
)
def test_places_that_hold_no_map(name: str, size: int, said: str) -> None:
    network = seeded(Plain(), 0)
    network.unused = nn.Identity()
    with pytest.raises(ConfigError, match=said):
        map_shape(network, MapPlace(name), size)
    assert not network.get_submodule(name)._forward_hooks
