"""The step of a method whose class centers no optimiser moves: on a GPU it is recorded once and replayed."""

import copy
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from arcface_kd.distributed.step_graph import StepGraph
from arcface_kd.losses.class_weights import format_of_sums
from arcface_kd.methods.base import Batch, Method


def can_replay(method: Method) -> bool:
    """Whether a method is the same each step; its own class has to say so, a subclass may do more."""
    return "same_each_step" in vars(type(method)) and method.computes_part and method.same_each_step


def replays(batch: Batch) -> bool:
    """Whether a batch's step may be replayed: on a GPU, unless it is observed."""
    return batch.projected.is_cuda and not batch.observed


class FrozenStep:
    """Calls a method that is the same each step, see :attr:`Method.same_each_step`, on batches that nobody observes.

    Its loss and the gradient are found together, so that one recording holds both.
    """

    def __init__(self, method: Method) -> None:
        self._step = _LossAndGradient(method)
        self._graph = StepGraph(self._step, method.buffers, method.context.ranks)

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """The method's loss term."""
        found = self._graph(batch.projected, batch.labels, batch.teacher, batch.row_m2)
        loss: Tensor = _FoundAlready.apply(batch.projected, *found)  # type: ignore[no-untyped-call]
        return {self._step.term: loss}

    def __deepcopy__(self, memo: dict[int, Any]) -> "FrozenStep":
        return FrozenStep(copy.deepcopy(self._step.method, memo))


class _LossAndGradient:
    """A method's loss and its gradient in the student's rows, both in the format of the loss's sums.

    An fp16 gradient would lose what the trainer's loss scale is to save, which it is multiplied by later.
    """

    def __init__(self, method: Method) -> None:
        self.method, self.term = method, ""

    def __call__(
        self, student: Tensor, labels: Tensor, teacher: Tensor | None, row_m2: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            student = student.detach().to(format_of_sums(student)).requires_grad_()
            batch = Batch(student, student, labels, teacher, sizes=[], step=0, observed=False, row_m2=row_m2)
            ((self.term, loss),) = self.method(batch).items()
            (gradient,) = torch.autograd.grad(loss, student)
        return loss.detach(), gradient


class _FoundAlready(torch.autograd.Function):
    """A loss (a scalar) of (B, D) rows, and its gradient in them."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, loss: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        ctx.dtype = rows.dtype
        return loss.view_as(loss)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * gradients[0]).to(ctx.dtype), None, None
