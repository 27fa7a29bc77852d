"""PartialFC's class sampling: the batch's own classes and a random share of the others."""

import torch
from torch import Tensor

from arcface_kd.distributed.class_shard import ClassShard
from arcface_kd.methods.base import RunContext


def sample_classes(
    shard: ClassShard, labels: Tensor, context: RunContext, step: int, device: torch.device
) -> Tensor | None:
    """The classes of a shard that take part in a step (An et al., CVPR 2022, arXiv 2203.15565).

    The draw depends on the run's seed, the rank and the step alone, so that a resumed run draws the same.

    Args:
        shard: this rank's classes.
        labels: (B,) labels of the gathered batch.
        context: for the sample rate and the seed.
        step: micro-steps done before this one.
        device: where the draw is made.

    Returns:
        (K,) sorted positions in the shard, among them all classes of the batch that it holds; K is
        ``int(sample_rate * shard.size)``, or the batch's size where that is more. None where all classes take part.
    """
    if context.sample_rate >= 1:
        return None
    wanted = int(context.sample_rate * shard.size)
    position, owned = shard.local(labels)
    generator = torch.Generator(device=device).manual_seed((context.seed * 1_000_003 + step) * 4099 + shard.rank)
    score = torch.rand(shard.size, device=device, generator=generator)
    # A score above every random one keeps the batch's classes in; the sum writes the others' zeros without a branch.
    score.index_add_(0, position, owned.to(score.dtype) * 2)
    # The batch bounds its number of classes, so that nobody has to count them and wait for the device.
    size = min(max(wanted, labels.shape[0]), shard.size)
    return torch.topk(score, size).indices.sort().values
