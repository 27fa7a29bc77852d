"""Ranks, the classes that each of them holds, and the few collectives that a sharded head needs.

Classes are split over ranks as PartialFC splits them: contiguous ranges, the first ``num_classes % world_size`` ranks
hold one more. Batches may differ in size from rank to rank.
"""

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from arcface_kd.distributed.class_shard import ClassShard
from arcface_kd.distributed.process_group import job_timeout

T = TypeVar("T")

# torch 2.13 gave them new names and warns about the old ones.
_all_gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
_reduce_scatter = getattr(distributed, "reduce_scatter_single", None) or distributed.reduce_scatter_tensor


# One for each process group: opening another connects every rank with every other.
_host_groups: weakref.WeakKeyDictionary[distributed.ProcessGroup, distributed.ProcessGroup] = (
    weakref.WeakKeyDictionary()
)


def _host_group(group: distributed.ProcessGroup | None) -> distributed.ProcessGroup:
    """The same ranks over gloo; as patient as ``ARCFACE_KD_TIMEOUT`` says."""
    group = group or distributed.group.WORLD
    assert group is not None
    if group not in _host_groups:
        ranks = distributed.get_process_group_ranks(group)
        _host_groups[group] = distributed.new_group(ranks, timeout=job_timeout(), backend="gloo")
    return _host_groups[group]


class RankGroup:
    """The ranks that share one head: their number and their collectives, or a single process without any.

    Sizes of batches are exchanged between the hosts over gloo, so that a step on GPUs never waits for the device to
    learn how many rows the others bring.

    Attributes:
        rank: of this process.
        world_size: number of ranks.
        instead: takes :meth:`sum_` and :meth:`max_` in place of doing them, while a step is recorded; None else.

    Args:
        group: the process group; ``None`` takes the default one when ``torch.distributed`` is initialised.
        alone: be a single process, whatever group there is.
    """

    def __init__(self, group: distributed.ProcessGroup | None = None, *, alone: bool = False) -> None:
        self.group = group
        active = not alone and distributed.is_available() and distributed.is_initialized()
        self.rank: int = distributed.get_rank(group) if active else 0
        self.world_size: int = distributed.get_world_size(group) if active else 1
        self.instead: Callable[[Callable[[], object]], None] | None = None
        self._host_group = group
        self._scatters = False
        if self.world_size > 1 and "gloo" not in str(distributed.get_backend(group)):
            self._host_group = _host_group(group)
            self._scatters = True

    def shard(self, num_classes: int) -> ClassShard:
        """The classes that this rank holds out of ``num_classes``."""
        return ClassShard(num_classes, self.rank, self.world_size)

    def sizes(self, size: int) -> list[int]:
        """Every rank's ``size``, in the order of the ranks."""
        if self.world_size == 1:
            return [size]
        gathered = torch.empty(self.world_size, dtype=torch.int64)
        _all_gather(gathered, torch.tensor([size]), group=self._host_group)
        return [int(value) for value in gathered.tolist()]

    def gather_objects(self, value: T) -> list[T]:
        """Every rank's plain value, in the order of the ranks."""
        if self.world_size == 1:
            return [value]
        gathered: list[Any] = [None] * self.world_size
        distributed.all_gather_object(gathered, value, group=self._host_group)
        return gathered

    def gather(self, rows: Tensor, sizes: list[int]) -> Tensor:
        """All ranks' rows, one rank after the other, without gradient.

        Args:
            rows: (b, ...) this rank's rows, ``b == sizes[rank]``.
            sizes: what :meth:`sizes` returned for this batch.

        Returns:
            (sum(sizes), ...) rows, the same on every rank.
        """
        rows = rows.detach()
        if self.world_size == 1:
            return rows
        largest = max(sizes)
        padded = rows.new_zeros((largest, *rows.shape[1:]))
        padded[: rows.shape[0]] = rows
        gathered = rows.new_empty((self.world_size * largest, *rows.shape[1:]))
        _all_gather(gathered, padded, group=self.group)
        if min(sizes) == largest:
            return gathered
        return torch.cat([gathered[i * largest : i * largest + size] for i, size in enumerate(sizes)])

    def gather_with_gradient(self, rows: Tensor, sizes: list[int]) -> Tensor:
        """All ranks' rows; in the backward pass a rank's rows receive the sum of all ranks' gradients.

        That sum is the gradient of a loss which every rank computes over the whole gathered batch from its own share of
        the classes. :func:`for_ddp` turns it into what ``DistributedDataParallel`` expects.

        Args:
            rows: (b, D) this rank's rows.
            sizes: what :meth:`sizes` returned for this batch.

        Returns:
            (sum(sizes), D) rows.
        """
        if self.world_size == 1:
            return rows
        gathered: Tensor = _GatherRows.apply(rows, sizes, self)  # type: ignore[no-untyped-call]
        return gathered

    def own_slice(self, sizes: list[int]) -> slice:
        """Where this rank's rows are in a gathered tensor (sum(sizes), ...)."""
        start = sum(sizes[: self.rank])
        return slice(start, start + sizes[self.rank])

    def own_rows(self, gathered: Tensor, sizes: list[int]) -> Tensor:
        """This rank's rows of a gathered tensor (sum(sizes), ...)."""
        return gathered[self.own_slice(sizes)]

    def sum_rows(self, gathered: Tensor, sizes: list[int]) -> Tensor:
        """Sum a (sum(sizes), ...) tensor over ranks and return this rank's rows of the sum."""
        if self.world_size == 1:
            return gathered
        if self._scatters and min(sizes) == max(sizes):
            own = gathered.new_empty((sizes[self.rank], *gathered.shape[1:]))
            _reduce_scatter(own, gathered.contiguous(), group=self.group)
            return own
        return self.own_rows(self.sum_(gathered.clone(memory_format=torch.contiguous_format)), sizes)

    def sum_(self, values: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        return self._reduce_(values, distributed.ReduceOp.SUM)

    def sum_on_hosts(self, values: Tensor) -> Tensor:
        """The sum over ranks of a tensor on the CPU, whatever device the ranks train on."""
        if self.world_size == 1:
            return values
        values = values.clone()
        distributed.all_reduce(values, distributed.ReduceOp.SUM, group=self._host_group)
        return values

    def computed_by_all(self, loss: Tensor) -> Tensor:
        """A loss that every rank has computed in full from the gathered batch: its gradient is shared out evenly.

        The ranks' gradients of gathered rows are summed, so that a loss which all of them compute would count
        ``world_size`` times. The head calls this for the terms of methods that do not call it themselves.

        Args:
            loss: the same on every rank; one that this or :meth:`computed_in_parts` has returned is left as it is.

        Returns:
            The same value.
        """
        return loss if getattr(loss, _SHARED_OUT, False) else _shared_out(_scale_gradient(loss, 1 / self.world_size))

    def computed_in_parts(self, part: Tensor) -> Tensor:
        """A loss whose summands the ranks have shared out among them: the sum, whose gradient is the own part's.

        Args:
            part: scalar, the sum of this rank's summands; all ranks call, those without a summand with 0.

        Returns:
            The sum over ranks, the same on each.
        """
        if self.world_size == 1:
            return part
        total: Tensor = _SumOfParts.apply(part, self)  # type: ignore[no-untyped-call]
        return _shared_out(total)

    def sum_with_gradient(self, values: Tensor) -> Tensor:
        """The sum over ranks of what each has of its own rows; backward, gradients are summed too.

        That is the gradient of a loss whose summands the ranks have shared out and which all depend on the sum, as on
        the statistics of the whole batch. All ranks take part in the backward pass.
        """
        if self.world_size == 1:
            return values
        total: Tensor = _SumOverRanks.apply(values, self)  # type: ignore[no-untyped-call]
        return total

    def average_gradient(self, parameter: Tensor) -> None:
        """Have a parameter's gradient averaged over ranks, as ``DistributedDataParallel`` does.

        For parameters of the head that every rank has, and that lie before :func:`for_ddp` on the way to the loss. It
        needs a gradient on every rank in each backward pass, in the same order.
        """
        if self.world_size > 1:
            parameter.register_hook(lambda gradient: self.sum_(gradient.clone()) / self.world_size)

    def sum_gradient(self, parameter: Tensor) -> None:
        """Have a parameter's gradient summed over ranks, of which each computes its share.

        It needs a gradient on every rank in each backward pass, in the same order.
        """
        if self.world_size > 1:
            parameter.register_hook(lambda gradient: self.sum_(gradient.clone()))

    def max_(self, values: Tensor) -> Tensor:
        """Maximum over ranks, in place."""
        return self._reduce_(values, distributed.ReduceOp.MAX)

    def _reduce_(self, values: Tensor, how: Any) -> Tensor:
        reduce = partial(distributed.all_reduce, values, how, group=self.group)
        if self.world_size > 1:
            if self.instead is None:
                reduce()
            else:
                self.instead(reduce)
        return values

    def max_of(self, *values: Tensor) -> tuple[Tensor, ...]:
        """The maxima over ranks of tensors of one shape, in one reduction."""
        return self.max_(torch.stack(values)).unbind() if self.world_size > 1 else values


class _GatherRows(torch.autograd.Function):
    """Gather whose backward pass sums every rank's gradient of this rank's rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sizes: list[int], ranks: RankGroup) -> Tensor:
        ctx.sizes, ctx.ranks = sizes, ranks
        return ranks.gather(rows, sizes)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return ctx.ranks.sum_rows(gradients[0], ctx.sizes), None, None


class _SumOfParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, ranks: RankGroup) -> Tensor:
        return ranks.sum_(part.detach().clone())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, ranks: RankGroup) -> Tensor:
        ctx.ranks = ranks
        return ranks.sum_(values.detach().clone())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.ranks.sum_(gradients[0].clone()), None


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.factor, None


_SHARED_OUT = "arcface_kd_shared_out"


def _shared_out(loss: Tensor) -> Tensor:
    """Mark a loss whose gradient the ranks have shared out among them."""
    setattr(loss, _SHARED_OUT, True)
    return loss


def _scale_gradient(values: Tensor, factor: float) -> Tensor:
    if factor == 1:
        return values
    scaled: Tensor = _ScaleGradient.apply(values, float(factor))  # type: ignore[no-untyped-call]
    return scaled


def for_ddp(embeddings: Tensor, world_size: int) -> Tensor:
    """Pass embeddings on, and multiply their gradient by the world size.

    ``DistributedDataParallel`` takes the mean of the ranks' gradients. That of a loss over the gathered batch is a sum
    over ranks already, so the mean would make it ``world_size`` times too small; arcface_torch's ``AllGather`` does the
    same.
    """
    return _scale_gradient(embeddings, world_size)


def on_first_rank_first(make: Callable[[], T], ranks: RankGroup | None = None) -> T:
    """Let rank 0 make something while the others wait, then let them make it too: what it creates, they find."""
    ranks = ranks or RankGroup()
    if ranks.world_size == 1:
        return make()
    made = [make()] if ranks.rank == 0 else []
    # Between the hosts: a config is read before arcface_torch has chosen each rank's GPU.
    distributed.barrier(ranks._host_group)
    return made[0] if made else make()
