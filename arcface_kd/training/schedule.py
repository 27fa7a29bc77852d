"""The learning rate of arcface_torch: a linear warm-up, then a polynomial of degree one down to zero."""

import torch


def linear_with_warmup(
    optimizer: torch.optim.Optimizer, warmup_steps: int, total_steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """The schedule of the host's ``PolynomialLRWarmup`` with power 1, stepped after each micro-step.

    The rate of step t, counted from 0, is the base rate for t = 0, ``t / warmup`` of it up to the end of the warm-up
    and ``(total - t) / (total - warmup)`` of it afterwards; it stays 0 past the end.
    """

    def share(step: int) -> float:
        if step == 0:
            return 1.0
        if step <= warmup_steps:
            return step / warmup_steps
        return max(0.0, (total_steps - step) / max(1, total_steps - warmup_steps))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, share)
