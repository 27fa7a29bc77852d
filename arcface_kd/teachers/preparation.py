"""What every teacher shares: preparing images, test images, the precision to compute in, the shape of embeddings."""

from functools import lru_cache

import torch
from torch import Tensor, nn

from arcface_kd.teachers.options import Precision, Preprocessing

_AUTOCAST: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}
TOLERANCE: dict[Precision, float] = {"fp32": 2e-3, "bf16": 0.1, "fp16": 2e-2}
"""Numbers of unit embeddings that two ways of computing them in one precision give differ by less."""


def default_precision() -> Precision:
    """The precision of teachers that come in files: fp16 where there is a GPU, else fp32."""
    return "fp16" if torch.cuda.is_available() else "fp32"


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """The context of a precision; fp32 on a CPU beside a GPU, where only test images are computed and fp16 is slow."""
    enabled = precision in _AUTOCAST and not (device.type == "cpu" and torch.cuda.is_available())
    return torch.autocast(device.type, dtype=_AUTOCAST.get(precision), enabled=enabled)


def probe_images(size: int) -> Tensor:
    """Two unlike images (2, 3, S, S) in [-1, 1] that are the same in every process: noise, and a ramp."""
    noise = torch.rand((3, size, size), generator=torch.Generator().manual_seed(0)) * 2 - 1
    ramp = torch.linspace(-1, 1, size).expand(3, size, size)
    return torch.stack([noise, ramp])


def prepared(images: Tensor, wanted: Preprocessing) -> Tensor:
    """Turn images (B, 3, H, W), RGB in [-1, 1], into what a network expects: (B, 3, S, S), (x - mean) / std."""
    if images.shape[-2:] != (wanted.size, wanted.size):
        images = nn.functional.interpolate(
            images, (wanted.size, wanted.size), mode="bilinear", align_corners=False, antialias=True
        )
    if wanted.channels == "bgr":
        images = images.flip(1)
    # ((image + 1) 127.5 - mean) / std in one step: exact when nothing is to be done.
    scale = [127.5 / std for std in wanted.std]
    shift = [(127.5 - mean) / std for mean, std in zip(wanted.mean, wanted.std, strict=True)]
    if scale == [1.0] * 3 and shift == [0.0] * 3:
        return images
    if len(set(scale)) == len(set(shift)) == 1:
        return images * scale[0] + shift[0]
    factors, offsets = _per_channel((*scale,), (*shift,), images.dtype, images.device)
    return images * factors + offsets


@lru_cache(maxsize=16)
def _per_channel(
    scale: tuple[float, ...], shift: tuple[float, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Factors and offsets (3, 1, 1), cached on the device: a copy in each step would wait for it."""
    with torch.inference_mode(False):
        factors, offsets = (torch.tensor(values, dtype=dtype).view(3, 1, 1) for values in (scale, shift))
        return factors.to(device), offsets.to(device)


def as_rows(embeddings: Tensor, count: int) -> Tensor:
    """Embeddings without axes of length 1: (N, D, 1, 1), (N, 1, D), or (D,) of one image, as (N, D)."""
    if count == 1 and embeddings.dim() == 1:
        return embeddings[None]
    if embeddings.dim() > 2 and embeddings.shape[1:].numel() == max(embeddings.shape[1:]):
        return embeddings.flatten(1)
    return embeddings
