"""The classes that the ranks of a run draw together, found in one process."""

import torch
from torch import Tensor

from arcface_kd.distributed.class_shard import ClassShard
from arcface_kd.methods.base import RunContext
from arcface_kd.methods.class_sampling import sample_classes


def drawn_classes(context: RunContext, labels: Tensor, ranks: int, step: int) -> Tensor | None:
    """Their numbers; None where every class is taken. The context is that of a run on one rank."""
    drawn = []
    for rank in range(ranks):
        shard = ClassShard(context.num_classes, rank, ranks)
        index = sample_classes(shard, shard.local(labels), context, step)
        if index is None:
            return None
        drawn.append(index + shard.start)
    return torch.cat(drawn)
