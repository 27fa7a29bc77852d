r"""Where pairs of a batch stand among a verification system's thresholds.

A threshold accepts a share of the impostor pairs (two identities) at most: its false positive rate. How many of several
thresholds a pair passes, counted softly, is its rank:

    r(x) = sum_k sigmoid( (x - threshold_k) / temperature )

Two systems agree about a pair where its rank is the same, though the cosines may differ.
"""

import torch
from torch import Tensor


def soft_rank(cosine: Tensor, thresholds: Tensor, temperature: float) -> Tensor:
    """How many thresholds a pair passes.

    Args:
        cosine: cosines of pairs, any shape.
        thresholds: (K,).
        temperature: how soft the counting is, positive, in units of the cosine.

    Returns:
        In [0, K], of the shape of ``cosine``.
    """
    return ((cosine.unsqueeze(-1) - thresholds) / temperature).sigmoid().sum(-1)


def impostor_thresholds(cosine: Tensor, impostor: Tensor, pairs_per_acceptance: tuple[int, ...]) -> Tensor:
    """The cosines that one in so many impostor pairs exceeds.

    Args:
        cosine: (P,) cosines of pairs.
        impostor: (P,) bool, whether a pair is of two identities.
        pairs_per_acceptance: one over each false positive rate, rising, at least 2.

    Returns:
        (K,) cosines, from the largest rate to the smallest. Rates below one over the number of impostor pairs all have
        the largest cosine. -inf where there is no impostor pair.
    """
    # As many as the largest rate can ask for; how many there are stays on the device.
    kept = cosine.shape[0] // pairs_per_acceptance[0] + 1
    ranked = cosine.masked_fill(~impostor, -torch.inf).topk(min(kept, cosine.shape[0])).values
    count = impostor.sum()
    return ranked[torch.stack([count // pairs for pairs in pairs_per_acceptance])]


def rank_loss(student: Tensor, teacher: Tensor, chosen: Tensor) -> Tensor:
    """Mean squared difference of ranks.

    Args:
        student: (P,) ranks of pairs.
        teacher: (P,) ranks of the same pairs.
        chosen: (P,) bool, the pairs that count.

    Returns:
        A scalar; 0 where none is chosen.
    """
    return ((student - teacher).square() * chosen).sum() / chosen.sum().clamp_min(1)
