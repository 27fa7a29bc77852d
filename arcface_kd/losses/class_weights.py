"""One rank's classes as the losses take them: class centers, sample, ranks and number format in one object."""

from dataclasses import dataclass, field, replace
from typing import NamedTuple, cast

import torch
from torch import Tensor

from arcface_kd.distributed.class_shard import ClassShard, ShardPositions, positions_in_shard
from arcface_kd.distributed.ranks import RankGroup
from arcface_kd.losses.fused import fused


@dataclass(frozen=True, eq=False)
class ClassWeights:
    """This rank's shard of a classifier, learned or frozen, in one step."""

    centers: Tensor  # (C, D) class centers of this shard, any norm
    # (C,) one over each center's norm, where the caller keeps it; None finds it in every pass.
    inverse_norms: Tensor | None = None
    start: int = 0  # the first class of this shard
    # (K,) int64, sorted positions in the shard of the classes that take part (PartialFC's sample), or None for all.
    # Targets take part always.
    index: Tensor | None = None
    ranks: RankGroup = field(default_factory=lambda: RankGroup(alone=True))  # the ranks that share the classes
    # Number format of the matrix products' factors (``torch.bfloat16``, ``torch.float16``); results, sums and
    # exponentials stay in fp32. None means the format of the sums.
    product_dtype: torch.dtype | None = None
    # Where the labels of the step's batch are, if the caller has found it for several losses.
    targets: "Targets | None" = None
    # (C, D) the normalised centers in ``product_dtype``, where the caller keeps them; None makes them in every pass.
    units: Tensor | None = None
    # Of the whole data set; None where the caller does not say, and ranks ask each other if they must.
    num_classes: int | None = None

    @property
    def visited(self) -> int:
        """Number of classes that take part."""
        return self.centers.shape[0] if self.index is None else self.index.shape[0]

    def of_each_rank(self) -> list[int] | None:
        """How many classes each rank holds; None where the caller did not say."""
        if self.num_classes is None:
            return None
        world_size = self.ranks.world_size
        return [ClassShard(self.num_classes, rank, world_size).size for rank in range(world_size)]

    def tensors(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What a backward pass must save of it, see :meth:`with_tensors`."""
        return self.centers, self.inverse_norms, self.index

    def with_tensors(self, centers: Tensor, inverse_norms: Tensor | None, index: Tensor | None) -> "ClassWeights":
        """The same with tensors that a backward pass has saved."""
        return replace(self, centers=centers, inverse_norms=inverse_norms, index=index)


class Targets(NamedTuple):
    """Where the targets of a batch's rows stand among a shard's classes."""

    position: Tensor  # (B,) among the classes that take part in the step; -1 where it is none of this shard's
    target: Tensor  # (B,) in the shard; any place where the target is another shard's
    owned: Tensor  # (B,) bool, whether the target is this shard's


@dataclass(frozen=True, eq=False)
class StepClasses:
    """A shard's classes in one step, the same for all losses over them; ``index`` as in :class:`ClassWeights`."""

    index: Tensor | None
    targets: Targets


class VisitedClasses(NamedTuple):
    """:class:`ClassWeights` as a pass sees them: ``index`` is ``sampled``, and :class:`Targets` are unpacked."""

    centers: Tensor
    inverse_norms: Tensor | None
    sampled: Tensor | None
    position: Tensor
    target: Tensor
    owned: Tensor
    units: Tensor | None = None

    @property
    def visited(self) -> int:
        """Number of classes that a pass visits."""
        return self.centers.shape[0] if self.sampled is None else self.sampled.shape[0]

    def chosen(self, part: slice) -> slice | Tensor:
        """Where some of the visited classes stand in the shard."""
        return part if self.sampled is None else self.sampled[part]

    def rows(self, part: slice, dtype: torch.dtype) -> Tensor:
        """Some of the visited class centers (k, D) as they are."""
        return self.centers[self.chosen(part)].to(dtype)

    def inverses(self, part: slice, rows: Tensor) -> Tensor:
        """One over the norms (k, 1) of some of the visited class centers, kept ones where there are any."""
        norms = self.inverse_norms
        kept = inverse_norm(rows) if norms is None else norms[self.chosen(part)].to(rows.dtype)
        return kept.unsqueeze(1)


def format_of_sums(rows: Tensor) -> torch.dtype:
    """The number format that a loss of some rows is computed in: fp64 of fp64, fp32 of all else."""
    return torch.float64 if rows.dtype == torch.float64 else torch.float32


def check_matrices(embeddings: Tensor, centers: Tensor, labels: Tensor, whose: str = "") -> None:
    """Refuse shapes that do not belong together with a ValueError; ``whose`` says which embeddings are meant."""
    if embeddings.ndim != 2 or centers.ndim != 2 or embeddings.shape[1] != centers.shape[1]:
        raise ValueError(
            f"{whose}embeddings {tuple(embeddings.shape)} and class centers {tuple(centers.shape)} must be matrices of "
            "one dimension"
        )
    if labels.shape != embeddings.shape[:1]:
        raise ValueError(
            f"labels {tuple(labels.shape)} must be one a row of {whose}embeddings {tuple(embeddings.shape)}"
        )


@fused()
def inverse_norm(rows: Tensor) -> Tensor:
    """One over the L2 norm of each row of a (..., D) tensor; finite for rows of zeros."""
    return cast(Tensor, rows.norm(dim=-1).clamp_min(1e-12).reciprocal())


def targets_among(positions: ShardPositions, index: Tensor | None) -> Targets:
    """Find where a batch's targets stand among the classes that take part in a step; ``index`` None for all."""
    return Targets(_places_among(*positions, index), *positions)


@fused()
def _places_among(target: Tensor, owned: Tensor, index: Tensor | None) -> Tensor:
    if index is None:
        return torch.where(owned, target, -1)
    if index.shape[0] == 0:
        return torch.full_like(target, -1)
    place = torch.searchsorted(index, target).clamp_max(index.shape[0] - 1)
    return torch.where(owned & (index[place] == target), place, -1)


def visited_classes(weights: ClassWeights, labels: Tensor) -> VisitedClasses:
    """The classes that a pass over a shard visits, and where a batch's targets stand among them."""
    centers, inverse_norms, index = weights.tensors()
    index = None if index is None else index.contiguous()
    targets = weights.targets
    if targets is None:
        targets = targets_among(positions_in_shard(labels, weights.start, centers.shape[0]), index)
    return VisitedClasses(centers, inverse_norms, index, *targets, weights.units)
