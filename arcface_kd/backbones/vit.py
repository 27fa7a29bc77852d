"""VisionTransformer (vit_t, vit_s, vit_b, vit_l, vit_h) of arcface_torch, as a teacher.

After Dosovitskiy et al., "An Image is Worth 16x16 Words" (ICLR 2021, arXiv 2010.11929), with ReLU6 and without a class
token: all tokens of an image in one row make the embedding. Parameter names, their order and shapes are those of
arcface_torch, so that its checkpoints load with ``strict=True``, and so is the arithmetic in evaluation mode. What acts
in training only (masked tokens, dropped paths) is left out, which is why ``get_backbone`` offers none of these as a
student: the host trains them.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from arcface_kd.backbones.face_backbone import FaceBackbone

_PATCH = 9
_SIDE = 112 // _PATCH
_HEADS = 8
_NORM_EPS = 2e-5


class _Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        batch, count, width = tokens.shape
        heads = self.qkv(tokens).view(batch, count, 3, _HEADS, width // _HEADS).permute(2, 0, 3, 1, 4)
        # Attention is float32 whatever surrounds it, as in arcface_torch.
        with FaceBackbone.autocast(tokens, half=False):
            mixed = F.scaled_dot_product_attention(*heads.float().unbind(0))
        return cast(Tensor, self.proj(mixed.transpose(1, 2).reshape(batch, count, width)))


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.attn = _Attention(width)
        self.mlp = nn.Sequential(
            OrderedDict(fc1=nn.Linear(width, 4 * width), act=nn.ReLU6(), fc2=nn.Linear(4 * width, width))
        )

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attn(self.norm1(tokens))
        return cast(Tensor, tokens + self.mlp(self.norm2(tokens)))


class VisionTransformer(FaceBackbone):
    """A ViT for 112x112 faces: 12 x 12 tokens of 9 x 9 pixels, 8 heads; the last 4 pixels of each side are not seen.

    Args:
        width: dimension of a token.
        depth: number of blocks.
        fp16: autocast of everything up to the last norm except attention itself; the embedding layer is float32.
        num_features: embedding size D.

    Attributes:
        embed_dim: dimension of a token, by arcface_torch's name.
    """

    def __init__(self, width: int, depth: int, *, fp16: bool = False, num_features: int = 512) -> None:
        super().__init__(fp16=fp16)
        self.embed_dim = width
        self.pos_embed = nn.Parameter(torch.zeros(1, _SIDE**2, width))
        # Stands for tokens that training leaves out; in evaluation there are none, but checkpoints hold it.
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, width, _PATCH, _PATCH)))
        self.blocks = nn.Sequential(*(_Block(width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.feature = nn.Sequential(
            nn.Linear(width * _SIDE**2, width, bias=False),
            nn.BatchNorm1d(width, eps=_NORM_EPS),
            nn.Linear(width, num_features, bias=False),
            nn.BatchNorm1d(num_features, eps=_NORM_EPS),
        )

    def feature_map(self, images: Tensor) -> Tensor:
        """The tokens in their places: (B, 3, 112, 112) to (B, width, 12, 12)."""
        with self.autocast(images, half=self.fp16):
            tokens = self.patch_embed(images).flatten(2).transpose(1, 2) + self.pos_embed
            tokens = self.blocks(tokens)
        with self.autocast(images, half=False):
            return cast(Tensor, self.norm(tokens.float()).transpose(1, 2).unflatten(2, (_SIDE, _SIDE)))

    def tail(self, feature_map: Tensor) -> Tensor:
        """All tokens in one row, two linear layers with batch norms: (B, width, 12, 12) to (B, D)."""
        with self.autocast(feature_map, half=False):
            return cast(Tensor, self.feature(feature_map.flatten(2).transpose(1, 2).flatten(1)))


VITS: Mapping[str, Callable[..., FaceBackbone]] = {
    "vit_t": partial(VisionTransformer, 256, 12),
    "vit_s": partial(VisionTransformer, 512, 12),
    "vit_b": partial(VisionTransformer, 512, 24),
    "vit_l": partial(VisionTransformer, 768, 24),
    "vit_h": partial(VisionTransformer, 1024, 48),
}
"""Each network's name and what builds it, with the keywords ``fp16`` and ``num_features``."""

HOST_NAMES: Mapping[str, str] = {
    "vit_t_dp005_mask0": "vit_t",
    "vit_s_dp005_mask_0": "vit_s",
    "vit_b_dp005_mask_005": "vit_b",
    "vit_l_dp005_mask_005": "vit_l",
}
"""arcface_torch's names for the same networks with other rates of what acts in training only."""
