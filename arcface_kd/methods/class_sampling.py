"""PartialFC's class sampling: the batch's own classes and a random share of the others."""

import torch
from torch import Tensor

from arcface_kd.distributed.class_shard import ClassShard, ShardPositions
from arcface_kd.losses.class_weights import StepClasses, targets_among
from arcface_kd.methods.base import Batch, RunContext


def step_classes(context: RunContext, batch: Batch) -> StepClasses:
    """The classes of this rank that take part in a step, and where the batch's targets are among them."""
    positions = context.shard.local(batch.labels)
    index = sample_classes(context.shard, positions, context, batch.step)
    return StepClasses(index, targets_among(positions, index))


def sample_classes(shard: ClassShard, positions: ShardPositions, context: RunContext, step: int) -> Tensor | None:
    """The classes of a shard that take part in a step (An et al., CVPR 2022, arXiv 2203.15565).

    The draw depends on the run's seed, the rank and the step alone, so that a resumed run draws the same. It gives (K,)
    sorted positions in the shard, among them all classes of the batch that it holds; K is ``int(sample_rate *
    shard.size)``, or the batch's size where that is more. None where all classes take part.
    """
    if context.sample_rate >= 1:
        return None
    wanted = int(context.sample_rate * shard.size)
    position, owned = positions
    device = position.device
    generator = torch.Generator(device=device).manual_seed((context.seed * 1_000_003 + step) * 4099 + shard.rank)
    score = torch.rand(shard.size, device=device, generator=generator)
    # A score above every random one keeps the batch's classes in; the sum writes the others' zeros without a branch.
    score.index_add_(0, position, torch.where(owned, 2.0, 0.0))
    # The batch bounds its number of classes, so that nobody has to count them and wait for the device.
    size = min(max(wanted, position.shape[0]), shard.size)
    return torch.topk(score, size).indices.sort().values
