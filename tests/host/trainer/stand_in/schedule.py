"""The stand-in's learning rate: a linear way up, a linear way down."""

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class PolynomialLRWarmup(LambdaLR):
    """Called with ``optimizer=, warmup_iters=, total_iters=``."""

    def __init__(self, optimizer: Optimizer, warmup_iters: int, total_iters: int) -> None:
        def factor(step: int) -> float:
            if step < warmup_iters:
                return step / warmup_iters
            return max(0.0, (total_iters - step) / max(1, total_iters - warmup_iters))

        super().__init__(optimizer, factor)
