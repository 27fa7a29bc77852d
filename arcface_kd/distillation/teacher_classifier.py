"""The teacher's classifier: read from the files of a training run, or made of cached embeddings' class means.

Published packs come without it. Class y of the classifier must be identity y of the records, so both the number of
classes and their order are checked.
"""

import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from arcface_kd.checkpoints.files import checkpoint_file
from arcface_kd.checkpoints.shards import open_shards
from arcface_kd.config.kd import CLASS_MEANS
from arcface_kd.data.dataset import FaceDataset, View
from arcface_kd.distributed.class_shard import ClassShard
from arcface_kd.errors import BadRecordError, CheckpointError, TeacherError
from arcface_kd.teachers.base import Teacher
from arcface_kd.teachers.cache.embedding_cache import EmbeddingCache
from arcface_kd.teachers.checkpoint import find_backbones
from arcface_kd.teachers.state_dict import outlined, read_content, short, state_dicts

logger = logging.getLogger(__name__)


# What a classifier's matrix is called, (C, D) and (D, C).
_NAMES = ("weight", "kernel")
_OF_A_RUN = re.compile(r"checkpoint_gpu_\d+\.pt")
# One file a rank, as arcface_torch left them until 2021: a bare matrix, or a state dict of PartialFC.
_OLDER_SHARDS = ("rank_{}_softmax_weight.pt", "rank:{}_softmax_weight.pt", "softmax_fc_gpu_{}.pt")
_IMAGES_AT_ONCE = 1 << 14
# Of this many records, those of a rank's own classes are looked at, though no more than the second number.
_LABELS_LOOKED_AT, _EMBEDDINGS_LOOKED_AT = 2048, 256
_PARTS = 8
# A trained teacher finds the own class of nearly all its training images; in another order it finds next to none.
_LEAST_AGREEMENT = 0.25


def classifier_of_run(
    source: str, shard: ClassShard, teacher: Teacher | None, cache: EmbeddingCache | None, faces: FaceDataset | None
) -> Tensor:
    """The classifier that ``kd_classifier`` names, checked against the records where there are some."""
    if source == CLASS_MEANS:
        if cache is None or faces is None:
            raise TeacherError(
                f"kd_classifier={CLASS_MEANS} takes the means of cached embeddings: give the teacher and a cache "
                "that `arcface-kd cache` has filled, with --kd-teacher and --kd-cache"
            )
        return class_means(cache, faces, shard)
    classifier = read_classifier(source, shard)
    embedder = cache if teacher is None else teacher
    if embedder is not None and classifier.shape[1] != embedder.embedding_size:
        raise TeacherError(
            f"the teacher's classifier {source} has {classifier.shape[1]} dimensions, the teacher "
            f"{embedder.embedding_size}: it is another teacher's"
        )
    if embedder is None or faces is None:
        what = "teacher" if embedder is None else "records"
        logger.warning("the order of the classes of %s is not checked: the run has no %s of its own", source, what)
        return classifier
    check_order(classifier, shard, faces, lambda index: _embed_records(teacher, cache, faces, index), source)
    return classifier


def _embed_records(teacher: Teacher | None, cache: EmbeddingCache | None, faces: FaceDataset, index: Tensor) -> Tensor:
    """The teacher's embeddings (N, Dt) of some records, plain, from the cache where they are in it.

    Without a teacher those that the cache lacks are NaN: they are of records that cannot be read.
    """
    plain = torch.zeros(len(index), dtype=torch.bool)
    if teacher is None:
        assert cache is not None
        rows, known = cache.look_up(index, plain)
        if not known.any():
            raise TeacherError(f"the cache {cache.path} is empty: {cache.fill_hint}")
        return rows
    known = plain
    rows = torch.empty(len(index), teacher.embedding_size)
    if cache is not None:
        rows, known = cache.look_up(index, plain)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    unknown = (~known).nonzero().flatten()
    # Nothing at all would be one part, of no images.
    for places in unknown.split(32) if len(unknown) else ():
        images = torch.stack([faces[int(index[place])].image for place in places.tolist()])
        rows[places] = teacher(images.to(device).float() / 127.5 - 1).cpu()
    return rows


def read_classifier(source: str | os.PathLike[str], shard: ClassShard) -> Tensor:
    """Read this rank's rows of a classifier, whatever number of ranks has trained it: fp32, not normalised.

    ``source`` is the folder of a run of arcface_torch or of this package (``checkpoint_gpu_*.pt``), or one of its
    files; the same with the files of arcface_torch's first years (``softmax_fc_gpu_*.pt``,
    ``rank_*_softmax_weight.pt``); or one file with the matrix, (C, D) or (D, C), alone or by any name, with or without
    a backbone: what ``arcface-kd merge-head`` writes, AdaDistill's ``header.pth``, AdaFace's ``head.kernel``.
    """
    path = Path(source).expanduser()
    if not path.exists():
        raise TeacherError(f"the teacher's classifier {path} does not exist (looked from {Path.cwd()})")
    if path.is_dir():
        rows = _rows_of_folder(path, shard)
    elif _OF_A_RUN.fullmatch(path.name):
        rows = _rows_of_run(path.parent, shard)
    elif _older_shards(path.parent, path.name):
        rows = _rows_of_files(_older_shards(path.parent, path.name), shard)
    else:
        rows = _rows_of_files([path], shard)
    return _sound(rows, shard, path)


def _rows_of_folder(folder: Path, shard: ClassShard) -> Tensor:
    if checkpoint_file(folder, 0).exists():
        return _rows_of_run(folder, shard)
    for pattern in _OLDER_SHARDS:
        if files := _older_shards(folder, pattern.format(0)):
            return _rows_of_files(files, shard)
    raise TeacherError(
        f"no classifier in the folder {folder}; wanted checkpoint_gpu_0.pt, which a run leaves with "
        f"save_all_states=True, or {' or '.join(pattern.format(0) for pattern in _OLDER_SHARDS)}"
    )


def _rows_of_run(folder: Path, shard: ClassShard) -> Tensor:
    run = open_shards(folder)
    _check_count(run.num_classes, shard, folder)
    return run.class_centers(shard.start, shard.start + shard.size)


def _older_shards(folder: Path, name: str) -> list[Path]:
    """All ranks' files of the run that a file of this name belongs to, in order; none if it is called otherwise."""
    for pattern in _OLDER_SHARDS:
        before, after = pattern.split("{}")
        found = [re.fullmatch(re.escape(before) + r"(\d+)" + re.escape(after), each) for each in os.listdir(folder)]
        ranks = sorted(int(match[1]) for match in found if match)
        if name in {pattern.format(rank) for rank in ranks}:
            if ranks != list(range(len(ranks))):
                raise CheckpointError(f"{folder} holds {pattern.format('*')} of ranks {ranks}: some are missing")
            return [folder / pattern.format(rank) for rank in ranks]
    return []


def _rows_of_files(files: list[Path], shard: ClassShard) -> Tensor:
    # A rank's own file has its share of the classes.
    num_classes = shard.num_classes if len(files) == 1 else None
    matrices = [_matrix(read_content(path), path, num_classes) for path in files]
    count = sum(matrix.shape[0] for matrix in matrices)
    _check_count(count, shard, files[0])
    parts, first = [], 0
    for rank, (path, matrix) in enumerate(zip(files, matrices, strict=True)):
        whole = ClassShard(count, rank, len(files))
        if matrix.shape != (whole.size, matrices[0].shape[1]):
            raise CheckpointError(
                f"{path} holds {tuple(matrix.shape)} where rank {rank} of {len(files)} has {whole.size} of {count} "
                f"classes of {matrices[0].shape[1]} dimensions: files of several runs are mixed"
            )
        begin, end = max(shard.start, first), min(shard.start + shard.size, first + len(matrix))
        parts.append(matrix[begin - first : max(begin, end) - first])
        first += len(matrix)
    return torch.cat(parts)


def _matrix(content: object, path: Path, num_classes: int | None = None) -> Tensor:
    """The (C, D) matrix of a file: its only one, or the one that has a row or a column for each class."""
    matrices = _matrices({"weight": content} if isinstance(content, Tensor) else content)
    fitting = {where: each for where, each in matrices.items() if num_classes in each.shape} or matrices
    found = {where: each for where, each in fitting.items() if where[-1] in _NAMES} or fitting
    if not found:
        raise TeacherError(f"{path} holds no classifier but {outlined(content)}; wanted a matrix (classes, dimension)")
    # Averaged copies lie under other keys.
    first = next(iter(found))
    here = [where for where in found if where[0] == first[0]]
    if len(here) > 1:
        told = ", ".join(f"{short('.'.join(where[1:]))} {tuple(found[where].shape)}" for where in here[:5])
        raise TeacherError(
            f"{path} does not show which of its matrices is the classifier: {told}; save that one by itself"
        )
    matrix = found[first]
    if num_classes in matrix.shape and matrix.shape[0] != matrix.shape[1]:
        return matrix if matrix.shape[0] == num_classes else matrix.T
    return matrix.T if first[-1] == "kernel" else matrix


def _matrices(content: object) -> dict[tuple[str, ...], Tensor]:
    """The matrices of a file outside its backbone, by the state dict and the parts of the name."""
    backbones = {(found.place, found.prefix + name) for found in find_backbones(content) for name in found.tensors}
    return {
        (place, *name.split(".")): tensor
        for place, tensors in state_dicts(content).items()
        for name, tensor in tensors.items()
        if tensor.ndim == 2 and tensor.is_floating_point() and (place, name) not in backbones
    }


def _check_count(count: int, shard: ClassShard, path: Path) -> None:
    if count != shard.num_classes:
        raise TeacherError(
            f"the teacher's classifier {path} has {count} classes, the run has num_classes={shard.num_classes}: the "
            "teacher was trained on other records"
        )


def _sound(rows: Tensor, shard: ClassShard, path: Path) -> Tensor:
    rows = rows.to(torch.float32, copy=True).contiguous()
    norms = rows.norm(dim=1)
    bad = (~norms.isfinite() | (norms == 0)).nonzero().flatten()
    if len(bad):
        raise TeacherError(
            f"the teacher's classifier {path}: class {shard.start + int(bad[0])} is zero, NaN or inf; it is damaged"
        )
    return rows


def class_means(cache: EmbeddingCache, faces: FaceDataset, shard: ClassShard) -> Tensor:
    """A classifier made anew: each class's center is the mean direction of its images, plain and mirrored.

    What margin softmax pulls the embeddings of a class towards is close to their mean; where nobody has kept the
    teacher's classifier, this is the nearest to it that can be had. The cache must be full for the shard's classes.
    """
    position = faces.labels() - shard.start
    own = np.flatnonzero((position >= 0) & (position < shard.size))
    sums = torch.zeros(shard.size, cache.embedding_size, dtype=torch.float64)
    missing: list[int] = []
    for first in range(0, len(own), _IMAGES_AT_ONCE):
        chunk = torch.from_numpy(own[first : first + _IMAGES_AT_ONCE])
        for flipped in (False, True):
            rows, known = cache.look_up(chunk, torch.full((len(chunk),), flipped))
            missing += chunk[~known].tolist()
            sums.index_add_(0, torch.from_numpy(position[chunk.numpy()])[known], rows[known].double())
    if missing and not _are_skipped(missing, faces):
        raise TeacherError(
            f"{CLASS_MEANS} needs a full cache, and {cache.path} lacks {len(missing)} of {2 * len(own)} embeddings of "
            f"this rank's classes: {cache.fill_hint}"
        )
    norms = sums.norm(dim=1)
    bad = (norms < 1e-6).nonzero().flatten()
    if len(bad):
        raise TeacherError(
            f"{CLASS_MEANS}: class {shard.start + int(bad[0])} has no images in the records, or they cancel out: set "
            "num_classes to the classes that are there, numbered without gaps"
        )
    return cast(Tensor, (sums / norms.unsqueeze(1)).float())


def _are_skipped(images: list[int], faces: FaceDataset) -> bool:
    """Whether these are all images that cannot be read, and the run skips such."""
    if faces.on_bad_record == "stop":
        return False
    for index in sorted(set(images)):
        try:
            faces.pixels(View(index, False))
        except BadRecordError:
            continue
        return False
    return True


def check_order(
    classifier: Tensor, shard: ClassShard, faces: FaceDataset, embed: Callable[[Tensor], Tensor], name: str
) -> None:
    """Check that class order matches the data: the teacher must find its own training images' classes.

    Some images of this rank's classes, spread over the records, are embedded and compared with the classes of all of
    them. They are judged in eight parts of the range of classes, so that an order which is right at the beginning and
    shifted behind an identity that was taken out is noticed too. Fewer than a quarter right in a part is an error.
    """
    spread = np.unique(np.linspace(0, len(faces) - 1, _LABELS_LOOKED_AT, dtype=np.int64))
    labels = np.array([faces.label(int(index)) for index in spread])
    own = np.flatnonzero((labels >= shard.start) & (labels < shard.start + shard.size))
    own = own[np.argsort(labels[own], kind="stable")]
    own = own[np.unique(np.linspace(0, len(own) - 1, _EMBEDDINGS_LOOKED_AT, dtype=np.int64))] if len(own) else own
    wanted = torch.from_numpy(labels[own])
    classes = wanted.unique()
    if len(classes) < 2:
        return
    embeddings = normalize(embed(torch.from_numpy(spread[own])).cpu().float())
    nearest = classes[(embeddings @ normalize(classifier[classes - shard.start]).T).argmax(1)]
    right = nearest == wanted
    parts = _PARTS if len(own) >= 8 * _PARTS else 1
    for found, of in zip(right.tensor_split(parts), wanted.tensor_split(parts), strict=True):
        if found.float().mean() < _LEAST_AGREEMENT:
            raise TeacherError(
                f"the teacher's classifier {name} does not fit the records: of {len(of)} images of classes "
                f"{int(of[0])} to {int(of[-1])} it gives {int(found.sum())} their own class; it was trained on other "
                "records or another order of identities, or with another teacher"
            )
    logger.info("the teacher's classifier %s gives %d of %d images their own class", name, int(right.sum()), len(right))
