"""Distilled class centers: fp32 buffers, split over ranks, moved towards the teacher's embeddings.

They are no parameters: no optimiser moves them, no gradient is computed for them and nothing is all-reduced. Every rank
sees the gathered batch and updates the classes that it holds, so the ranks never disagree.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from arcface_kd.distributed.class_shard import ClassShard
from arcface_kd.losses.class_weights import inverse_norm

Repeated = Literal["mean", "last"]

# Classes are drawn in blocks, each from a generator of its own, so that a class starts with the same numbers on
# whichever rank and however many ranks there are.
_BLOCK = 4096


def initial_centers(shard: ClassShard, embedding_size: int, seed: int, std: float = 0.01) -> Tensor:
    """Normally distributed class centers that depend on the seed and the class, not on the number of ranks.

    Args:
        shard: which classes are wanted.
        embedding_size: their dimension D.
        seed: of the run, non-negative.
        std: standard deviation; 0.01 is what arcface_torch and AdaDistill's code use.

    Returns:
        (shard.size, D) fp32 on the CPU.
    """
    centers = torch.empty(shard.size, embedding_size)
    for block in range(shard.start // _BLOCK, -(-(shard.start + shard.size) // _BLOCK)):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + block)
        rows = torch.empty(_BLOCK, embedding_size).normal_(0, std, generator=generator)
        place = block * _BLOCK - shard.start
        first, last = max(-place, 0), min(shard.size - place, _BLOCK)
        centers[place + first : place + last] = rows[first:last]
    return centers


def repetition_weights(labels: Tensor, repeated: Repeated, dtype: torch.dtype = torch.float32) -> Tensor:
    """How much each row of a batch counts in the update of its class.

    Args:
        labels: (B,) int64, negative ones count nothing.
        repeated: ``mean`` gives each of n rows of one class 1 / n, whatever their order; ``last`` gives the last row 1
            and the others 0, as the published code leaves it.
        dtype: of the weights.

    Returns:
        (B,) weights.
    """
    # Sorted, since a comparison of all pairs takes more memory than the head for the thousands of rows of many ranks.
    labels = labels.contiguous()
    ordered, order = labels.sort(stable=True)
    end = torch.searchsorted(ordered, labels, right=True)
    if repeated == "mean":
        weights = (end - torch.searchsorted(ordered, labels)).to(dtype).reciprocal()
    else:
        weights = (order[end - 1] == torch.arange(labels.shape[0], device=labels.device)).to(dtype)
    return weights * (labels >= 0)


class DistilledCenters(nn.Module):
    """This rank's share of the class centers, with the exponential moving average that distils into them.

    Buffers:
        weight: (shard.size, D) fp32, not normalised: an average of unit vectors is shorter than 1.
        inverse_norms: (shard.size,) fp32, one over the norms; follows from ``weight`` and is not saved.

    Args:
        shard: the classes of this rank.
        embedding_size: dimension D of the teacher's embeddings.
        seed: of the run.
    """

    weight: Tensor
    inverse_norms: Tensor

    def __init__(self, shard: ClassShard, embedding_size: int, seed: int = 0) -> None:
        super().__init__()
        self.shard = shard
        self.register_buffer("weight", initial_centers(shard, embedding_size, seed))
        self.register_buffer("inverse_norms", inverse_norm(self.weight), persistent=False)
        self.register_load_state_dict_post_hook(lambda module, _: module.refresh())

    def refresh(self) -> None:
        """Find the norms again after ``weight`` was written from outside."""
        self.inverse_norms.copy_(inverse_norm(self.weight))

    @torch.no_grad()
    def cosine(self, labels: Tensor, unit: Tensor) -> Tensor:
        """Cosines of rows and their own class centers, for the classes of this rank.

        Args:
            labels: (B,) labels of the gathered batch.
            unit: (B, D) normalised rows.

        Returns:
            (B,) cosines, 0 where the class is held by another rank.
        """
        position, owned = self.shard.local(labels)
        cosine = (self.weight[position] * unit).sum(1) * self.inverse_norms[position]
        return torch.where(owned, cosine, torch.zeros_like(cosine))

    @torch.no_grad()
    def unit_rows(self, labels: Tensor) -> Tensor:
        """The normalised class centers of a batch, for the classes of this rank.

        Args:
            labels: (B,) labels of the gathered batch.

        Returns:
            (B, D); rows of other ranks' classes mean nothing.
        """
        position, _ = self.shard.local(labels)
        return self.weight[position] * self.inverse_norms[position].unsqueeze(1)

    @torch.no_grad()
    def update(self, labels: Tensor, teacher: Tensor, alpha: Tensor, repeated: Repeated = "mean") -> None:
        r"""Move the centers of this rank's classes: ``w_y <- a w_y + (1 - a) f_t`` (AdaDistill, eq. 5).

        A class that occurs n times in the batch has its n updates combined after ``repeated``. The step is written as
        an added difference, so that neither a sort nor a search for distinct labels makes the device wait.

        Args:
            labels: (B,) labels of the gathered batch; negative ones and other ranks' classes are passed over, and rows
                whose embeddings are not finite.
            teacher: (B, D) normalised teacher embeddings.
            alpha: (B,) in [0, 1], how much of the old center stays.
            repeated: ``mean`` or ``last``.
        """
        position, owned = self.shard.local(labels)
        if self.weight.shape[0] == 0:
            return
        share = repetition_weights(labels, repeated, teacher.dtype) * (1 - alpha)
        difference = (teacher - self.weight[position]) * share.unsqueeze(1)
        # Other ranks' rows add zero to row 0. A row that fp16 has overflown is passed over: the step that it spoils can
        # be skipped, a center that it spoils would be lost for good.
        kept = owned & difference.isfinite().all(1)
        difference = torch.where(kept.unsqueeze(1), difference, torch.zeros_like(difference))
        self.weight.index_add_(0, position, difference.to(self.weight.dtype))
        self.inverse_norms[position] = inverse_norm(self.weight[position])
