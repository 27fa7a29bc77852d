"""Class centers that no optimiser moves, split over ranks: a teacher's, and those distilled from its embeddings.

No gradient is computed for them and nothing is all-reduced. Every rank sees the gathered batch and updates the classes
that it holds, so the ranks never disagree.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from arcface_kd.distributed.class_shard import ClassShard, ShardPositions
from arcface_kd.losses.class_chunks import unit_rows
from arcface_kd.losses.class_weights import inverse_norm
from arcface_kd.losses.fused import fused

Repeated = Literal["mean", "last"]

# Classes are drawn in blocks, each from a generator of its own, so that a class starts with the same numbers on
# whichever rank and however many ranks there are.
_BLOCK = 4096


def initial_centers(shard: ClassShard, embedding_size: int, seed: int) -> Tensor:
    """Normally distributed class centers that depend on the seed and the class, not on the number of ranks.

    (shard.size, D) fp32 on the CPU; a deviation of 0.01 is what arcface_torch and AdaDistill's code use.
    """
    centers = torch.empty(shard.size, embedding_size)
    for block in range(shard.start // _BLOCK, -(-(shard.start + shard.size) // _BLOCK)):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + block)
        rows = torch.empty(_BLOCK, embedding_size).normal_(0, 0.01, generator=generator)
        place = block * _BLOCK - shard.start
        first, last = max(-place, 0), min(shard.size - place, _BLOCK)
        centers[place + first : place + last] = rows[first:last]
    return centers


def repetition_weights(
    positions: ShardPositions, size: int, repeated: Repeated, dtype: torch.dtype = torch.float32
) -> Tensor:
    """How much each row of a batch counts in the update of its class, (B,).

    ``mean`` gives each of n rows of one class 1 / n, whatever their order; ``last`` gives the last row 1 and the others
    0, as the published code leaves it. For rows of other shards the weights mean nothing.
    """
    # By class and not by a comparison of all pairs, which takes more memory than the head for the thousands of rows of
    # many ranks.
    position, owned = positions
    if repeated == "mean":
        count = torch.zeros(size, dtype=dtype, device=position.device)
        return count.index_add_(0, position, owned.to(dtype))[position].reciprocal()
    row = torch.arange(len(position), device=position.device)
    last = torch.full((size,), -1, device=position.device)
    last.scatter_reduce_(0, position, torch.where(owned, row, -1), "amax")
    return (last[position] == row).to(dtype)


class FrozenCenters(nn.Module):
    """This rank's share of class centers that no optimiser moves, with what follows from them.

    The buffers ``weight`` (shard.size, D), fp32 and of any norm, ``inverse_norms`` (shard.size,), one over the norms,
    and ``units``, the normalised centers in ``product_dtype`` where that is a narrow format, else None. The latter two
    follow from ``weight`` whenever it is loaded, moved to a device or cast; they are not saved, and ``weight`` only if
    ``saved``.
    """

    weight: Tensor
    inverse_norms: Tensor
    units: Tensor | None

    def __init__(
        self, weight: Tensor, shard: ClassShard, product_dtype: torch.dtype | None = None, *, saved: bool = False
    ) -> None:
        super().__init__()
        self.shard = shard
        self._product_dtype = None if product_dtype == weight.dtype else product_dtype
        self.register_buffer("weight", weight, persistent=saved)
        self.register_buffer("inverse_norms", inverse_norm(weight), persistent=False)
        self.register_buffer("units", None, persistent=False)
        self.refresh()
        self.register_load_state_dict_post_hook(lambda module, _: module.refresh())  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def refresh(self) -> None:
        """Find norms and unit centers again after ``weight`` was written from outside."""
        self.inverse_norms = inverse_norm(self.weight)
        if self._product_dtype is not None:
            self.units = unit_rows(self.weight, self.inverse_norms.unsqueeze(1), self._product_dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FrozenCenters":
        # A cast of the module would cast the narrow copy along.
        self.units = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.refresh()
        return self

    @torch.no_grad()
    def cosine(self, labels: Tensor, unit: Tensor, *, positions: ShardPositions | None = None) -> Tensor:
        """Cosines (B,) of unit rows and their own class centers, 0 for classes of other ranks."""
        position, owned = positions or self.shard.local(labels)
        return _own_cosine(self.weight, self.inverse_norms, position, owned, unit)

    @torch.no_grad()
    def unit_rows(self, labels: Tensor, *, positions: ShardPositions | None = None) -> Tensor:
        """The normalised class centers (B, D) of a batch; rows of other ranks' classes mean nothing."""
        position, _ = positions or self.shard.local(labels)
        return self.weight[position] * self.inverse_norms[position].unsqueeze(1)


@fused()
def _own_cosine(weight: Tensor, inverse_norms: Tensor, position: Tensor, owned: Tensor, unit: Tensor) -> Tensor:
    cosine = (weight[position] * unit).sum(1) * inverse_norms[position]
    return torch.where(owned, cosine, torch.zeros_like(cosine))


class DistilledCenters(FrozenCenters):
    """Class centers with the exponential moving average that distils into them; they are part of the state.

    An average of unit vectors is shorter than 1.

    Args:
        shard: the classes of this rank.
        embedding_size: dimension D of the teacher's embeddings.
        seed: of the run.
        product_dtype: number format of the head's matrix products, None for fp32.
    """

    def __init__(
        self, shard: ClassShard, embedding_size: int, seed: int = 0, product_dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(initial_centers(shard, embedding_size, seed), shard, product_dtype, saved=True)

    @torch.no_grad()
    def update(
        self,
        labels: Tensor,
        teacher: Tensor,
        alpha: Tensor,
        repeated: Repeated = "mean",
        *,
        positions: ShardPositions | None = None,
    ) -> None:
        r"""Move the centers of this rank's classes: ``w_y <- a w_y + (1 - a) f_t`` (AdaDistill, eq. 5).

        A class that occurs n times in the batch has its n updates combined after ``repeated``. The step is written as
        an added difference, so that neither a sort nor a search for distinct labels makes the device wait.

        Args:
            labels: (B,) labels of the gathered batch; negative ones and other ranks' classes are passed over, and rows
                whose embeddings are not finite.
            teacher: (B, D) normalised teacher embeddings.
            alpha: (B,) in [0, 1], how much of the old center stays.
            repeated: ``mean`` or ``last``.
            positions: of the labels in the shard, where the caller has found them.
        """
        positions = positions or self.shard.local(labels)
        position, owned = positions
        if self.weight.shape[0] == 0:
            return
        share = repetition_weights(positions, len(self.weight), repeated, teacher.dtype)
        self.weight.index_add_(0, position, _differences(self.weight, teacher, position, owned, share, alpha))
        inverse, units = _normalised(self.weight, position, self._product_dtype)
        self.inverse_norms[position] = inverse
        if self.units is not None and units is not None:
            self.units[position] = units


@fused()
def _differences(
    weight: Tensor, teacher: Tensor, position: Tensor, owned: Tensor, share: Tensor, alpha: Tensor
) -> Tensor:
    difference = (teacher - weight[position]) * (share * (1 - alpha)).unsqueeze(1)
    # Other ranks' rows add zero. A row that fp16 has overflown is passed over: the step that it spoils can be skipped,
    # a center that it spoils would be lost for good.
    kept = owned & difference.isfinite().all(1)
    return torch.where(kept.unsqueeze(1), difference, torch.zeros_like(difference)).to(weight.dtype)


@fused()
def _normalised(weight: Tensor, position: Tensor, product_dtype: torch.dtype | None) -> tuple[Tensor, Tensor | None]:
    """One over the norms of some rows, and the unit rows in a narrow format if there is one."""
    rows = weight[position]
    inverse = inverse_norm(rows)
    return inverse, None if product_dtype is None else (rows * inverse.unsqueeze(1)).to(product_dtype)
