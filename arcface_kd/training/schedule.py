"""The learning rate: a linear warm-up, then arcface_torch's polynomial of degree one down to zero, or a cosine."""

import math
from typing import Literal

import torch

Decay = Literal["linear", "cosine"]


def decay_with_warmup(
    optimizer: torch.optim.Optimizer, warmup_steps: int, total_steps: int, decay: Decay = "linear"
) -> torch.optim.lr_scheduler.LambdaLR:
    """The schedule of the host's ``PolynomialLRWarmup`` with power 1, or half a cosine behind the same warm-up.

    The rate of step t, counted from 0, is the base rate for t = 0 and ``t / warmup`` of it during the warm-up. Then,
    with ``left = (total - t) / (total - warmup)``, it is ``left`` of it, or ``(1 - cos(pi left)) / 2``; it stays 0 past
    the end.

    Args:
        optimizer: whose groups' rates are scheduled.
        warmup_steps: at least 0.
        total_steps: of the run, at least 1.
        decay: which of the two.

    Returns:
        The scheduler, to be stepped after each micro-step.
    """

    def share(step: int) -> float:
        if step == 0:
            return 1.0
        if step <= warmup_steps:
            return step / warmup_steps
        left = max(0.0, (total_steps - step) / max(1, total_steps - warmup_steps))
        return left if decay == "linear" else (1 - math.cos(math.pi * left)) / 2

    return torch.optim.lr_scheduler.LambdaLR(optimizer, share)
