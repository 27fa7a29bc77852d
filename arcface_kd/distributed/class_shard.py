"""Which classes a rank holds, and where a label stands among them."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class ShardPositions(NamedTuple):
    """Where a batch's labels are in a range of classes."""

    position: Tensor  # (B,) int64 in [0, size); of no meaning where the label is not in the range
    owned: Tensor  # (B,) bool, whether it is


def positions_in_shard(labels: Tensor, start: int, size: int) -> ShardPositions:
    """Positions of labels (B,) in the range of classes [start, start + size); negative ones are nobody's.

    In an empty range nothing is owned, and positions are -1.
    """
    shifted = labels - start if start else labels
    position = shifted.clamp(0, size - 1)
    owned = position == shifted
    return ShardPositions(position, owned if size else torch.zeros_like(owned))


@dataclass(frozen=True)
class ClassShard:
    """The contiguous range of classes that one rank holds.

    Attributes:
        num_classes: classes of the whole data set, at least 0.
        rank: this rank, in [0, world_size).
        world_size: number of ranks, at least 1.
    """

    num_classes: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.num_classes < 0:
            raise ValueError(f"num_classes is {self.num_classes}; it must be at least 0")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank is {self.rank}; it must be in [0, {self.world_size})")

    @property
    def size(self) -> int:
        """Classes on this rank."""
        return self.num_classes // self.world_size + int(self.rank < self.num_classes % self.world_size)

    @property
    def start(self) -> int:
        """The first class of this rank."""
        return self.num_classes // self.world_size * self.rank + min(self.rank, self.num_classes % self.world_size)

    @property
    def range(self) -> list[int]:
        """The first class, the one behind the last, and the number of all, as a state holds them."""
        return [self.start, self.start + self.size, self.num_classes]

    def local(self, labels: Tensor) -> ShardPositions:
        """Positions of labels inside this shard, as :func:`positions_in_shard` gives them."""
        return positions_in_shard(labels, self.start, self.size)
