"""NaN and inf caught at the step in which they arise, and named, without a wait for the GPU.

What is finite is found on the device as flags. On a CPU they are looked at at once. From a GPU they are copied beside
the computation and looked at when they have arrived, as a rule in the next step; the message names the step that they
belong to, and nothing is saved before the last ones have been looked at.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from arcface_kd.data.dataset import FaceDataset
from arcface_kd.data.loader import BatchViews
from arcface_kd.errors import NumberError

# Flags of more steps than this are waited for: the host does not run further ahead of the GPU as a rule.
_MOST_ON_THE_WAY = 16
_NAMED = 3
# A unit vector's norm is 1; normalising what was zero leaves zero.
_LEAST_NORM = 0.5


class BatchRows(NamedTuple):
    """Whose rows a gathered batch holds, for messages.

    Attributes:
        step: the micro-step, counted from 1.
        sizes: rows of each rank.
        rank: this rank.
        views: which records this rank's rows show; None where nobody says.
        faces: their data set; None where nobody says.
    """

    step: int
    sizes: Sequence[int]
    rank: int
    views: BatchViews | None = None
    faces: FaceDataset | None = None

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


class _OnTheWay(NamedTuple):
    arrival: Any
    flags: Tensor
    fault: Callable[[Tensor], str]


class NumberWatch:
    """Looks at a run's numbers as they pass; one for each head."""

    def __init__(self) -> None:
        self._on_the_way: deque[_OnTheWay] = deque()

    def look(self, flags: Tensor, fault: Callable[[Tensor], str]) -> None:
        """Look at flags now, or, from a GPU, when they have arrived.

        Args:
            flags: (N,) bool, True where something is wrong.
            fault: from the flags, on the CPU and with at least one set, to the message.

        Raises:
            NumberError: a flag is set, here or in what has arrived meanwhile.
        """
        self._on_the_way.append(self._send(flags, fault))
        while self._on_the_way and (len(self._on_the_way) > _MOST_ON_THE_WAY or self._on_the_way[0].arrival.query()):
            self._receive()

    def settle(self) -> None:
        """Wait for what is on its way and look at it; before anything is saved.

        Raises:
            NumberError: a flag is set.
        """
        while self._on_the_way:
            self._receive()

    def _send(self, flags: Tensor, fault: Callable[[Tensor], str]) -> _OnTheWay:
        if flags.device.type != "cuda":
            return _OnTheWay(_Here(), flags, fault)
        copy = torch.empty(flags.shape, dtype=torch.bool, pin_memory=True)
        copy.copy_(flags, non_blocking=True)
        arrival = torch.cuda.Event()
        arrival.record()
        return _OnTheWay(arrival, copy, fault)

    def _receive(self) -> None:
        arrival, flags, fault = self._on_the_way.popleft()
        arrival.synchronize()
        if flags.any():
            # What is still on its way follows from this.
            self._on_the_way.clear()
            raise NumberError(fault(flags))

    def embeddings(self, student: Tensor, teacher: Tensor | None, rows: BatchRows) -> None:
        """Look at both sides' embeddings of the gathered batch; all ranks see the same and stop together.

        Args:
            student: (B, D).
            teacher: (B, Dt) unit vectors, or None.
            rows: whose they are.

        Raises:
            NumberError: see :meth:`look`.
        """
        sides = [("student", ~student.detach().isfinite().all(1))]
        if teacher is not None:
            norms = teacher.detach().float().norm(dim=1)
            # NaN is not above the bound either.
            sides.insert(0, ("teacher", ~((norms > _LEAST_NORM) & norms.isfinite())))

        def fault(flags: Tensor) -> str:
            found = dict(zip([side for side, _ in sides], flags.chunk(len(sides)), strict=True))
            if "teacher" in found and found["teacher"].any():
                return (
                    f"{rows.place}: the teacher's embedding of {rows.name(found['teacher'])} is zero, NaN or inf: look "
                    "at these images, or run the teacher in fp32"
                )
            of = found["student"]
            if of.all() and len(of) > 1:
                return (
                    f"{rows.place}: the student's embedding of every image is NaN or inf: its weights are ruined by "
                    "the steps before; lower lr, or switch fp16 off to look closer"
                )
            return (
                f"{rows.place}: the student's embedding of {rows.name(of)} is NaN or inf: look at these images, lower "
                "lr, or switch fp16 off"
            )

        self.look(torch.cat([flags for _, flags in sides]), fault)

    def labels(self, labels: Tensor, num_classes: int, rows: BatchRows) -> None:
        """Look at the labels of the gathered batch, which a loader of somebody else's may have brought.

        Args:
            labels: (B,), -1 for none.
            num_classes: C of the head.
            rows: of the batch.

        Raises:
            NumberError: see :meth:`look`.
        """

        def fault(flags: Tensor) -> str:
            return (
                f"{rows.place}: the label of {rows.name(flags)} is not below num_classes={num_classes}: set "
                "num_classes to what the data have"
            )

        self.look(labels >= num_classes, fault)

    def terms(self, names: Sequence[str], terms: Sequence[Tensor], rows: BatchRows) -> None:
        """Look at the loss terms, which are the same on every rank.

        Args:
            names: of the terms.
            terms: scalars.
            rows: of the batch.

        Raises:
            NumberError: see :meth:`look`.
        """

        def fault(flags: Tensor) -> str:
            bad = [name for name, flag in zip(names, flags.tolist(), strict=True) if flag]
            return (
                f"{rows.place}: the loss term {' and '.join(bad)} is NaN or inf, from embeddings that are finite: "
                "lower lr or the term's weight, or switch fp16 off to look closer"
            )

        self.look(~torch.stack([term.detach().float() for term in terms]).isfinite(), fault)

    def embedding_gradient(self, gradient: Tensor, rows: BatchRows) -> None:
        """Look at the loss's gradient in this rank's student embeddings.

        Args:
            gradient: (b, D).
            rows: of the batch.

        Raises:
            NumberError: see :meth:`look`.
        """
        own = rows._replace(sizes=[0] * rows.rank + [gradient.shape[0]] + [0] * (len(rows.sizes) - rows.rank - 1))

        def fault(flags: Tensor) -> str:
            return (
                f"{rows.place}: the loss's gradient in the student's embedding of {own.name(flags)} is NaN or inf: "
                "look at these images, or lower the terms' weights"
            )

        self.look(~gradient.detach().isfinite().all(1), fault)

    def weight_gradients(self, names: Sequence[str], gradients: Sequence[Tensor], step: int) -> None:
        """Look at the gradients that the student is about to take.

        Args:
            names: of the weights.
            gradients: any shapes.
            step: the micro-step, counted from 1.

        Raises:
            NumberError: see :meth:`look`.
        """

        def fault(flags: Tensor) -> str:
            bad = [name for name, flag in zip(names, flags.tolist(), strict=True) if flag]
            more = f" and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
            return (
                f"step {step}: the gradient of the student's {', '.join(bad[:_NAMED])}{more} is NaN or inf: lower lr, "
                "or switch fp16 off to look closer"
            )

        self.look(~torch.stack(torch._foreach_norm(list(gradients))).isfinite(), fault)


class _Here:
    """The arrival of what needs no copy."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        return
