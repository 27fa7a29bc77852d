"""What holds for every network: layout, sizes, precision, refusals; and equality with the host, where it is at hand."""

import math
from types import ModuleType
from typing import TypeVar

import pytest
import torch
from torch import Tensor, nn

from arcface_kd.backbones import NETWORKS, get_backbone
from arcface_kd.errors import ConfigError
from tests.backbones.layout import layout_digest, parameter_count

# Digest of names, order, shapes and types of the state_dict at 512-d, and parameters. arcface_torch: taken from the
# host (7fadd420) and compared with it below; mobilefacenet: from fdbtrs/AdaDistill at 0842186b.
LAYOUTS = {
    "r18": ("a9d2aef97007db8a664f92906fdd4ed9526be29ef5e3c21709e1d71912dc9025", 24_025_600),
    "r34": ("534fce0a72e17b2ee6e31c669eae9e36c22cd995f414a0e182795c66211fcabc", 34_139_328),
    "r50": ("dc433c582b32d511040c7f2e058611a1afd89d02e7e0bd0ef10e463b1ae6de85", 43_590_848),
    "r100": ("f00bac9b72557da4a57214e2796f1265f48fb4e4032f282abf16755ced2c8bcd", 65_156_160),
    "r200": ("dac2d2c486712b9175539fac9457cb5df1a9584f842237f3ff38696744b2e144", 118_833_920),
    "mbf": ("30a2ce12c9e12d9cd4510fe12fbe3127d6b7611ff229c7b13c77f56553a8ebc7", 2_059_520),
    "mbf_large": ("8fbd5c84258306dbb3cac6a639c3cb28e547dc94601627a8025a4eaa2f6ef2f2", 6_314_880),
    "mobilefacenet": ("b0fca620113204dabaee49a4a252aa14083ee13563a65772a6f663da00ff7d81", 1_199_488),
    # Trained parameters as the authors' own count has them (Flops.ipynb of HamadYA/GhostFaceNets).
    "ghostfacenet": ("cf7cb30e015bbc447257fdac93ec7d20937baab924c233adf7adcaa83662da46", 6_795_720),
    "thin_r18": ("326e50e17e2b32d7febfd47f4c594c896ce36b6952031485992169e14e190bee", 3_515_552),
    "thin_r10": ("0c7f96565ebedc2506bf4308e7a9047eab1b1934e7035cdf5f036b5a25495190", 1_011_056),
}
OF_THE_HOST = ("r18", "r34", "r50", "r100", "r200", "mbf", "mbf_large")
SMALL = (
    *("r18", "mbf", "mobilefacenet", "thin_r18", "ghostfacenet:version=2,width=0.3,stride=2"),
    "ir:units=1-2-1-1,widths=16-32-48-64,stem=16,squeeze=se_block",
)


Network = TypeVar("Network", bound=nn.Module)


def settled(network: Network, images: Tensor) -> Network:
    """Running statistics of ``images``: those of a fresh network let deep ones overflow."""
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
    network.train()
    with torch.no_grad():
        network(images)
    return network


def faces(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, 112, 112, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("name", NETWORKS)
def test_layout_parameters_and_which_of_them_is_frozen(name: str) -> None:
    with torch.device("meta"):
        network = get_backbone(name)
    assert (layout_digest(network), parameter_count(network)) == LAYOUTS[name]
    frozen = [key for key, parameter in network.named_parameters() if not parameter.requires_grad]
    assert frozen == (["features.weight"] if name.startswith(("r", "thin")) else [])


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("num_features", [1, 128])
def test_embedding_size(name: str, num_features: int) -> None:
    with torch.device("meta"):
        network = get_backbone(name, num_features=num_features)
        assert network(torch.empty(2, 3, 112, 112)).shape == (2, num_features)


@pytest.mark.parametrize("name", SMALL)
def test_forward_is_tail_of_feature_map(name: str) -> None:
    network = settled(get_backbone(name, num_features=32), faces(4)).eval()
    images = faces(2, seed=1)
    with torch.no_grad():
        expected = network(images)
        assert torch.equal(network.tail(network.feature_map(images)), expected)
    assert expected.shape == (2, 32)
    assert expected.std() > 0.1


@pytest.mark.parametrize("name", SMALL)
def test_every_trainable_parameter_gets_a_finite_gradient(name: str) -> None:
    network = get_backbone(name, num_features=32, fp16=True)
    network(faces(4)).pow(3).sum().backward()
    for key, parameter in network.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, key
            assert torch.isfinite(parameter.grad).all(), key
            assert parameter.grad.abs().sum() > 0, key


def first_of(network: nn.Module, kind: type[nn.Module]) -> nn.Module:
    return next(module for module in network.modules() if isinstance(module, kind))


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("surrounding", [False, True])
@pytest.mark.parametrize("fp16", [False, True])
def test_precision_is_the_networks_own(name: str, fp16: bool, surrounding: bool) -> None:
    network = settled(get_backbone(name, num_features=32, fp16=fp16), faces(4)).eval()
    seen: dict[str, torch.dtype] = {}
    first_of(network, nn.Conv2d).register_forward_hook(lambda m, i, o: seen.update(convolution=o.dtype))
    embedding = first_of(network, nn.Linear)
    embedding.register_forward_hook(lambda m, i, o: seen.update(embedding=o.dtype, flat=i[0].dtype))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=surrounding):
        embeddings = network(faces(2, seed=1))
    assert seen["convolution"] == (torch.bfloat16 if fp16 else torch.float32)
    assert seen["flat"] == seen["embedding"] == embeddings.dtype == torch.float32


@pytest.mark.parametrize("name", SMALL)
def test_bfloat16_stays_close_to_float32(name: str) -> None:
    network = settled(get_backbone(name), faces(16)).eval()
    images = faces(4, seed=1)
    with torch.no_grad():
        exact = network(images)
        network.fp16 = True
        half = network(images)
    assert not torch.equal(exact, half)
    assert nn.functional.cosine_similarity(exact, half).min() > 0.98


@pytest.mark.parametrize("name", ["r18", "thin_r18", SMALL[-1]])
def test_dropout_acts_in_training_only(name: str) -> None:
    network = settled(get_backbone(name, dropout=0.4, num_features=8), faces(4))
    seen: list[Tensor] = []
    first_of(network, nn.Linear).register_forward_hook(lambda m, i, o: seen.append(i[0].detach()))
    network(faces(4))
    network.eval()(faces(4))
    zeros = [(flat == 0).float().mean().item() for flat in seen]
    assert zeros[0] == pytest.approx(0.4, abs=0.05)
    assert zeros[1] < 0.01


@pytest.mark.parametrize(
    ("keywords", "named"),
    [
        ({"name": "r19"}, ["'r19'", *LAYOUTS]),
        ({"name": "vit_t"}, ["'vit_t'"]),
        *(
            ({"name": own}, [own])
            for own in ("python:", "python:tests.networks", "python:tests.networks:none", "python:no.such:f")
        ),
        ({"name": "r18", "num_features": 0}, ["embedding size 0", "at least 1"]),
        ({"name": "r18", "num_features": 2.5}, ["embedding size 2.5", "whole number"]),
        ({"name": "r18", "num_features": True}, ["embedding size True"]),
        ({"name": "r18", "dropout": 1.0}, ["dropout 1.0", "below 1"]),
        ({"name": "r18", "dropout": math.nan}, ["dropout nan"]),
        ({"name": "mbf", "dropout": 0.1}, ["dropout 0.1", "mbf", "r18"]),
    ],
)
def test_refusals(keywords: dict, named: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        get_backbone(**keywords)
    assert "\n" not in str(caught.value)
    for word in named:
        assert word in str(caught.value)


@pytest.mark.trainer
@pytest.mark.filterwarnings("ignore:.*torch.cuda.amp.autocast:FutureWarning")
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in ("r100", "r200") else []) for n in OF_THE_HOST]
)
def test_weights_checkpoints_and_embeddings_are_the_hosts(name: str, host_backbones: ModuleType) -> None:
    torch.manual_seed(7)
    theirs = host_backbones.get_model(name, dropout=0.0, fp16=False, num_features=512)
    torch.manual_seed(7)
    ours = get_backbone(name)
    assert layout_digest(theirs) == LAYOUTS[name][0]
    for key, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[key]), key
    # The order decides which momentum of a saved optimizer goes to which parameter.
    assert [(k, p.requires_grad) for k, p in theirs.named_parameters()] == [
        (k, p.requires_grad) for k, p in ours.named_parameters()
    ]
    settled(theirs, faces(2))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    images = faces(2, seed=1)
    with torch.no_grad():
        expected, met = theirs.eval()(images), ours.eval()(images)
    assert torch.isfinite(expected).all()
    assert expected.std() > 0.01
    torch.testing.assert_close(met, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.trainer
@pytest.mark.filterwarnings("ignore:.*torch.cuda.amp.autocast:FutureWarning")
@pytest.mark.parametrize("name", ["r18", "mbf", "mbf_large"])
def test_training_step_is_the_hosts(name: str, host_backbones: ModuleType) -> None:
    theirs = host_backbones.get_model(name, dropout=0.0, fp16=False, num_features=64)
    ours = get_backbone(name, num_features=64)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for network in (theirs, ours):
        network.train()(faces(2, seed=2)).pow(3).sum().backward()
    for (key, expected), met in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        assert (expected.grad is None) == (met.grad is None), key
        if expected.grad is not None and met.grad is not None:
            assert torch.isfinite(expected.grad).all()
            torch.testing.assert_close(met.grad, expected.grad, rtol=1e-5, atol=1e-6, msg=key)
    for key, expected in theirs.named_buffers():
        torch.testing.assert_close(ours.get_buffer(key), expected, rtol=1e-6, atol=1e-6, msg=key)


@pytest.mark.gpu
@pytest.mark.trainer
@pytest.mark.filterwarnings("ignore:.*torch.cuda.amp.autocast:FutureWarning")
@pytest.mark.parametrize("name", ["r18", "mbf"])
def test_float16_on_a_gpu_is_the_hosts(name: str, host_backbones: ModuleType) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.manual_seed(3)
    theirs = host_backbones.get_model(name, dropout=0.0, fp16=True, num_features=64).cuda()
    images = faces(8).cuda()
    settled(theirs, images).eval()
    ours = get_backbone(name, fp16=True, num_features=64).cuda().eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-3, atol=1e-3)
