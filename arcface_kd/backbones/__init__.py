"""Networks that embed aligned faces, by name: arcface_torch's, others for small devices, timm's and the user's own."""

from collections.abc import Callable, Mapping
from functools import partial

from arcface_kd.backbones.face_backbone import FaceBackbone
from arcface_kd.backbones.ghostfacenet import GhostFaceNet
from arcface_kd.backbones.ir import ANY_IR, IR_NAMES, IRLayout, IRNet
from arcface_kd.backbones.iresnet import IResNet
from arcface_kd.backbones.mobilefacenet import MobileFaceNet, NarrowMobileFaceNet
from arcface_kd.backbones.network_name import TIMM, name_checkpoints, parse_name
from arcface_kd.backbones.own_network import OWN, build_own_network, find_own_network
from arcface_kd.backbones.thin_resnet import ThinResNet
from arcface_kd.backbones.timm_network import TimmNetwork
from arcface_kd.errors import ConfigError

__all__ = ["KNOWN_NAMES", "NETWORKS", "OWN", "FaceBackbone", "find_own_network", "get_backbone", "is_network"]

_WITH_DROPOUT: Mapping[str, Callable[..., FaceBackbone]] = {
    "r18": partial(IResNet, (2, 2, 2, 2)),
    "r34": partial(IResNet, (3, 4, 6, 3)),
    "r50": partial(IResNet, (3, 4, 14, 3)),
    "r100": partial(IResNet, (3, 13, 30, 3)),
    "r200": partial(IResNet, (6, 26, 60, 6)),
    "thin_r18": ThinResNet,
    "thin_r10": partial(ThinResNet, (16, 32, 64, 96), 1),
}
_WITHOUT_DROPOUT: Mapping[str, Callable[..., FaceBackbone]] = {
    "mbf": partial(MobileFaceNet, (1, 4, 6, 2), width=2),
    "mbf_large": partial(MobileFaceNet, (2, 8, 12, 4), width=4),
    "mobilefacenet": NarrowMobileFaceNet,
    "ghostfacenet": GhostFaceNet,
}
NETWORKS: Mapping[str, Callable[..., FaceBackbone]] = {**_WITH_DROPOUT, **_WITHOUT_DROPOUT}
"""Each network's name and what builds it, with the keywords ``fp16`` and ``num_features``."""

KNOWN_NAMES = f"{', '.join(NETWORKS)}, ir_18 and its like, timm:NAME, {OWN}MODULE:FUNCTION"
"""For messages: what :func:`get_backbone` takes."""


def is_network(name: str) -> bool:
    """Whether :func:`get_backbone` knows a name; nothing is imported, and no option's range is checked."""
    if name in NETWORKS or name in IR_NAMES or name.startswith((OWN, ANY_IR)):
        return True
    try:
        plain = parse_name(name).name
    except ConfigError:
        return False
    return plain in NETWORKS or plain.startswith(TIMM)


def get_backbone(name: str, *, dropout: float = 0.0, fp16: bool = False, num_features: int = 512) -> FaceBackbone:
    """Build a network with fresh weights.

    Args:
        name: one of ``NETWORKS``. ``r18 r34 r50 r100 r200 mbf mbf_large`` have arcface_torch's parameters,
            ``mobilefacenet`` AdaDistill's (64 and 128 channels), ``thin_r18`` and ``thin_r10`` are the
            demo's teacher and student. Options follow a colon: ``mbf:width=1,se=true`` (also ``mbf_large``),
            ``ghostfacenet:version=1,width=1,stride=2``. ``ir_50``, ``ir_se_50`` and so on (`arcface_kd.backbones.ir`)
            have AdaFace's and face.evoLVe's parameters. ``timm:NAME`` is a model of timm with fresh weights,
            ``timm:NAME:rank=0.6`` the same with low-rank layers. ``python:MODULE:FUNCTION`` is a network of the user's
            own, see `find_own_network`.
        dropout: probability of dropping a value before the embedding layer, in [0, 1); MobileFaceNets have none.
        fp16: autocast of the convolutions, float16 on GPUs and bfloat16 on CPUs; the embedding layer is float32.
        num_features: embedding size D, at least 1.

    Returns:
        The network, in training mode: (B, 3, 112, 112) RGB images in [-1, 1] to (B, D) embeddings, not normalised. A
        user's own may be any ``nn.Module``. Its ``state_dict`` carries the name, beside torch's own notes on versions.

    Raises:
        ConfigError: an unknown name, a dropout out of range or for a network without one, an embedding size below 1, an
            own network that cannot be imported or built.
    """
    if not is_network(name):
        if ":" in name:
            # Says what is wrong with the options.
            parse_name(name)
        raise ConfigError(f"no network named {name!r}; there are: {KNOWN_NAMES}")
    if isinstance(num_features, bool) or not isinstance(num_features, int) or num_features < 1:
        raise ConfigError(f"embedding size {num_features!r}: wanted a whole number of at least 1, such as 512")
    if not 0 <= dropout < 1:
        raise ConfigError(f"dropout {dropout!r}: wanted a probability of at least 0 and below 1")
    if dropout and name not in _WITH_DROPOUT and IRLayout.of(name) is None:
        raise ConfigError(
            f"dropout {dropout!r}: {name} has no dropout layer; set dropout to 0 or take one of "
            f"{', '.join(_WITH_DROPOUT)}"
        )
    build = _builder(name)
    network = build(**({"dropout": dropout} if dropout else {}), fp16=fp16, num_features=num_features)
    name_checkpoints(network, name)
    return network


def _builder(name: str) -> Callable[..., FaceBackbone]:
    if name.startswith(OWN):
        return partial(build_own_network, name)
    if layout := IRLayout.of(name):
        return partial(IRNet, layout)
    parsed = parse_name(name)
    build = NETWORKS.get(parsed.name) or partial(TimmNetwork, parsed.name.removeprefix(TIMM))
    return partial(build, **parsed.options)
