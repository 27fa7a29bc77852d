"""Principal components of a teacher's embeddings, found in one pass over the cache, block by block.

Three sums are kept in fp64: the number of rows, their sum, the sum of their outer products. Ranks read disjoint parts
of the file and add up their sums; the eigenvectors of the covariance are those of scikit-learn's ``PCA``, up to sign. A
block takes 26 bytes a number beside the sums: 0.12 GB at 512 dimensions, for any number of rows.

The components are kept beside the cache (FILE.pca.npz) with its header, for the next run over the same cache.
"""

import json
import logging
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from arcface_kd.distributed.ranks import RankGroup
from arcface_kd.errors import TeacherError
from arcface_kd.system.files import atomic_write
from arcface_kd.teachers.cache.embedding_cache import EmbeddingCache

logger = logging.getLogger(__name__)

_FORMAT = 1
# Axes along which the data does not vary, but for rounding: fp16 rows leave about 1e-7 of the variance there.
_NO_VARIANCE = 1e-6


@dataclass(frozen=True)
class PrincipalComponents:
    """The axes of some data, by falling variance."""

    mean: Tensor  # (D,) fp64
    axes: Tensor  # (D, D) fp64, one unit vector a row; its largest entry by magnitude is positive
    variances: Tensor  # (D,) fp64, not negative, of the data along the axes
    count: int  # rows of the data

    @property
    def rank(self) -> int:
        """Axes along which the data varies."""
        return int((self.variances > _NO_VARIANCE * self.variances.sum()).sum())

    def axes_for(self, share: float) -> int:
        """The smallest number of axes that hold more than a share of the variance, as scikit-learn counts."""
        cumulated = (self.variances / self.variances.sum()).cumsum(0)
        wanted = int(torch.searchsorted(cumulated, torch.tensor(share, dtype=cumulated.dtype), right=True)) + 1
        return max(1, min(wanted, self.rank))


class StreamingPCA:
    """Principal components of rows that come block by block."""

    def __init__(self, dimension: int) -> None:
        self.dimension = dimension
        # One tensor, so that one reduction adds up the ranks: D + 1 rows of products, the last one the sums, and the
        # number of rows in the corner.
        self._sums = torch.zeros(dimension + 1, dimension + 1, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Take in a block (B, D) of finite rows."""
        wide = rows.to(torch.float64)
        size = self.dimension
        self._sums[:size, :size].addmm_(wide.T, wide)
        self._sums[size, :size].add_(wide.sum(0))
        self._sums[size, size] += len(wide)

    def finish(self, ranks: RankGroup | None = None, *, centered: bool = True) -> PrincipalComponents:
        """The components of all blocks of all ranks, the same to the last bit on each; all ranks call.

        ``centered=False`` takes the variance about the origin: the axes that keep most of the rows' inner products.
        """
        ranks = ranks or RankGroup(alone=True)
        sums = ranks.sum_on_hosts(self._sums)
        count, size = int(sums[-1, -1]), self.dimension
        if count < 2:
            raise ValueError(f"principal components of {count} rows: at least two are needed")
        found = None
        # Found on one rank: another processor's eigenvectors may differ in the last bits, or in sign.
        if ranks.rank == 0:
            mean = sums[size, :size] / count * centered
            covariance = (sums[:size, :size] - count * torch.outer(mean, mean)) / (count - 1)
            variances, vectors = torch.linalg.eigh(covariance)
            axes = vectors.T.flip(0)
            largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
            found = PrincipalComponents(mean, axes * largest.sign(), variances.flip(0).clamp_min(0), count)
        shared = _from_first_rank(found, size, ranks)
        assert shared is not None
        return shared


def _from_first_rank(found: PrincipalComponents | None, size: int, ranks: RankGroup) -> PrincipalComponents | None:
    """What rank 0 has found, on all ranks."""
    packed = torch.zeros(size + 2, size + 1, dtype=torch.float64)
    if found is not None:
        packed[:size, :size], packed[size, :size], packed[size + 1, :size] = found.axes, found.variances, found.mean
        packed[-1, -1] = found.count
    packed = ranks.sum_on_hosts(packed)
    axes, count = packed[:size, :size].contiguous(), int(packed[-1, -1])
    return PrincipalComponents(packed[size + 1, :size], axes, packed[size, :size], count) if count else None


def components_file(cache: EmbeddingCache) -> Path:
    """Where the principal components of a cache are kept: beside it."""
    return cache.path.with_name(cache.path.name + ".pca.npz")


def components_of_cache(cache: EmbeddingCache, ranks: RankGroup | None = None) -> PrincipalComponents:
    """Principal components of a teacher's embeddings of all images, plain and mirrored.

    Read from the file beside the full cache where it fits, else found and written there, if it can be written.
    """
    ranks = ranks or RankGroup()
    path = components_file(cache)
    # Ranks on other machines may not see the file.
    kept = _read(path, cache) if ranks.rank == 0 else None
    components = _from_first_rank(kept, cache.embedding_size, ranks)
    if components is None:
        components = _found(cache, ranks)
        if ranks.rank == 0:
            _write(path, cache, components)
    return components


def _found(cache: EmbeddingCache, ranks: RankGroup) -> PrincipalComponents:
    pca, missing = StreamingPCA(cache.embedding_size), torch.zeros((), dtype=torch.float64)
    start, stop = (cache.images * part // ranks.world_size for part in (ranks.rank, ranks.rank + 1))
    for rows, known in cache.blocks(start, stop):
        missing += (~known).sum()
        pca.add(rows[known])
    missing = ranks.sum_on_hosts(missing)
    if missing > 0:
        raise TeacherError(
            f"the cache {cache.path} lacks {int(missing)} of {2 * cache.images} embeddings: {cache.fill_hint}"
        )
    return pca.finish(ranks)


def _identity(cache: EmbeddingCache) -> str:
    return json.dumps({"components": _FORMAT, "cache": cache.identity}, sort_keys=True)


def _read(path: Path, cache: EmbeddingCache) -> PrincipalComponents | None:
    """What is kept, None where there is nothing or it is another cache's."""
    if not path.is_file():
        return None
    size = cache.embedding_size
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > 16 * (size + 2) ** 2 + (1 << 20):
                raise ValueError("it is larger than it should be")
        with np.load(path, allow_pickle=False) as content:
            if str(content["identity"]) != _identity(cache):
                logger.info("%s belongs to another cache: it is made anew", path)
                return None
            mean, axes, variances = (torch.from_numpy(content[name]) for name in ("mean", "axes", "variances"))
            count = int(content["count"])
        shapes = [tuple(mean.shape), tuple(axes.shape), tuple(variances.shape)]
        if shapes != [(size,), (size, size), (size,)] or count < 2:
            raise ValueError(f"shapes {shapes} of {count} rows")
        if not all(bool(part.isfinite().all()) for part in (mean, axes, variances)):
            raise ValueError("NaN or inf")
    # zipfile raises struct.error, NotImplementedError and more besides BadZipFile, numpy what its header asks for.
    except Exception as error:
        logger.warning("%s is damaged (%s): it is made anew", path, " ".join(str(error).split()))
        return None
    return PrincipalComponents(mean.double(), axes.double(), variances.double(), count)


def _write(path: Path, cache: EmbeddingCache, components: PrincipalComponents) -> None:
    try:
        with atomic_write(path) as stream:
            np.savez(
                stream,
                identity=np.array(_identity(cache)),
                count=np.array(components.count),
                mean=components.mean.numpy(),
                axes=components.axes.numpy(),
                variances=components.variances.numpy(),
            )
    except OSError as error:
        logger.warning("%s cannot be written (%s): the next run reads the cache again", path, error.strerror or error)
