"""ViTs as teachers: a twin written out by hand, the host's own where it is at hand, files."""

import importlib
import math
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from arcface_kd.backbones import FaceBackbone
from arcface_kd.backbones.feature_taps import find_map
from arcface_kd.backbones.vit import HOST_NAMES, VITS, VisionTransformer
from arcface_kd.teachers import load_teacher
from arcface_kd.teachers.checkpoint import load_network
from arcface_kd.teachers.trunk_and_tail import cut_teacher
from tests.backbones.layout import layout_digest, parameter_count


def seeded(network: nn.Module) -> nn.Module:
    """Weights of which none is 0 or 1, so that each of them counts."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif tensor.is_floating_point():
                tensor.normal_(0.5 if "norm" in name else 0.0, 0.1, generator=generator)
    return network.eval()


def small(**shape: Any) -> FaceBackbone:
    network = VisionTransformer(16, 2, num_features=8, **shape)
    seeded(network)
    return network


def faces(count: int) -> Tensor:
    return torch.rand(count, 3, 112, 112, generator=torch.Generator().manual_seed(1)) * 2 - 1


def by_hand(state: dict[str, Tensor], image: Tensor, depth: int, heads: int = 8) -> Tensor:
    """One image in float64, token by token and head by head."""
    w = {name: tensor.double() for name, tensor in state.items()}
    width = w["pos_embed"].shape[2]

    def layer_norm(x: Tensor, name: str) -> Tensor:
        centered = x - x.mean(-1, keepdim=True)
        return (
            centered / (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"]
            + w[f"{name}.bias"]
        )

    def batch_norm(x: Tensor, name: str) -> Tensor:
        scaled = (x - w[f"{name}.running_mean"]) / (w[f"{name}.running_var"] + 2e-5).sqrt()
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    kernel = w["patch_embed.proj.weight"].flatten(1)
    p = w["patch_embed.proj.weight"].shape[-1]
    corners = [(p * row, p * column) for row in range(112 // p) for column in range(112 // p)]
    patches = [image[:, y : y + p, x : x + p].double().flatten() for y, x in corners]
    x = torch.stack([kernel @ patch for patch in patches]) + w["patch_embed.proj.bias"] + w["pos_embed"][0]
    for number in range(depth):
        name = f"blocks.{number}"
        query, key, value = (layer_norm(x, f"{name}.norm1") @ w[f"{name}.attn.qkv.weight"].T).split(width, 1)
        size = width // heads
        mixed = []
        for head in range(heads):
            own = slice(head * size, head * size + size)
            weights = (query[:, own] @ key[:, own].T / math.sqrt(size)).softmax(1)
            mixed.append(weights @ value[:, own])
        x = x + torch.cat(mixed, 1) @ w[f"{name}.attn.proj.weight"].T + w[f"{name}.attn.proj.bias"]
        hidden = layer_norm(x, f"{name}.norm2") @ w[f"{name}.mlp.fc1.weight"].T + w[f"{name}.mlp.fc1.bias"]
        x = x + hidden.clamp(0, 6) @ w[f"{name}.mlp.fc2.weight"].T + w[f"{name}.mlp.fc2.bias"]
    x = layer_norm(x, "norm")
    if "senet.0.weight" in w:
        hidden = (w["senet.0.weight"] @ x.flatten()).clamp(0)
        gates = [1 / (1 + math.exp(-float(each))) for each in w["senet.2.weight"] @ hidden]
        x = torch.stack([gate * token for gate, token in zip(gates, x, strict=True)])
    row = x.flatten()
    row = batch_norm(w["feature.0.weight"] @ row, "feature.1")
    return batch_norm(w["feature.2.weight"] @ row, "feature.3")


@pytest.mark.parametrize(
    ("shape", "heads"),
    [({}, 8), ({"gated": True}, 8), ({"patch": 8, "heads": 4, "ratio": 3}, 4)],
    ids=["host", "TransFace", "CVLface"],
)
def test_embeds_as_written_out_by_hand(shape: dict[str, int], heads: int) -> None:
    network, images = small(**shape), faces(2)
    with torch.no_grad():
        met = network(images)
    expected = torch.stack([by_hand(network.state_dict(), image, 2, heads) for image in images])
    assert expected.std() > 0.05
    torch.testing.assert_close(met.double(), expected, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_is_a_teacher_by_its_tensors_alone(tmp_path: Path) -> None:
    with torch.device("meta"):
        sizes = {name: parameter_count(build()) for name, build in VITS.items()}
    assert sizes["vit_t"] < sizes["vit_s"] < sizes["vit_b"] < sizes["vit_l"] < sizes["vit_h"]
    network = seeded(VITS["vit_t"](num_features=24))
    torch.save({"module." + name: tensor for name, tensor in network.state_dict().items()}, tmp_path / "model.pt")
    teacher = load_teacher(tmp_path / "model.pt")
    assert (teacher.embedding_size, teacher.description) == (24, f"vit_t from {tmp_path / 'model.pt'}")
    with torch.no_grad():
        torch.testing.assert_close(teacher(faces(2)), network(faces(2)), rtol=1e-4, atol=1e-4)
    named = load_network(tmp_path / "model.pt", "vit_t_dp005_mask0")
    assert (named.name, named.num_features) == ("vit_t", 24)


# Digests from CVLface's own code at d3d09c93, at 512-d.
@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("cvlface_vit_s", "c984cb55fd50a3de9a85bc2e4fb0ea002f436fed0b82d23415909e85923d7b67"),
        ("cvlface_vit_b", "efbd0e79c54fcad9187a0013f07294af745159e2bae5d34d1b1ed5302757d4e3"),
    ],
)
def test_layout_is_cvlface_s(name: str, digest: str) -> None:
    with torch.device("meta"):
        assert layout_digest(VITS[name]()) == digest


def test_bfloat16_stays_close_to_float32() -> None:
    network, images = small(), faces(2)
    with torch.no_grad():
        exact = network(images)
        network.fp16 = True
        half = network(images)
    assert not torch.equal(exact, half)
    assert nn.functional.cosine_similarity(exact, half).min() > 0.99


def test_its_tail_is_found() -> None:
    network, images = small(), faces(2)
    assert str(find_map(network)) == "the input of 'feature'"
    cut = cut_teacher(load_teacher(network))
    assert cut.map_shape == (16, 12, 12)
    with torch.no_grad():
        torch.testing.assert_close(network.tail(network.feature_map(images)), network(images))


@pytest.mark.trainer
@pytest.mark.filterwarnings("ignore:.*torch.cuda.amp.autocast:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*CUDA is not available:UserWarning")
def test_weights_and_embeddings_are_the_hosts(host_backbones: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host takes three small things from timm, which evaluation does not need."""
    layers = ModuleType("timm.models.layers")
    vars(layers).update(
        DropPath=lambda rate: nn.Identity(), to_2tuple=lambda x: (x, x), trunc_normal_=nn.init.trunc_normal_
    )
    for name, module in {"timm": ModuleType("timm"), "timm.models": ModuleType("timm.models")}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(sys.modules, "timm.models.layers", layers)
    importlib.import_module("host_backbones.vit")
    # The host asks for the values of a few numbers that it makes, which an empty device does not have.
    monkeypatch.setattr(torch, "linspace", partial(torch.linspace, device="cpu"))
    with torch.device("meta"):
        for name in ("vit_s", "vit_b", "vit_h", *HOST_NAMES):
            theirs = host_backbones.get_model(name, num_features=64)
            assert layout_digest(theirs) == layout_digest(VITS[HOST_NAMES.get(name, name)](num_features=64)), name
    theirs = seeded(host_backbones.get_model("vit_t", num_features=64))
    ours = VITS["vit_t"](num_features=64).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    with torch.no_grad():
        expected = theirs(faces(2))
        torch.testing.assert_close(ours(faces(2)), expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.1
