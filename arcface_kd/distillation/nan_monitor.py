"""Find NaN and inf in a step, and name their images, without waiting for the GPU.

On a CPU each row's numbers are looked at in the step. From a GPU they are copied in one piece beside the computation
and looked at two steps later, on every rank at the same place. The message names the step that they belong to, and
neither head nor student is saved before the last ones have been looked at.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from arcface_kd.data.dataset import FaceDataset
from arcface_kd.data.loader import BatchViews
from arcface_kd.errors import NumberError

# By then the numbers have arrived, as a rule, and nobody waits.
_STEPS_ON_THE_WAY = 2
_NAMED = 3
# A unit vector's norm is 1; normalising what was zero leaves zero.
_LEAST_NORM = 0.5


class BatchRows(NamedTuple):
    """Whose rows a gathered batch holds, for messages."""

    step: int  # the micro-step, counted from 1
    sizes: Sequence[int]  # rows of each rank
    rank: int  # this rank
    views: BatchViews | None = None  # which records this rank's rows show; None where nobody says
    faces: FaceDataset | None = None  # their data set; None where nobody says

    @property
    def place(self) -> str:
        """The step and, of several ranks, this one."""
        return f"step {self.step}" + (f" on rank {self.rank}" if len(self.sizes) > 1 else "")

    def name(self, flags: Tensor) -> str:
        """Name the rows of the gathered batch that are flagged: this rank's by their records, others by their rank."""
        named, others = "", []
        for rank, own in enumerate(flags.split(list(self.sizes))):
            rows = own.nonzero().flatten().tolist()
            if rows and rank == self.rank:
                named = self._own(rows)
            elif rows:
                others.append(f"{len(rows)} of {len(own)} images of rank {rank}")
        return "; ".join([*([named] if named else []), *others])

    def _own(self, rows: list[int]) -> str:
        shown = rows[:_NAMED]
        more = f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else ""
        total = f"{len(rows)} of {self.sizes[self.rank]} images"
        if self.views is None or self.faces is None:
            return f"{total} (rows {', '.join(map(str, shown))}{more} of the batch)"
        index = self.views.index[shown].tolist()
        return f"{total} ({'; '.join(self.faces.where(place) for place in index)}{more})"


class _Measured(NamedTuple):
    """Numbers that say whether something is wrong."""

    values: Tensor
    find: Callable[[Tensor], Tensor]  # flags those that are wrong, on the CPU
    say: Callable[[Tensor], str]  # puts the flags into the message of a NumberError


class _OnTheWay(NamedTuple):
    step: int
    arrival: Any
    values: Tensor
    measured: list[_Measured]


class NaNMonitor:
    """Looks at a run's numbers as they pass; one for each head."""

    def __init__(self) -> None:
        self._held: list[_Measured] = []
        self._on_the_way: deque[_OnTheWay] = deque()

    def look(self, values: Tensor, find: Callable[[Tensor], Tensor], say: Callable[[Tensor], str]) -> None:
        """Look at numbers now, or, from a GPU, along with the step's others; the rest as in :class:`_Measured`."""
        measured = _Measured(values.detach(), find, say)
        if self._is_slow(values):
            self._held.append(measured)
        else:
            self._judge([measured], values)

    def end_step(self, step: int) -> None:
        """Send what the step has measured on a GPU, and look at what came two steps ago, on every rank."""
        if self._held:
            measured, self._held = self._held, []
            values = torch.cat([each.values for each in measured])
            self._on_the_way.append(_OnTheWay(step, *self._send(values), measured))
        while self._on_the_way and self._on_the_way[0].step <= step - _STEPS_ON_THE_WAY:
            self._receive()

    def settle(self) -> None:
        """Wait for what is on its way and look at it; before anything is saved."""
        if self._held:
            self.end_step(0)
        while self._on_the_way:
            self._receive()

    @staticmethod
    def _is_slow(values: Tensor) -> bool:
        """Whether reading the numbers would wait for a device."""
        return values.is_cuda

    @staticmethod
    def _send(values: Tensor) -> tuple[Any, Tensor]:
        """Copy numbers from a GPU: an event that tells when they are here, and where they will be."""
        copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        copy.copy_(values, non_blocking=True)
        arrival = torch.cuda.Event()
        arrival.record(torch.cuda.current_stream(values.device))
        return arrival, copy

    def _receive(self) -> None:
        sent = self._on_the_way.popleft()
        sent.arrival.synchronize()
        self._judge(sent.measured, sent.values)

    def _judge(self, measured: list[_Measured], values: Tensor) -> None:
        for each, part in zip(measured, values.split([len(each.values) for each in measured]), strict=True):
            bad = each.find(part)
            if bad.any():
                # What is still on its way follows from this.
                self._held.clear()
                self._on_the_way.clear()
                raise NumberError(each.say(bad))

    def inputs(
        self, labels: Tensor, num_classes: int | None, student: Tensor, teacher: Tensor | None, rows: BatchRows
    ) -> None:
        """Look at the gathered batch; all ranks see the same and stop together."""
        if num_classes is not None:
            self.look(
                labels,
                lambda met: met >= num_classes,
                lambda bad: (
                    f"{rows.place}: the label of {rows.name(bad)} is not below num_classes={num_classes}: set "
                    "num_classes to what the data have"
                ),
            )
        if teacher is not None:
            self.look(
                teacher.detach().norm(dim=1),
                # NaN is not above the bound either.
                lambda met: ~((met > _LEAST_NORM) & met.isfinite()),
                lambda bad: (
                    f"{rows.place}: the teacher's embedding of {rows.name(bad)} is zero, NaN or inf: look at these "
                    "images, or run the teacher in fp32"
                ),
            )
        self.look(_largest(student), _not_finite, lambda bad: _of_student(bad, rows))

    def terms(self, names: Sequence[str], terms: Sequence[Tensor], rows: BatchRows) -> None:
        """Look at the loss terms, which are the same on every rank; they end the step's forward pass."""
        self.look(
            torch.stack([term.detach() for term in terms]),
            _not_finite,
            lambda bad: (
                f"{rows.place}: the loss term {' and '.join(_flagged(names, bad))} is NaN or inf, from embeddings that "
                "are finite: lower lr or the term's weight, or switch fp16 off to look closer"
            ),
        )
        self.end_step(rows.step)

    def embedding_gradient(self, gradient: Tensor, rows: BatchRows) -> None:
        """Look at the loss's gradient (b, D) in this rank's student embeddings."""
        own = rows._replace(sizes=[0] * rows.rank + [gradient.shape[0]] + [0] * (len(rows.sizes) - rows.rank - 1))
        self.look(
            _largest(gradient),
            _not_finite,
            lambda bad: (
                f"{rows.place}: the loss's gradient in the student's embedding of {own.name(bad)} is NaN or inf: look "
                "at these images, or lower the terms' weights"
            ),
        )

    def weight_gradients(self, names: Sequence[str], gradients: Sequence[Tensor], step: int) -> None:
        """Look at the gradients that the student is about to take."""

        def say(flags: Tensor) -> str:
            bad = _flagged(names, flags)
            more = f" and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
            return (
                f"step {step}: the gradient of the student's {', '.join(bad[:_NAMED])}{more} is NaN or inf: lower lr, "
                "or switch fp16 off to look closer"
            )

        self.look(torch.stack(torch._foreach_norm(list(gradients))), _not_finite, say)


def _largest(rows: Tensor) -> Tensor:
    """The largest absolute number of each row, (B,): NaN or inf where the row holds one."""
    return cast(Tensor, torch.linalg.vector_norm(rows.detach(), float("inf"), dim=1))


def _not_finite(values: Tensor) -> Tensor:
    return ~values.isfinite()


def _flagged(names: Sequence[str], flags: Tensor) -> list[str]:
    return [name for name, flag in zip(names, flags.tolist(), strict=True) if flag]


def _of_student(bad: Tensor, rows: BatchRows) -> str:
    if bad.all() and len(bad) > 1:
        return (
            f"{rows.place}: the student's embedding of every image is NaN or inf: its weights are ruined by the steps "
            "before; lower lr, or switch fp16 off to look closer"
        )
    return (
        f"{rows.place}: the student's embedding of {rows.name(bad)} is NaN or inf: look at these images, lower lr, or "
        "switch fp16 off"
    )
