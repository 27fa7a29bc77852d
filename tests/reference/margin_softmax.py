"""Margin softmax as one would write it down: dense logits, autograd for the gradients, one process."""

import math

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from arcface_kd.losses.margin import Margin


def target_cosine(cosine: Tensor, margin: Margin) -> Tensor:
    """psi(cos theta), with the straight continuation where m1 theta + m2 passes pi."""
    if margin.m1 == 1.0 and margin.m2 == 0.0:
        return cosine - margin.m3
    angle = margin.m1 * torch.acos(cosine) + margin.m2
    # Where the angle reaches pi, psi is -1 from above and -cos m2 - m2 sin m2 <= -1 from below.
    cosine_at_pi = math.cos((math.pi - margin.m2) / margin.m1)
    straight = cosine - cosine_at_pi - math.cos(margin.m2) - margin.m2 * math.sin(margin.m2)
    return torch.where(angle > math.pi, straight, torch.cos(angle)) - margin.m3


def dense_margin_softmax(
    embeddings: Tensor,
    labels: Tensor,
    centers: Tensor,
    margin: Margin,
    index: Tensor | None = None,
    product_dtype: torch.dtype | None = None,
) -> Tensor:
    """The loss over all classes at once, in the number format of the inputs.

    Beside each row's own class those of ``index`` take part, None for all; ``product_dtype`` is the format that
    autocast would give the product.
    """
    unit, directions = normalize(embeddings), normalize(centers)
    if product_dtype is None:
        cosine = unit @ directions.T
    else:
        cosine = (unit.to(product_dtype) @ directions.to(product_dtype).T).to(embeddings.dtype).clamp(-1, 1)
    valid = labels >= 0
    own = torch.zeros_like(cosine, dtype=torch.bool)
    own[valid, labels[valid]] = True
    logits = cosine
    if margin.filter_threshold > 0:
        logits = cosine.masked_fill((cosine > margin.filter_threshold) & ~own, 0.0)
    # acos only where it is looked at: its gradient elsewhere would be inf * 0.
    logits = logits.clone()
    logits[own] = target_cosine(cosine[own], margin)
    logits = margin.scale * logits
    if index is not None:
        taking_part = torch.zeros(centers.shape[0], dtype=torch.bool)
        taking_part[index] = True
        logits = logits.masked_fill(~(taking_part | own), -torch.inf)
    if not bool(valid.any()):
        return (embeddings.sum() + centers.sum()) * 0
    return cross_entropy(logits, labels.masked_fill(~valid, -1), ignore_index=-1)
