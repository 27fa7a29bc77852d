"""The table of ONNX operators, and a node as the function that computes it sees it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Operator = Callable[..., Tensor | tuple[Tensor, ...]]

OPERATORS: dict[str, Operator] = {}
"""Operators of ONNX's own domain by name; ``torch_operators`` and ``torch_layout`` fill it."""


class UnsupportedError(ValueError):
    """A use of an operator that torch has not or that is not written here; the message says which."""


@dataclass(frozen=True)
class Call:
    """A node as its operator sees it."""

    attributes: Mapping[str, Any]  # by name; text as ``str``, tensors as ``Tensor``
    opset: int  # version of the operator set
    outputs: int = 1  # how many outputs the graph names
    training: bool = False  # whether batch norms take the batch's statistics and move their running ones
    # An empty tensor in the number format and on the device of the weights.
    floats: Tensor = field(default_factory=lambda: torch.empty(0))

    def get(self, name: str, default: Any) -> Any:
        """An attribute, or the default that the specification gives it."""
        return self.attributes.get(name, default)


def operator(name: str) -> Callable[[Operator], Operator]:
    """A decorator that puts a function into the table."""

    def register(function: Operator) -> Operator:
        OPERATORS[name] = function
        return function

    return register


def numbers(values: Tensor | Sequence[int]) -> list[int]:
    """Whole numbers out of an attribute or an input."""
    return [int(value) for value in (values.tolist() if isinstance(values, Tensor) else values)]


def axes_of(call: Call, given: Tensor | None) -> list[int] | None:
    """Axes as an input, as later opsets have them, or as an attribute."""
    axes = given if given is not None else call.get("axes", None)
    return None if axes is None else numbers(axes)
