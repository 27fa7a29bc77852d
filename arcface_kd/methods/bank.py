r"""Bank: the student sees a bank of the teacher's embeddings as the teacher sees it; after SEED and CoupleFace.

With Q the unit embeddings that the teacher gave to some thousand images, one a row,

    loss = weight * mean_i KL( softmax(Q f_t / T) || softmax(Q f_s / T) )
         + mined * mean_i mean over the rows q of Q that are nearest to f_t of | cos(f_s, q) - cos(f_t, q) |

The first term is that of SEED (Fang et al., ICLR 2021, arXiv 2101.04731), for networks without labels; T and the number
of rows are lightly-train's. The second is the idea of CoupleFace (Liu et al., ECCV 2022, arXiv 2204.05502), whose code
is not public and whose equations were not at hand: it is not the paper.

Chosen here: Q comes from the cache and stays the same for the whole run, so that there is no queue to warm up, and a
batch of any size is compared with thousands of faces; the run's seed draws it, without labels, each image at most
once and not mirrored. An image's own embedding is in it if it was drawn: always where the images are few, next to never
of millions. The divergence has the gradient of a cross entropy, and is 0 for a student that sees as its teacher does.
A weight of 10: with 1 a few epochs came less far, with 64 no further.
"""

import random
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from arcface_kd.config.kd import TeacherView
from arcface_kd.config.options import Count, Options, Positive, Weight
from arcface_kd.errors import ConfigError, TeacherError
from arcface_kd.losses.bank import bank_cosines, bank_divergence, nearest_difference
from arcface_kd.methods.base import Batch, Method, Requirement, RunContext
from arcface_kd.methods.embedding import Labels

Of = Literal["images", "classes"]


@dataclass(frozen=True)
class BankConfig(Options):
    """The bank's knobs. In brackets, where a default is from.

    Attributes:
        rows: of the bank, at least 2, or 1 with a weight of 0; fewer where there are fewer images or classes.
            [lightly-train]
        of: ``images`` (default), the cached embeddings of images, or ``classes``, rows of the teacher's classifier.
        temperature: T, in units of the cosine, positive. [lightly-train]
        weight: of the divergence, at least 0; 0 takes the term out. [chosen]
        mined: weight of the cosines with the nearest rows, at least 0; 0 (default) takes the term out. [chosen]
        nearest: how many rows are the nearest, at least 1. [chosen]
        labels: ``none`` (default) leaves the classification out, and excludes methods that bring one; ``classify``
            trains the trainer's, or another method's, as well.

    Raises:
        ConfigError: both weights are 0.
    """

    rows: Count = 8192
    of: Of = "images"
    temperature: Positive = 0.07
    weight: Weight = 10.0
    mined: Weight = 0.0
    nearest: Count = 64
    labels: Labels = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weight == self.mined == 0:
            raise ConfigError("weight and mined are both 0; one of them must be positive")


class Bank(Method):
    """The student sees a bank of cached teacher embeddings as the teacher does: a softmax over it, without labels.

    Terms: ``bank``, the weighted divergence, and ``mined``, the weighted difference of cosines; one with a weight of 0
    is left out. The bank is not saved with the run: the seed draws it again. An empty cache is a TeacherError.
    """

    Config = BankConfig
    requires = frozenset({Requirement.TEACHER_EMBEDDINGS, Requirement.CACHED_EMBEDDINGS})
    teacher_views: ClassVar[frozenset[TeacherView]] = frozenset({"clean"})
    config: BankConfig
    bank: Tensor

    def __init__(self, config: BankConfig, context: RunContext) -> None:
        super().__init__(config, context)
        rows = _class_rows(config.rows, context) if config.of == "classes" else _image_rows(config.rows, context)
        if config.weight and len(rows) < 2:
            raise ConfigError(
                f"the bank has {len(rows)} row, over which a softmax is always 1: wanted bank.rows=2 and 2 {config.of} "
                "at least"
            )
        self.register_buffer("bank", rows, persistent=False)

    @classmethod
    def replaces_classifier(cls, config: Any) -> bool:
        """Whether the labels are left out."""
        return bool(config.labels == "none")

    @classmethod
    def needs_labels(cls, config: Any) -> bool:
        """Whether the bank is made of classes."""
        return bool(config.of == "classes")

    @classmethod
    def requirements(cls, config: Any) -> frozenset[Requirement]:
        """The cache, and the classifier where the bank is made of it."""
        return cls.requires | ({Requirement.TEACHER_CLASSIFIER} if config.of == "classes" else frozenset())

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Hold the gathered batch, with or without labels, against the bank; each rank takes its own rows' part."""
        assert batch.teacher is not None
        config, ranks = self.config, self.context.ranks
        rows, count = ranks.own_slice(batch.sizes), max(1, len(batch.projected))
        student, teacher = (bank_cosines(each[rows], self.bank) for each in (batch.projected, batch.teacher))
        parts: dict[str, Tensor] = {}
        if config.weight:
            parts["bank"] = config.weight * bank_divergence(student, teacher, config.temperature)
        if config.mined:
            parts["mined"] = config.mined * nearest_difference(student, teacher, config.nearest)
        return {name: ranks.computed_in_parts(part / count) for name, part in parts.items()}


def _drawn(rows: int, count: int, seed: int) -> Tensor:
    """Places of ``rows`` of ``count`` things, ascending, by seed; all where there are no more."""
    return torch.tensor(sorted(random.Random(seed).sample(range(count), min(rows, count))))


def _image_rows(rows: int, context: RunContext) -> Tensor:
    """The cached embeddings of some images: rank 0's on every rank; rows of records that were skipped are left out."""
    # Without a cache the run was stopped before it came here, see `requires`.
    assert context.cache is not None
    index = _drawn(rows, context.cache.images, context.seed)
    found = torch.zeros(len(index), context.cache.embedding_size)
    if context.ranks.rank == 0:
        found, known = context.cache.look_up(index, torch.zeros(len(index), dtype=torch.bool))
        found[~known] = 0
    found = context.ranks.sum_on_hosts(found)
    found = found[found.any(1)]
    if not len(found):
        raise TeacherError(f"the cache {context.cache.path} holds none of the bank's rows: {context.cache.fill_hint}")
    return found


def _class_rows(rows: int, context: RunContext) -> Tensor:
    """Unit rows of the teacher's classifier for some classes, gathered from the ranks that hold them."""
    assert context.teacher_classifier is not None
    index, shard = _drawn(rows, context.num_classes, context.seed), context.shard
    found = torch.zeros(len(index), context.teacher_classifier.shape[1])
    own = (index >= shard.start) & (index < shard.start + shard.size)
    found[own] = normalize(context.teacher_classifier[index[own] - shard.start])
    return context.ranks.sum_on_hosts(found)
