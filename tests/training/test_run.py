"""The optimiser of a run on a GPU."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from arcface_kd.training.run import fused_sgd


@pytest.fixture
def unwritten_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("unwritten_memory_is_nan")
def test_a_first_step_that_overflows_leaves_no_momentum() -> None:
    def after_an_overflow(optimizer: torch.optim.SGD, weight: torch.nn.Parameter) -> torch.Tensor:
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for factor in (torch.inf, 1.0, 1.0):
            scaler.scale((weight * factor).sum()).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        return weight.detach()

    settings: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
    frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    weights = [torch.nn.Parameter(torch.ones(5)) for _ in range(2)]
    met = after_an_overflow(fused_sgd([{"params": [weights[0], frozen]}], **settings), weights[0])
    expected = after_an_overflow(torch.optim.SGD([weights[1]], foreach=False, **settings), weights[1])
    torch.testing.assert_close(met, expected)
