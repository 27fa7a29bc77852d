"""VisionTransformer of arcface_torch (vit_t to vit_h), TransFace (transface_vit_s, ...) and CVLface, as a teacher.

After Dosovitskiy et al., "An Image is Worth 16x16 Words" (ICLR 2021, arXiv 2010.11929), with ReLU6 and without a class
token: all tokens of an image in one row make the embedding, in TransFace (Dan et al., ICCV 2023, arXiv 2308.10133) each
times a gate. Parameter names, their order and shapes are those of the projects, so that their checkpoints load with
``strict=True``, and so is the arithmetic in evaluation mode. What acts in training only (masked tokens, dropped paths)
is left out, which is why ``get_backbone`` offers none of these as a student: the host trains them.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from arcface_kd.backbones.face_backbone import FaceBackbone

_IMAGE = 112
_NORM_EPS = 2e-5


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        batch, count, width = tokens.shape
        heads = self.qkv(tokens).view(batch, count, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        # Attention is float32 whatever surrounds it, as in arcface_torch.
        with FaceBackbone.autocast(tokens, half=False):
            mixed = F.scaled_dot_product_attention(*heads.float().unbind(0))
        return cast(Tensor, self.proj(mixed.transpose(1, 2).reshape(batch, count, width)))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, ratio: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.attn = _Attention(width, heads)
        self.mlp = nn.Sequential(
            OrderedDict(fc1=nn.Linear(width, ratio * width), act=nn.ReLU6(), fc2=nn.Linear(ratio * width, width))
        )

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attn(self.norm1(tokens))
        return cast(Tensor, tokens + self.mlp(self.norm2(tokens)))


class VisionTransformer(FaceBackbone):
    """A ViT for 112x112 faces. With arcface_torch's patches of 9 pixels the last 4 of each side are not seen.

    ``width`` is the dimension of a token, also ``embed_dim``, by arcface_torch's name; ``depth`` the number of blocks,
    ``patch`` the height and width of a token's patch, ``heads`` those of the attention, ``ratio`` the hidden width of a
    block's perceptron over that of a token. ``gated`` multiplies each token by a gate in (0, 1), made of all tokens, as
    TransFace does. ``fp16`` is autocast up to the last norm, except attention itself.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        *,
        patch: int = 9,
        heads: int = 8,
        ratio: int = 4,
        gated: bool = False,
        fp16: bool = False,
        num_features: int = 512,
    ) -> None:
        super().__init__(fp16=fp16)
        self.embed_dim = width
        self._side = _IMAGE // patch
        self.pos_embed = nn.Parameter(torch.zeros(1, self._side**2, width))
        # Stands for tokens that training leaves out; in evaluation there are none, but checkpoints hold it.
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, width, patch, patch)))
        self.blocks = nn.Sequential(*(_Block(width, heads, ratio) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.senet: nn.Sequential | None = None
        if gated:
            count = self._side**2
            squeeze = nn.Linear(width * count, count, bias=False)
            self.senet = nn.Sequential(squeeze, nn.ReLU(), nn.Linear(count, count, bias=False), nn.Sigmoid())
        self.feature = nn.Sequential(
            nn.Linear(width * self._side**2, width, bias=False),
            nn.BatchNorm1d(width, eps=_NORM_EPS),
            nn.Linear(width, num_features, bias=False),
            nn.BatchNorm1d(num_features, eps=_NORM_EPS),
        )

    def feature_map(self, images: Tensor) -> Tensor:
        """The tokens in their places: (B, 3, 112, 112) to (B, width, 112 // patch, 112 // patch)."""
        with self.autocast(images, half=self.fp16):
            tokens = self.patch_embed(images).flatten(2).transpose(1, 2) + self.pos_embed
            tokens = self.blocks(tokens)
        with self.autocast(images, half=False):
            return cast(Tensor, self.norm(tokens.float()).transpose(1, 2).unflatten(2, (self._side, self._side)))

    def tail(self, feature_map: Tensor) -> Tensor:
        """All tokens in one row, two linear layers with batch norms: (B, width, H, W) to (B, D)."""
        with self.autocast(feature_map, half=False):
            tokens = feature_map.flatten(2).transpose(1, 2)
            if self.senet is not None:
                tokens = tokens * self.senet(tokens.flatten(1)).unsqueeze(2)
            return cast(Tensor, self.feature(tokens.flatten(1)))


VITS: Mapping[str, Callable[..., FaceBackbone]] = {
    "vit_t": partial(VisionTransformer, 256, 12),
    "vit_s": partial(VisionTransformer, 512, 12),
    "vit_b": partial(VisionTransformer, 512, 24),
    "vit_l": partial(VisionTransformer, 768, 24),
    "vit_h": partial(VisionTransformer, 1024, 48),
    "transface_vit_s": partial(VisionTransformer, 512, 12, gated=True),
    "transface_vit_b": partial(VisionTransformer, 512, 24, gated=True),
    "transface_vit_l": partial(VisionTransformer, 768, 24, gated=True),
    "cvlface_vit_s": partial(VisionTransformer, 512, 12, patch=8, ratio=5),
    "cvlface_vit_b": partial(VisionTransformer, 512, 24, patch=8, heads=16, ratio=3),
}
"""Each network's name and what builds it, with the keywords ``fp16`` and ``num_features``."""

HOST_NAMES: Mapping[str, str] = {
    "vit_t_dp005_mask0": "vit_t",
    "vit_s_dp005_mask_0": "vit_s",
    "vit_b_dp005_mask_005": "vit_b",
    "vit_l_dp005_mask_005": "vit_l",
}
"""arcface_torch's names for the same networks with other rates of what acts in training only."""
