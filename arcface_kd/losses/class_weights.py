"""One rank's classes as the losses take them: class centers, sample, ranks and number format in one object."""

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from arcface_kd.distributed.class_shard import positions_in_shard
from arcface_kd.distributed.ranks import RankGroup


@dataclass(frozen=True, eq=False)
class ClassWeights:
    """This rank's shard of a classifier, learned or frozen, in one step.

    Attributes:
        centers: (C, D) class centers of this shard, any norm.
        inverse_norms: (C,) one over each center's norm, where the caller keeps it; None finds it in every pass.
        start: the first class of this shard.
        index: (K,) int64, sorted positions in the shard of the classes that take part (PartialFC's sample), or None for
            all. Targets take part always.
        ranks: the ranks that share the classes.
        product_dtype: number format of the matrix products' factors (``torch.bfloat16``, ``torch.float16``); sums and
            exponentials stay in fp32. None means the format of the sums.
    """

    centers: Tensor
    inverse_norms: Tensor | None = None
    start: int = 0
    index: Tensor | None = None
    ranks: RankGroup = field(default_factory=lambda: RankGroup(alone=True))
    product_dtype: torch.dtype | None = None

    @property
    def visited(self) -> int:
        """Number of classes that take part."""
        return self.centers.shape[0] if self.index is None else self.index.shape[0]

    def tensors(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What a backward pass must save of it, see :meth:`with_tensors`."""
        return self.centers, self.inverse_norms, self.index

    def with_tensors(self, centers: Tensor, inverse_norms: Tensor | None, index: Tensor | None) -> "ClassWeights":
        """The same with tensors that a backward pass has saved."""
        return replace(self, centers=centers, inverse_norms=inverse_norms, index=index)


class VisitedClasses(NamedTuple):
    """This rank's classes as a pass over them sees them: the centers, the sampled rows and where the targets stand.

    Attributes:
        centers: (C, D) class centers of this shard, not normalised.
        inverse_norms: (C,) one over each center's norm, or None to find it on the way.
        sampled: (K,) sorted positions of the sampled classes, or None for all.
        position: (B,) the target's position among the classes that the pass visits; -1 where it is not here.
        target: (B,) the target's position in ``centers``; 0 where it is not here.
        owned: (B,) bool, whether the target is on this rank.
    """

    centers: Tensor
    inverse_norms: Tensor | None
    sampled: Tensor | None
    position: Tensor
    target: Tensor
    owned: Tensor

    @property
    def visited(self) -> int:
        """Number of classes that a pass visits."""
        return self.centers.shape[0] if self.sampled is None else self.sampled.shape[0]


def inverse_norm(rows: Tensor) -> Tensor:
    """One over the L2 norm of each row of a (..., D) tensor; finite for rows of zeros."""
    return rows.norm(dim=-1).clamp_min(1e-12).reciprocal()


def visited_classes(weights: ClassWeights, labels: Tensor) -> VisitedClasses:
    """Find where a batch's targets stand among the classes that a pass over this shard visits.

    Args:
        weights: this rank's classes.
        labels: (B,) int64 labels over all classes, negative ones for none.
    """
    centers, inverse_norms, index = weights.tensors()
    target, owned = positions_in_shard(labels, weights.start, centers.shape[0])
    if index is None:
        return VisitedClasses(centers, inverse_norms, None, torch.where(owned, target, -1), target, owned)
    index = index.contiguous()
    place = torch.searchsorted(index, target).clamp_max(max(index.shape[0] - 1, 0))
    if index.shape[0] == 0:
        return VisitedClasses(centers, inverse_norms, index, torch.full_like(target, -1), target, owned)
    visited = owned & (index[place] == target)
    return VisitedClasses(centers, inverse_norms, index, torch.where(visited, place, -1), target, owned)
