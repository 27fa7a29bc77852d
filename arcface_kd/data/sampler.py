"""Which images each rank sees in which order, which of them mirrored, and by which random numbers."""

from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Sampler

from arcface_kd.data.dataset import View
from arcface_kd.errors import ConfigError

_WORD = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_VIEWS_AT_ONCE = 1 << 14


def _mix(words: NDArray[Any]) -> NDArray[Any]:
    """The splitmix64 step (Steele, Lea, Flood 2014): uint64 to well-mixed uint64, one to one."""
    words = words + np.uint64(_GAMMA)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def uniforms(seeds: NDArray[np.uint64], count: int) -> NDArray[Any]:
    """The first numbers of each seed's splitmix64: float64 (N, count) in [0, 1), of uint64 (N,)."""
    # The states go once around 64 bits, as they are meant to.
    states = seeds[:, None] + np.arange(count, dtype=np.uint64) * np.uint64(_GAMMA)
    return (_mix(states) >> np.uint64(11)) * 2.0**-53


def _words(indices: NDArray[np.int64], seed: int, epoch: int) -> NDArray[Any]:
    stream = _mix(np.array([seed & _WORD], dtype=np.uint64))
    stream = _mix(stream ^ np.array([epoch & _WORD], dtype=np.uint64))
    return _mix(_mix(indices.astype(np.uint64)) ^ stream)


def flips(indices: NDArray[np.int64], *, seed: int, epoch: int) -> NDArray[Any]:
    """Decide which records are mirrored in an epoch, each with probability one half.

    The answer depends on nothing but seed, epoch and index: not on ranks, workers, batches or what was drawn before.
    """
    return cast("NDArray[Any]", _words(indices, seed, epoch) >> np.uint64(63) == 1)


def view_seeds(indices: NDArray[np.int64], *, seed: int, epoch: int) -> NDArray[Any]:
    """The seeds of what else is drawn for the records of an epoch, uint64 (N,); they depend on what `flips` does."""
    return _mix(_words(indices, seed, epoch))


class ViewSampler(Sampler[View]):
    """The views of an epoch for one rank, in the order of the host's ``DistributedSampler``.

    ``torch.randperm`` under ``epoch + seed``, padded from its start to a multiple of the ranks, every
    ``world_size``-th from ``rank`` on. ``set_epoch`` determines order, flips and seeds completely, so a resumed run
    sees what an uninterrupted one would have seen.

    Args:
        size: number of records.
        rank: this rank, 0 .. ``world_size - 1``.
        world_size: number of ranks.
        seed: the run's seed, the same on every rank.
        shuffle: whether to permute; False gives 0, 1, 2, ...
        flip: whether to mirror half of the records.

    Raises:
        ConfigError: an impossible rank, or no records.
    """

    def __init__(
        self, size: int, *, rank: int = 0, world_size: int = 1, seed: int = 0, shuffle: bool = True, flip: bool = True
    ) -> None:
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank {rank} of {world_size} ranks; wanted 0 .. {world_size - 1}")
        if size < 1:
            raise ConfigError(f"nothing to sample from: {size} records")
        self.size = size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.shuffle = shuffle
        self.flip = flip
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration goes through."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.size // self.world_size)

    def __iter__(self) -> Iterator[View]:
        return self._views(self.epoch)

    def _views(self, epoch: int) -> Iterator[View]:
        if self.shuffle:
            order = torch.randperm(self.size, generator=torch.Generator().manual_seed(epoch + self.seed)).numpy()
        else:
            order = np.arange(self.size)
        mine = np.resize(order, len(self) * self.world_size)[self.rank :: self.world_size]
        for start in range(0, len(mine), _VIEWS_AT_ONCE):
            indices = mine[start : start + _VIEWS_AT_ONCE]
            flipped = flips(indices, seed=self.seed, epoch=epoch) if self.flip else np.zeros(len(indices), dtype=bool)
            seeds = view_seeds(indices, seed=self.seed, epoch=epoch)
            yield from map(View, indices.tolist(), flipped.tolist(), seeds.tolist())
