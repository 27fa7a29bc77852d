"""What a head watches in each step: NaN and inf, the terms' gradients, and the log of both."""

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from arcface_kd.checkpoints.run_settings import require_agreement
from arcface_kd.distillation.nan_monitor import BatchRows, NaNMonitor
from arcface_kd.distillation.tensorboard_log import TensorBoardLog
from arcface_kd.distributed.ranks import RankGroup
from arcface_kd.losses.gradients import in_embeddings_alone
from arcface_kd.methods.base import Batch


class Monitor:
    """Watches one head's numbers, and writes them to the log on its steps.

    ``last_terms`` are the last step's loss terms by name, scalars without gradient. Without a ``log`` none is kept;
    ``watches_gradients`` says whether gradients are looked at for NaN and inf as well.
    """

    def __init__(self, ranks: RankGroup, log: TensorBoardLog | None, *, watches_gradients: bool) -> None:
        # What is logged takes a collective of all ranks.
        require_agreement({"frequent": None if log is None else log.every}, ranks)
        self.nan = NaNMonitor()
        self.last_terms: dict[str, Tensor] = {}
        self._ranks = ranks
        self._log = log
        self._watches_gradients = watches_gradients

    def observes(self, step: int) -> bool:
        """Whether the methods' observations of a step, counted from 1, may be asked for: always without a log."""
        return self._log is None or self._log.due(step)

    def inputs(self, batch: Batch, num_classes: int | None, rows: BatchRows) -> None:
        """Look at the gathered batch; ``num_classes`` None looks at no label."""
        self.nan.inputs(batch.labels, num_classes, batch.embeddings, batch.teacher, rows)

    def terms(
        self,
        terms: Mapping[str, Tensor],
        local_embeddings: Tensor,
        rows: BatchRows,
        observe: Callable[[], Mapping[str, Tensor]],
    ) -> None:
        """Look at the step's loss terms and write them where the log wants them; the last call of a forward pass.

        ``observe`` gives what the methods have observed, and is asked when the log wants it.
        """
        self.nan.terms(list(terms), list(terms.values()), rows)
        self.last_terms = {name: term.detach() for name, term in terms.items()}
        if self._log is not None and self._log.due(rows.step):
            self._log.write(rows.step, self._scalars(terms, local_embeddings, observe()))
        if self._watches_gradients and local_embeddings.requires_grad:
            local_embeddings.register_hook(lambda gradient: self.nan.embedding_gradient(gradient, rows))

    def weight_gradients(self, student: nn.Module | None, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Look at the gradients that an optimiser is about to apply to the student, if it holds any."""
        if student is None or not self._watches_gradients:
            return
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        found = {
            name: parameter.grad
            for name, parameter in student.named_parameters()
            if id(parameter) in held and parameter.grad is not None
        }
        if found:
            self.nan.weight_gradients(list(found), list(found.values()), step)

    def settle(self) -> None:
        """Look at what is still on its way from the device; before anything is saved."""
        self.nan.settle()

    def _scalars(
        self, terms: Mapping[str, Tensor], local_embeddings: Tensor, observed: Mapping[str, Tensor]
    ) -> dict[str, float]:
        """What a step's log holds, the same on every rank.

        That is what the methods observed, the loss terms, the norm of each one's gradient in the embeddings of the
        whole batch, and that norm's share in the sum of all terms' norms.
        """
        values = {**observed, **{name: term.detach() for name, term in terms.items()}}
        if local_embeddings.requires_grad:
            norms = self._ranks.sum_(torch.stack([_squared_norm(term, local_embeddings) for term in terms.values()]))
            # The gradient that the backbone gets is `world_size` times that of the loss, see `for_ddp`.
            norms = norms.sqrt() / self._ranks.world_size
            shares = norms / norms.sum().clamp_min(torch.finfo(norms.dtype).tiny)
            for name, norm, share in zip(terms, norms, shares, strict=True):
                values[f"gradient_norm/{name}"], values[f"gradient_share/{name}"] = norm, share
        # One copy from the device for all of them.
        found = torch.stack([value.to(torch.float64).reshape(()) for value in values.values()])
        return dict(zip(values, found.tolist(), strict=True))


class SettleFirst:
    """The student's hook that settles before its state is saved: a trainer may save it and never the head's."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor: weakref.ref[Monitor] | None = weakref.ref(monitor)

    def __call__(self, student: nn.Module, prefix: str, keep_vars: bool) -> None:
        """Settle, as torch's ``register_state_dict_pre_hook`` calls it."""
        monitor = None if self._monitor is None else self._monitor()
        if monitor is not None:
            monitor.settle()

    def __deepcopy__(self, memo: dict[int, Any]) -> "SettleFirst":
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {"_monitor": None}


def _squared_norm(term: Tensor, embeddings: Tensor) -> Tensor:
    """The squared norm of a term's gradient in the embeddings, 0 where it does not depend on them."""
    gradient = None
    if term.requires_grad:
        with in_embeddings_alone():
            (gradient,) = torch.autograd.grad(term, embeddings, retain_graph=True, allow_unused=True)
    return term.new_zeros(()) if gradient is None else gradient.to(term.dtype).square().sum()
