"""Several teachers as one: their unit embeddings side by side, averaged, or along their principal axes."""

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from arcface_kd.config.kd import How
from arcface_kd.errors import ConfigError, TeacherError
from arcface_kd.teachers.base import Teacher, fingerprint_of, load_teacher, tensors_digest
from arcface_kd.teachers.cache.embedding_cache import header_of
from arcface_kd.teachers.options import Precision, Preprocessing, TeacherOptions
from arcface_kd.teachers.state_dict import read_content

# Each part prepares its images itself.
SHOWN = Preprocessing()
PRECISION: Precision = "fp32"


@dataclass(frozen=True)
class Merge:
    """A way to make one embedding of several.

    Of unit vectors u_1 .. u_n, ``concat`` is [u_1 .. u_n] / sqrt(n), whose cosine is the mean of the teachers' cosines;
    ``mean`` is their mean, of equal dimensions; ``pca`` is the first along ``axes`` about the origin.
    """

    how: How
    axes: Tensor | None = None  # (k, D) of ``pca``, D being the sum of the dimensions

    def __call__(self, parts: Sequence[Tensor]) -> Tensor:
        """Merge unit vectors (B, D_i) into (B, D)."""
        if self.how == "mean":
            return torch.stack(tuple(parts)).mean(0)
        rows = torch.cat(tuple(parts), 1) / math.sqrt(len(parts))
        return rows if self.axes is None else rows @ self.axes.T

    def fingerprint(self, teachers: Sequence[str]) -> str:
        """The merged teacher's fingerprint, by those of its parts."""
        return fingerprint_of(self.digest(teachers), PRECISION, SHOWN)

    def digest(self, teachers: Sequence[str]) -> str:
        """The digest of all that the merged teacher computes with."""
        axes = None if self.axes is None else tensors_digest({"axes": self.axes})
        return hashlib.sha256(json.dumps([self.how, *teachers, axes]).encode()).hexdigest()

    def check(self, teachers: Sequence[str], sizes: Sequence[int]) -> None:
        """Refuse parts that cannot be merged in this way, by their fingerprints and dimensions."""
        if len(teachers) < 2 or len(set(teachers)) < len(teachers):
            raise TeacherError(f"{len(set(teachers))} different teachers of {len(teachers)}: wanted several, each once")
        if self.how == "mean" and len(set(sizes)) > 1:
            raise TeacherError(f"a mean of embeddings of {' and '.join(map(str, sizes))} dimensions: wanted equal ones")
        if self.axes is not None and self.axes.shape[1] != sum(sizes):
            raise TeacherError(f"axes of {self.axes.shape[1]} dimensions for teachers of {sum(sizes)} in all")


def axes_file(cache: Path) -> Path:
    """Where the axes of a cache that was merged by ``pca`` are kept: beside it."""
    return cache.with_name(cache.name + ".axes")


def merge_of(cache: str | os.PathLike[str]) -> tuple[Merge, list[str]]:
    """How a cache was merged, and the fingerprints of the teachers that it was merged of."""
    path = Path(cache).expanduser()
    told = header_of(path).get("merged")
    if not isinstance(told, dict) or told.get("how") not in ("concat", "mean", "pca"):
        raise TeacherError(f"the cache {path} was not made by `arcface-kd cache merge`")
    if told["how"] != "pca":
        return Merge(told["how"]), list(told["teachers"])
    content = read_content(axes_file(path))
    axes = content.get("axes") if isinstance(content, dict) else None
    if not isinstance(axes, Tensor) or axes.dim() != 2 or not torch.isfinite(axes).all():
        raise TeacherError(f"{axes_file(path)} holds no axes: merge the caches again")
    return Merge("pca", axes.float()), list(told["teachers"])


class MergedNetwork(nn.Module):
    """Teachers of the same images, merged."""

    axes: Tensor | None

    def __init__(self, parts: Sequence[Teacher], merge: Merge) -> None:
        super().__init__()
        self.parts, self.merge = nn.ModuleList(parts), merge
        # On the images' device: a copy in each step would wait for it.
        self.register_buffer("axes", merge.axes, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) images in [-1, 1] to (B, D)."""
        return replace(self.merge, axes=self.axes)([normalize(part(images)) for part in self.parts])


class MergedTeacher(Teacher):
    """Several teachers as one, see :func:`merge_teachers`."""

    @property
    def _parts(self) -> list[Teacher]:
        return cast("list[Teacher]", [*cast(MergedNetwork, self.network).parts])

    @property
    def precisions(self) -> list[Precision]:
        """Those of its parts."""
        return [part.precision for part in self._parts]

    @property
    def fingerprint_in_fp32(self) -> str:
        """The fingerprint that it would have with all its parts in fp32."""
        merge = cast(MergedNetwork, self.network).merge
        return merge.fingerprint([part.fingerprint_in_fp32 for part in self._parts])


def merge_teachers(
    sources: Sequence[object],
    options: TeacherOptions | Mapping[str, object] | None = None,
    *,
    device: torch.device | str | None = None,
) -> Teacher:
    """Load several teachers as one.

    Args:
        sources: as :func:`arcface_kd.teachers.base.load_teacher` takes them.
        options: of all teachers; ``2.channels`` is one of the second alone. ``merge`` is ``concat`` (default), ``mean``
            or the file of a cache that ``arcface-kd cache merge`` has made of these teachers.
        device: where they compute.

    Raises:
        TeacherError: one cannot be loaded or is given twice, the cache is of others, or a mean of unequal dimensions.
        ConfigError: an option is unknown, out of range or without meaning for a source.
    """
    if len(sources) == 1:
        return load_teacher(sources[0], options, device=device)
    if isinstance(options, TeacherOptions):
        options = {name: value for name, value in vars(options).items() if value is not None}
    shared = {name: value for name, value in (options or {}).items() if "." not in name}
    how = str(shared.pop("merge", "concat"))
    size = shared.pop("embedding_size", None)
    numbers = [str(place) for place in range(1, len(sources) + 1)]
    if foreign := [name for name in options or {} if "." in name and name.partition(".")[0] not in numbers]:
        raise ConfigError(f"option teacher.{foreign[0]} is of none of the teachers, which are {' and '.join(numbers)}")
    parts = []
    for place, source in enumerate(sources, start=1):
        own = {name.partition(".")[2]: value for name, value in (options or {}).items() if name.startswith(f"{place}.")}
        parts.append(load_teacher(source, {**shared, **own}, device=device))
    prints = [part.fingerprint for part in parts]
    merge, wanted = (Merge(how), prints) if how in ("concat", "mean") else merge_of(how)  # type: ignore[arg-type]
    if wanted != prints:
        raise TeacherError(f"the cache {how} was merged of other teachers, or with other options, or in another order")
    merge.check(prints, [part.embedding_size for part in parts])
    counts = [part.parameter_count for part in parts]
    return MergedTeacher(
        MergedNetwork(parts, merge),
        preprocessing=SHOWN,
        description=f"{merge.how} of {' and '.join(part.description for part in parts)}",
        weights=merge.digest(prints),
        embedding_size=None if size is None else str(size),
        parameter_count=None if None in counts else sum(count or 0 for count in counts),
    )
