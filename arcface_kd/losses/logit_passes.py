"""The two passes over the logits of student and teacher: sums over classes, and the derivatives in the cosines.

A group is what is at or above a row's threshold, and its complement; without a threshold all classes are one group.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from arcface_kd.losses.class_chunks import slices
from arcface_kd.losses.fused import fused
from arcface_kd.losses.sharded_logits import ShardedLogits

Buffers = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class LogitSums(NamedTuple):
    """Sums over the classes of all ranks but the target, each (B,); exponentials are taken relative to the shifts."""

    softmax: Tensor  # of exp(z) of the student, temperature 1
    student_primary: Tensor  # of exp(x_s) in P
    student_secondary: Tensor
    teacher_primary: Tensor
    teacher_secondary: Tensor
    product_primary: Tensor  # of exp(x_t) (x_t - x_s) in P
    product_secondary: Tensor
    size: Tensor  # classes in P


class GroupSplit(NamedTuple):
    """What exponentials are relative to, and where the groups part, (B,) each."""

    student_shift: Tensor | None  # None for 0
    teacher_shift: Tensor | None
    threshold: Tensor | None  # None where there are no groups


class Factors(NamedTuple):
    """What the exponentials are multiplied by to become derivatives in the cosine, (B,) each.

    None stands for nothing to do, for student or teacher in both groups at once.
    """

    softmax: Tensor | None
    student_primary: Tensor | None
    student_secondary: Tensor | None
    teacher_primary: Tensor | None
    teacher_secondary: Tensor | None


class _Chunk(NamedTuple):
    """The logits of some classes, (k, B) each, and memory for as many."""

    student: Tensor
    teacher: Tensor
    ranked: Tensor
    buffers: Buffers


class LogitPasses:
    """The two passes over kept logits, ``size`` classes at a time.

    Logits of the student above ``filter_threshold`` are 0 in its softmax at temperature 1; 0 switches it off.
    ``by_teacher`` says whose logits decide the group of a class.
    """

    def __init__(
        self,
        student: ShardedLogits,
        teacher: ShardedLogits,
        temperature: float,
        filter_threshold: float,
        by_teacher: bool,
        size: int,
    ) -> None:
        self.student, self.teacher = student.values, teacher.values
        self.ranked = self.teacher if by_teacher else self.student
        self._temperature, self._filter_threshold, self._size = temperature, filter_threshold, size
        visited, batch = self.student.shape
        self._buffers: Buffers = (None, None, None, None)
        if not self.student.is_cuda:
            # Fresh memory for each chunk would cost a CPU more time than the exponentials; one kernel needs none.
            a, b, c, d = (self.student.new_empty(min(size, visited), batch) for _ in range(4))
            self._buffers = (a, b, c, d)

    def _chunk(self, part: slice) -> _Chunk:
        student = self.student[part]
        a, b, c, d = (None if each is None else each[: len(student)] for each in self._buffers)
        return _Chunk(student, self.teacher[part], self.ranked[part], (a, b, c, d))

    def sums(self, split: GroupSplit, *, secondary: bool) -> Tensor:
        """What :class:`LogitSums` names, of this shard, as one (8, B) tensor."""
        visited, batch = self.student.shape
        total = self.student.new_zeros(len(LogitSums._fields), batch)
        for part in slices(visited, self._size):
            chunk = self._chunk(part)
            total = _with_chunk(total, chunk, split, self._temperature, self._filter_threshold, secondary=secondary)
        return total

    def derivatives(self, part: slice, out: Tensor, split: GroupSplit, factors: Factors) -> None:
        """Write the loss's derivatives (k, B) in the cosines of some classes, 0 for targets."""
        _chunk_derivatives(out, self._chunk(part), split, factors, self._temperature, self._filter_threshold)


def _exponentials(values: Tensor, shift: Tensor | None, out: Tensor | None) -> Tensor:
    return torch.exp(values, out=out) if shift is None else torch.sub(values, shift, out=out).exp_()


def _softmax(
    values: Tensor, shift: Tensor | None, temperature: float, filter_threshold: float, out: Tensor | None
) -> Tensor:
    """exp(z - shift) at temperature 1; 0 for what interclass filtering hides."""
    weights = torch.mul(values, temperature, out=out)
    if shift is not None:
        weights.sub_(shift * temperature)
    weights.exp_()
    if filter_threshold > 0:
        weights.masked_fill_(values > filter_threshold, 0.0)
    return weights


@fused()
def _with_chunk(
    total: Tensor, chunk: _Chunk, split: GroupSplit, temperature: float, filter_threshold: float, *, secondary: bool
) -> Tensor:
    student, teacher, ranked, (inside_out, a_out, b_out, c_out) = chunk
    student_shift, teacher_shift, threshold = split
    before = LogitSums(*total)
    softmax = before.softmax + _softmax(student, student_shift, temperature, filter_threshold, a_out).sum(0)
    if filter_threshold > 0:
        # Their logits are 0.
        one = 1.0 if student_shift is None else (student_shift * -temperature).exp()
        softmax = softmax + (student > filter_threshold).sum(0) * one
    a = _exponentials(student, student_shift, a_out)
    if threshold is None:
        student_primary = before.student_primary + a.sum(0)
        b = _exponentials(teacher, teacher_shift, b_out)
        teacher_primary = before.teacher_primary + b.sum(0)
        product = before.product_primary + b.mul_(torch.sub(teacher, student, out=c_out)).sum(0)
        _, _, student_secondary, _, teacher_secondary, _, rest, size = before
        return torch.stack(
            [softmax, student_primary, student_secondary, teacher_primary, teacher_secondary, product, rest, size]
        )
    inside = torch.ge(ranked, threshold, out=inside_out).to(student.dtype)
    size = before.size + inside.sum(0)
    b = torch.mul(a, inside, out=b_out)
    student_primary = before.student_primary + b.sum(0)
    student_secondary = before.student_secondary + a.sub_(b).sum(0)
    a = _exponentials(teacher, teacher_shift, a_out)
    b = torch.mul(a, inside, out=b_out)
    teacher_primary = before.teacher_primary + b.sum(0)
    teacher_secondary = before.teacher_secondary + a.sub_(b).sum(0)
    c = torch.sub(teacher, student, out=c_out)
    product = before.product_primary + b.mul_(c).sum(0)
    rest = before.product_secondary + a.mul_(c).sum(0) if secondary else before.product_secondary
    return torch.stack(
        [softmax, student_primary, student_secondary, teacher_primary, teacher_secondary, product, rest, size]
    )


@fused()
def _chunk_derivatives(
    out: Tensor, chunk: _Chunk, split: GroupSplit, factors: Factors, temperature: float, filter_threshold: float
) -> None:
    student, teacher, ranked, (inside_out, a_out, b_out, _) = chunk
    student_shift, teacher_shift, threshold = split
    softmax, student_primary, student_secondary, teacher_primary, teacher_secondary = factors
    if softmax is None:
        out.zero_()
    else:
        _softmax(student, student_shift, temperature, filter_threshold, out).mul_(softmax)
    if student_primary is None:
        return
    inside = None if threshold is None else torch.ge(ranked, threshold, out=inside_out).to(out.dtype)
    sides = [(student, student_shift, student_primary, student_secondary, 1)]
    if teacher_primary is not None:
        sides.append((teacher, teacher_shift, teacher_primary, teacher_secondary, -1))
    for values, shift, primary, secondary, sign in sides:
        weights = _exponentials(values, shift, a_out)
        if inside is not None:
            assert secondary is not None
            # At weights of 0 and 1 an interpolation is the one or the other end.
            primary = torch.lerp(secondary, primary, inside, out=b_out)
        out.addcmul_(weights, primary, value=sign)
