"""The teacher's embeddings of every image, plain and mirrored, in a file: after one epoch the teacher is free.

Training shows the teacher each image plain or mirrored and nothing else, so two embeddings an image replace it. A cache
is two files: FILE, a memory map of fp16 numbers (images, 2, D), and FILE.json, which says whose embeddings these are.
They are unit vectors, rounded to fp16: within 2.5e-4 of the teacher's own.

A row that is there is whole. The numbers are kept with all bits inverted, so that the zeros of a new file read as NaN,
and a row that a killed process left half-written still has NaN in it and counts as missing. The space is reserved
when the file is made: a full disk shows then, not in the middle of a run.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from arcface_kd.atomic import atomic_write
from arcface_kd.errors import TeacherError

_FORMAT = 1


def identity_of(teacher_fingerprint: str, data_fingerprint: str, images: int, embedding_size: int) -> dict[str, object]:
    """What makes two caches exchangeable.

    Args:
        teacher_fingerprint: over weights, preprocessing and precision.
        data_fingerprint: over the images and their order.
        images: number of them.
        embedding_size: dimension D.

    Returns:
        What the header of such a cache must say.
    """
    return {
        "format": _FORMAT,
        "teacher": teacher_fingerprint,
        "data": data_fingerprint,
        "images": images,
        "embedding_size": embedding_size,
    }


class EmbeddingCache:
    """Rows of one teacher over one data set, shared by all processes of a machine that open the same file.

    Several ranks may write at once: two that find the same row missing write the same numbers.

    Args:
        path: the file; its header stands beside it as ``path.json``.
        identity: from :func:`identity_of`.

    Raises:
        TeacherError: the files belong to another teacher or other data (the message says in what they differ), or are
            damaged.
        OSError: the folder is missing, read-only or too full.
    """

    def __init__(self, path: str | os.PathLike[str], identity: Mapping[str, object]) -> None:
        self.path = Path(path)
        self.identity = dict(identity)
        self.images = int(str(identity["images"]))
        self.embedding_size = int(str(identity["embedding_size"]))
        header = self.path.with_name(self.path.name + ".json")
        if header.exists():
            self._check(header)
        else:
            self._create(header)
        count = 2 * self.images * self.embedding_size
        self._rows = torch.from_file(str(self.path), shared=True, size=count, dtype=torch.int16)
        self._rows = self._rows.view(2 * self.images, self.embedding_size)

    @property
    def _bytes(self) -> int:
        return 4 * self.images * self.embedding_size

    def _check(self, header: Path) -> None:
        try:
            found = json.loads(header.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise TeacherError(
                f"{header} is no cache header ({error}); delete it and {self.path} to start anew"
            ) from None
        if not isinstance(found, dict):
            raise TeacherError(f"{header} is no cache header; delete it and {self.path} to start anew")
        differing = [name for name in self.identity if found.get(name) != self.identity[name]]
        if differing:
            name = differing[0]
            raise TeacherError(
                f"the cache {self.path} was made for another {name} ({str(found.get(name))[:16]}, this run has "
                f"{str(self.identity[name])[:16]}): give another kd_cache, or delete it and {header.name}"
            )
        size = self.path.stat().st_size if self.path.is_file() else 0
        if size != self._bytes:
            raise TeacherError(
                f"the cache {self.path} has {size} bytes and should have {self._bytes}: delete it and {header.name}"
            )

    def _create(self, header: Path) -> None:
        if self.path.exists():
            raise TeacherError(
                f"{self.path} exists without its header {header.name}: give another kd_cache, or delete it"
            )
        with atomic_write(self.path) as stream:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(stream.fileno(), 0, self._bytes)
            else:
                stream.truncate(self._bytes)
        with atomic_write(header) as stream:
            stream.write((json.dumps(self.identity, indent=2) + "\n").encode())

    def look_up(self, index: Tensor, flipped: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of some views.

        Args:
            index: (B,) int64 positions in the data set.
            flipped: (B,) bool.

        Returns:
            ``(embeddings, known)``: (B, D) fp32 unit vectors on the CPU, NaN where the row is missing, and (B,) bool.
        """
        rows = self._rows[2 * index.cpu() + flipped.cpu()].bitwise_not_().view(torch.float16).float()
        return rows, ~rows.isnan().any(1)

    def store(self, index: Tensor, flipped: Tensor, embeddings: Tensor) -> None:
        """Keep the teacher's embeddings of some views.

        Args:
            index: (B,) int64 positions in the data set.
            flipped: (B,) bool.
            embeddings: (B, D), any norm.

        Raises:
            TeacherError: an embedding is zero, NaN or inf.
        """
        unit = normalize(embeddings.detach().float()).to("cpu", torch.float16)
        bad = ~unit.isfinite().all(1) | (unit == 0).all(1)
        if bad.any():
            where = index.cpu()[bad][:5].tolist()
            raise TeacherError(f"the teacher's embeddings of images {where} are zero, NaN or inf: look at these images")
        self._rows[2 * index.cpu() + flipped.cpu()] = unit.view(torch.int16).bitwise_not()

    def filled(self) -> int:
        """Rows that are there, of 2 x images; reads the whole file."""
        blocks = self._rows.split(max(1, (1 << 24) // self.embedding_size))
        return sum(int((~block.bitwise_not().view(torch.float16).isnan().any(1)).sum()) for block in blocks)
