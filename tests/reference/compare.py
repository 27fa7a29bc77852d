"""A loss beside its naive twin: values, and gradients in the tensors that both are computed from."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def differentiated(loss: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    """A loss of some tensors, and its gradient in each of them."""
    leaves = [each.detach().clone().requires_grad_() for each in inputs]
    value = loss(*leaves)
    return value.detach(), *torch.autograd.grad(value, leaves)


def assert_equal(met: tuple[Tensor, ...], wanted: tuple[Tensor, ...], tolerance: float = 1e-10) -> None:
    """The values of :func:`differentiated`, whatever their number formats."""
    assert len(met) == len(wanted)
    for a, b in zip(met, wanted, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)


def assert_same_terms(
    met: Mapping[str, Tensor], wanted: Mapping[str, Tensor], *inputs: Tensor, tolerance: float = 1e-9
) -> None:
    """A method's terms by name, and the gradients of their sum in leaves that both are computed from."""
    assert met.keys() == wanted.keys()
    gradients = []
    for terms in (met, wanted):
        gradients.append(torch.autograd.grad(torch.stack([*terms.values()]).sum(), inputs, retain_graph=True))
    for name, value in wanted.items():
        torch.testing.assert_close(met[name], value, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(*gradients, rtol=tolerance, atol=tolerance)
