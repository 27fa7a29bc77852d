"""``arcface-kd cache merge``: one cache of several teachers' caches over the same images, in the same order."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from arcface_kd.config.kd import How
from arcface_kd.errors import TeacherError
from arcface_kd.system.files import atomic_write
from arcface_kd.teachers.cache.embedding_cache import EmbeddingCache, header_of, readable_size
from arcface_kd.teachers.cache.principal_components import StreamingPCA
from arcface_kd.teachers.merged import PRECISION, SHOWN, Merge, axes_file

# Entries that may differ between merged caches; the others tell which images are shown, and how.
_OF_THE_TEACHER = ("teacher", "preprocessing", "precision", "precisions", "embedding_size", "merged")
_IMAGES_AT_ONCE = 4096


@dataclass(frozen=True)
class MergeReport:
    """Result of a merge; ``kept`` is the share of the squared norms that the axes of ``pca`` hold."""

    cache: EmbeddingCache
    how: How
    missing: int
    kept: float

    def __str__(self) -> str:
        size, images = readable_size(self.cache.size), self.cache.images
        how = f"{self.how} (keeping {100 * self.kept:.1f} %)" if self.how == "pca" else self.how
        missing = f"; {self.missing} of {2 * images} rows are missing" if self.missing else ""
        return f"{self.cache.path}: {size}, {images} images, {self.cache.embedding_size} numbers by {how}{missing}"


def merge_caches(paths: Sequence[str | os.PathLike[str]], how: How, out: str | os.PathLike[str]) -> MergeReport:
    """Write the cache of the teacher that several teachers make together.

    Args:
        paths: their caches.
        how: see :class:`arcface_kd.teachers.merged.Merge`; ``pca`` has as many axes as the largest teacher dimensions.
        out: the new cache.

    Returns:
        The report.

    Raises:
        TeacherError: a cache is missing or damaged, of other images, another order or other views than the first, of
            a teacher that is there already, or empty; a mean of unequal dimensions; no room.
    """
    headers = [header_of(path) for path in paths]
    for path, header in zip(paths, headers, strict=True):
        for name in (headers[0].keys() | header.keys()) - set(_OF_THE_TEACHER):
            if header.get(name) != headers[0].get(name):
                raise TeacherError(
                    f"the caches {paths[0]} and {path} cannot be merged: they are of other images, in "
                    f"another order or in other views ({name}: {headers[0].get(name)!r} and {header.get(name)!r})"
                )
    prints = [str(header.get("teacher")) for header in headers]
    sizes = [int(header["embedding_size"]) for header in headers]
    Merge(how).check(prints, sizes)
    caches = [EmbeddingCache(path, header, create=False) for path, header in zip(paths, headers, strict=True)]
    merge, kept = Merge(how), 1.0
    if how == "pca":
        merge, kept = _with_axes(caches, max(sizes))
    target = Path(out).expanduser()
    identity = {
        **headers[0],
        "teacher": merge.fingerprint(prints),
        "preprocessing": vars(SHOWN),
        "precision": PRECISION,
        "precisions": [header.get("precision") for header in headers],
        "embedding_size": len(merge.axes) if merge.axes is not None else sizes[0] if how == "mean" else sum(sizes),
        "merged": {"how": how, "teachers": prints},
    }
    merged = EmbeddingCache(target, identity)
    if merge.axes is not None:
        with atomic_write(axes_file(target)) as stream:
            stream.write(save({"axes": merge.axes}))
    missing = 0
    for index, flipped, parts, known in _rows(caches):
        merged.store(index[known], flipped[known], merge([part[known] for part in parts]))
        missing += int((~known).sum())
    return MergeReport(merged, how, missing, kept)


def _with_axes(caches: Sequence[EmbeddingCache], count: int) -> tuple[Merge, float]:
    side_by_side = Merge("concat")
    pca = StreamingPCA(sum(cache.embedding_size for cache in caches))
    for _, _, parts, known in _rows(caches):
        pca.add(side_by_side([part[known] for part in parts]))
    try:
        found = pca.finish(centered=False)
    except ValueError as error:
        raise TeacherError(f"the caches have no rows in common: {error}") from error
    return Merge("pca", found.axes[:count].float()), float(found.variances[:count].sum() / found.variances.sum())


def _rows(caches: Sequence[EmbeddingCache]) -> Iterator[tuple[Tensor, Tensor, list[Tensor], Tensor]]:
    """Block by block: index and side of views, each teacher's unit vectors, and which views all caches have."""
    images = caches[0].images
    for start in tqdm(range(0, images, _IMAGES_AT_ONCE), desc="merging", disable=None, leave=False):
        index = torch.arange(start, min(images, start + _IMAGES_AT_ONCE)).repeat_interleave(2)
        flipped = torch.arange(len(index)) % 2 == 1
        looked = [cache.look_up(index, flipped) for cache in caches]
        yield index, flipped, [rows for rows, _ in looked], torch.stack([known for _, known in looked]).all(0)
