"""IR and IR-SE networks: each layout against a twin over its raw tensors, read off them, named, tapped."""

import pytest
import torch
from torch import Tensor, nn

from arcface_kd.backbones import get_backbone, is_network
from arcface_kd.backbones.feature_taps import find_map, map_shape
from arcface_kd.backbones.ir import IR_NAMES, IRLayout, IRNet
from arcface_kd.errors import ConfigError
from arcface_kd.teachers import load_teacher
from arcface_kd.teachers.trunk_and_tail import cut_teacher
from tests.backbones.layout import layout_digest, parameter_count
from tests.reference.ir import ir_embeddings

TINY = {"units": (1, 2, 1, 1), "widths": (16, 32, 48, 64), "stem": 16}
STARTS = {0, 1, 3, 4}
# What AdaFace and CVLface, face.evoLVe and FaceX-Zoo differ in, at a width of a few channels.
LAYOUTS = {
    "AdaFace": IRLayout(**TINY),  # type: ignore[arg-type]
    "AdaFace with SE": IRLayout(**TINY, squeeze="se_block"),  # type: ignore[arg-type]
    "AdaFace's bottlenecks": IRLayout((1, 2, 1, 1), (32, 48, 64, 80), 16, bottleneck=True),
    "bottlenecks with SE": IRLayout((1, 2, 1, 1), (32, 48, 64, 80), 16, bottleneck=True, squeeze="se_block"),
    "face.evoLVe": IRLayout(**TINY, inner_norm=False, affine=True),  # type: ignore[arg-type]
    "face.evoLVe with SE": IRLayout(**TINY, inner_norm=False, affine=True, squeeze="5"),  # type: ignore[arg-type]
    "224 pixels": IRLayout(**TINY, inner_norm=False, affine=True, side=14),  # type: ignore[arg-type]
}
# Digest of names, order, shapes and types at 512-d and number of parameters, from the authors' own code: AdaFace at
# c60eaa78, whose networks CVLface (d3d09c93) has too, and face.evoLVe at a9897bda, whose FaceX-Zoo (16b793a7) has.
AUTHORS = {
    "ir_18": ("18f13546e53750aa465734e52069293498ff6786df06c154c4834e7b2da7aeb4", 24_020_352),
    "ir_50": ("0182d5a69b6ad87199f21a1f0bc755bff0dd8d5857917a8d01c5a394d055663e", 43_585_600),
    "ir_101": ("791ceacdf2e4149b00678dd95c267e9c15ba7342d9ae02a73bbabb4d21cd9fb0", 65_150_912),
    "ir_se_50": ("040807409a76ea7a7feffc5b6b794ae967090449afc2992b723eee3f2dbf7459", 43_808_320),
    "ir_200": ("3e3c179bcc9626c8de3475e7bc171ad6614aa4f38d0602af915db96bd7e61b61", 114_138_240),
    "evolve_ir_50": ("adc7f74a67879f4bc8dbbca359d4c37b9c27a6f3e62c1c6fe7da7d5307d281d5", 43_574_976),
    "evolve_ir_se_50": ("f7a5c3f9fb2662b73ffaca96ef1bcfde5455580d22cefad1b806e2804f1600fd", 43_797_696),
    "evolve_ir_152": ("716102f971978f144646f07aa8aea9a0f19df5410aec9f755c9e4854e56c059a", 70_737_600),
}


def seeded(network: IRNet) -> IRNet:
    """Weights of which none is 0 or 1, so that each of them counts."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif tensor.dim() == 1:
                tensor.normal_(0.5, 0.2, generator=generator)
            elif tensor.is_floating_point():
                tensor.normal_(0, (2 / tensor[0].numel()) ** 0.5, generator=generator)
    return network.eval()


def faces(size: int = 112) -> Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_embeds_as_its_twin(layout: IRLayout) -> None:
    network, images = seeded(IRNet(layout, num_features=8)), faces(layout.image_size)
    with torch.no_grad():
        met = network(images)
    expected = ir_embeddings(network.state_dict(), images, STARTS)
    assert expected.std() > 0.1
    torch.testing.assert_close(met.double(), expected, rtol=1e-4, atol=1e-5)


def assert_read_back(network: IRNet, layout: IRLayout) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    assert IRLayout.in_shapes(shapes) == layout
    assert IRLayout.of(layout.name) == layout


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_is_read_off_its_tensors_and_its_name(layout: IRLayout) -> None:
    with torch.device("meta"):
        assert_read_back(IRNet(layout), layout)


@pytest.mark.parametrize("name", AUTHORS)
def test_layout_is_the_authors(name: str) -> None:
    with torch.device("meta"):
        network = IRNet(IR_NAMES[name])
    assert (layout_digest(network), parameter_count(network)) == AUTHORS[name]
    assert IR_NAMES[name].name == name
    assert_read_back(network, IR_NAMES[name])


def test_a_name_is_refused_where_it_says_nothing() -> None:
    assert not is_network("ir_51")
    assert IRLayout.of("r50") is None
    wrong = ("ir:", "ir:units=1-2", "ir:depth=50", "ir:widths=a-b-c-d", "ir:affine=maybe", "ir:side=x", "ir:stem=0")
    for name in (*wrong, "ir:units=9-9-9-9999", "ir:widths=8-16-24-32,squeeze=se_block", "ir:squeeze=a b"):
        with pytest.raises(ConfigError, match=name):
            get_backbone(name)


def test_other_tensors_are_no_ir_network() -> None:
    assert IRLayout.in_shapes({}) is None
    frame = {"input_layer.0.weight": (16, 3, 3, 3), "output_layer.3.weight": (8, 784)}
    assert IRLayout.in_shapes(frame) is None
    for width in (0, 16):
        assert IRLayout.in_shapes(frame | {"body.0.res_layer.1.weight": (width, 16, 3, 3)}) is None


def test_its_maps_are_found_by_anybody_s_modules() -> None:
    class Theirs(nn.Module):
        """The same modules in a class of somebody else's."""

        def __init__(self, network: IRNet) -> None:
            super().__init__()
            self.input_layer, self.body, self.output_layer = network.input_layer, network.body, network.output_layer

        def forward(self, images: Tensor) -> Tensor:
            embeddings: Tensor = self.output_layer(self.body(self.input_layer(images)))
            return embeddings

    network = Theirs(seeded(IRNet(LAYOUTS["AdaFace"], num_features=8)))
    places = [find_map(network, tap=tap) for tap in range(4)]
    assert [place.module for place in places] == ["body.4", "body.3", "body.2", "body.0"]
    shapes = [map_shape(network, place, 112) for place in places]
    assert shapes == [(64, 7, 7), (48, 14, 14), (32, 28, 28), (16, 56, 56)]
    for tap, shape in enumerate(shapes):
        assert cut_teacher(load_teacher(network), tap=tap).map_shape == shape
    assert cut_teacher(load_teacher(seeded(IRNet(LAYOUTS["AdaFace"], num_features=8)))).map_shape == shapes[0]
