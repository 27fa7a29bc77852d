r"""EKD's losses: how many verification thresholds the pairs of a batch pass, with the student and with the teacher.

A threshold accepts at most a share of the impostor pairs (two identities), its false positive rate. The rank of a pair
with cosine x is the number of thresholds that it passes, counted softly:

    r(x) = sum_k sigmoid( (x - threshold_k) / temperature )

A batch has B (B - 1) / 2 pairs. They are visited in blocks of rows, the cosines found anew in each visit, so that
memory is linear in B; a batch that fits into one block is multiplied once.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from arcface_kd.losses.class_weights import format_of_sums
from arcface_kd.losses.fused import fused
from arcface_kd.losses.margin_softmax import through_normalisation, unit_and_inverse

# Pairs of one block.
_BLOCK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 24}

# By so many bits at a time the order of cosines is told.
_DIGITS = {torch.float32: (11, 11, 10), torch.float64: (11, 11, 11, 11, 11, 9)}
_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


class PairBlock(NamedTuple):
    """The pairs of some rows with all rows; each pair is in one block, at its earlier row.

    ``cosines`` are (2, R, B), of student and teacher; ``positive`` and ``negative`` (R, B) flag pairs of one identity
    and of two.
    """

    rows: slice
    cosines: Tensor
    positive: Tensor
    negative: Tensor

    @property
    def student(self) -> Tensor:
        """(R, B) cosines of the student."""
        return self.cosines[0]

    @property
    def teacher(self) -> Tensor:
        """(R, B) cosines of the teacher."""
        return self.cosines[1]


class Pairs:
    """The pairs of a gathered batch; rows without a label are in none.

    Embeddings may have any norm. fp64 is computed in fp64, all else in fp32. ``positives`` and ``negatives`` count the
    pairs of one identity and of two.
    """

    def __init__(self, student: Tensor, teacher: Tensor, labels: Tensor, rows: int | None = None) -> None:
        dtype = format_of_sums(student)
        self.unit, self.inverse = unit_and_inverse(student.detach().to(dtype))
        self._teacher, _ = unit_and_inverse(teacher.detach().to(dtype))
        self._labels = labels
        budget = _BLOCK_ELEMENTS["cuda" if student.is_cuda else "cpu"]
        self._rows = rows or max(1, budget // max(len(labels), 1))
        self._only = self._block(slice(0, len(labels))) if self._rows >= len(labels) else None
        self.positives = self.negatives = torch.zeros((), dtype=torch.int64, device=labels.device)
        for block in self.blocks():
            self.positives, self.negatives = _counts(block.positive, block.negative, self.positives, self.negatives)

    def __len__(self) -> int:
        return len(self._labels) * (len(self._labels) - 1) // 2

    def blocks(self) -> Iterator[PairBlock]:
        """All pairs, a block at a time."""
        if self._only is not None:
            yield self._only
            return
        for first in range(0, len(self._labels), self._rows):
            yield self._block(slice(first, min(first + self._rows, len(self._labels))))

    def _block(self, rows: slice) -> PairBlock:
        positive, negative = _kinds(self._labels[rows], self._labels, rows.start)
        cosines = self.unit.new_empty(2, len(positive), len(self._labels))
        for unit, out in zip((self.unit, self._teacher), cosines, strict=True):
            torch.mm(unit[rows], unit.T, out=out)
        return PairBlock(rows, cosines, positive, negative)


@fused()
def _kinds(earlier: Tensor, labels: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Which pairs of some rows with later ones are of one identity, and which of two."""
    rows = torch.arange(len(earlier), device=labels.device).unsqueeze(1) + first
    known = (torch.arange(len(labels), device=labels.device) > rows) & (earlier >= 0).unsqueeze(1) & (labels >= 0)
    same = earlier.unsqueeze(1) == labels
    return known & same, known & ~same


@fused(kernels=2)
def _counts(positive: Tensor, negative: Tensor, positives: Tensor, negatives: Tensor) -> tuple[Tensor, Tensor]:
    return positives + positive.sum(), negatives + negative.sum()


def impostor_thresholds(pairs: Pairs, pairs_per_acceptance: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The cosines that one in so many impostor pairs exceeds, found digit by digit as in a radix sort.

    (K,) of the student and of the teacher, from the largest rate to the smallest; ``pairs_per_acceptance`` rises. Rates
    below one over the number of impostor pairs all have the largest cosine; without such pairs it is -inf.
    """
    dtype, count = pairs.unit.dtype, len(pairs_per_acceptance)
    search = _begin(pairs.negatives, pairs_per_acceptance)
    bits = left = sum(_DIGITS[dtype])
    for width in _DIGITS[dtype]:
        left -= width
        masks = (1 << width) - 1, (1 << bits - left - width) - 1
        # One histogram for each beginning that is still searched, and one that takes what is none of them.
        table = search.rank.new_zeros(2, (count + 1) << width)
        for block in pairs.blocks():
            place = _place_in_table(block.cosines, block.negative, search.beginning, left, width, masks)
            table.scatter_add_(1, place, table.new_ones(()).expand(place.shape))
        search = _next_digit(table, search, width)
    student, teacher = _cosines_of(search.beginning, dtype, pairs.negatives).unbind()
    return student, teacher


class _Search(NamedTuple):
    """Where some cosines of student and teacher are among those that are larger: (2, K) each, the largest first."""

    rank: Tensor  # among those that begin alike, 0 for the largest
    beginning: Tensor  # the digits that are known; rising


def _falling(cosine: Tensor) -> Tensor:
    """Whole numbers whose unsigned order is that of falling cosines."""
    return _turned(cosine.view(_BITS[cosine.dtype]))


def _turned(bits: Tensor) -> Tensor:
    """Negative numbers rise with their bits as they are; those of positive ones are turned over, but for the sign."""
    return torch.where(bits < 0, bits, ~bits ^ torch.iinfo(bits.dtype).min)


@fused()
def _begin(count: Tensor, pairs_per_acceptance: tuple[int, ...]) -> _Search:
    rank = torch.stack([count // each for each in reversed(pairs_per_acceptance)])
    return _Search(torch.stack([rank, rank]), torch.stack([rank, rank]) * 0)


@fused()
def _place_in_table(
    cosines: Tensor, negative: Tensor, beginning: Tensor, left: int, width: int, masks: tuple[int, int]
) -> Tensor:
    """Where each pair is counted, (2, R * B): by the beginning that it has and its next digit.

    ``masks`` cut out the digit and the beginning; torch 2.11 cannot trace a shift of 1 by a number that changes.
    """
    key = _falling(cosines).long().flatten(1)
    digit = (key >> left) & masks[0]
    head = (key >> (left + width)) & masks[1]
    count = beginning.shape[1]
    slot = torch.searchsorted(beginning, head).clamp_max(count - 1)
    counted = negative.flatten() & (beginning.gather(1, slot) == head)
    return (torch.where(counted, slot, count) << width) + digit


@fused(kernels=4)
def _next_digit(table: Tensor, search: _Search, width: int) -> _Search:
    sides, count = search.rank.shape
    slot = torch.searchsorted(search.beginning, search.beginning)
    of_slot = table.view(sides, count + 1, -1)[torch.arange(sides, device=table.device).unsqueeze(1), slot]
    running = of_slot.cumsum(2)
    digit = torch.searchsorted(running, search.rank.unsqueeze(2), right=True).clamp_max(running.shape[2] - 1)
    before = pad(running, (1, 0)).gather(2, digit).squeeze(2)
    return _Search(search.rank - before, (search.beginning << width) + digit.squeeze(2))


@fused()
def _cosines_of(key: Tensor, dtype: torch.dtype, count: Tensor) -> Tensor:
    """From keys (2, K), the largest cosine first, to cosines, the largest last; -inf where there are no pairs."""
    cosine = _turned(key.to(_BITS[dtype])).view(dtype)
    return torch.where(count > 0, cosine, -torch.inf).flip(1)


def soft_rank(cosine: Tensor, thresholds: Tensor, temperature: float) -> Tensor:
    """How many thresholds (K,) a cosine passes, in [0, K]; ``temperature``, in units of the cosine, softens it."""
    return _ranks_and_slopes(cosine, thresholds, temperature)[0]


def _ranks_and_slopes(cosine: Tensor, thresholds: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    rank, slope = torch.zeros_like(cosine), torch.zeros_like(cosine)
    for threshold in thresholds.unbind():
        passed = ((cosine - threshold) / temperature).sigmoid()
        rank = rank + passed
        slope = slope + passed * (1 - passed)
    return rank, slope / temperature


@fused(kernels=2)
def _differences(
    student: Tensor, teacher: Tensor, chosen: Tensor, thresholds: tuple[Tensor, Tensor], temperature: float
) -> tuple[Tensor, Tensor]:
    """The sum of squared differences of ranks of the chosen pairs, and its derivatives in the student's cosines."""
    rank, slope = _ranks_and_slopes(student, thresholds[0], temperature)
    difference = (rank - soft_rank(teacher, thresholds[1], temperature)) * chosen
    return difference.square().sum(), 2 * difference * slope


def rank_losses(
    student: Tensor, pairs: Pairs, thresholds: tuple[Tensor, Tensor], temperature: float, hardest: int
) -> tuple[Tensor, Tensor]:
    """Mean squared differences of ranks: of the positive pairs, and of the hardest negative ones.

    The hardest are those with the student's largest cosines. Both are scalars, 0 where there is no such pair.
    """
    positive, negative = _RankLosses.apply(student, pairs, thresholds, temperature, hardest)  # type: ignore[no-untyped-call]
    return positive, negative


class _RankLosses(torch.autograd.Function):
    """Both losses; the backward pass hands out what the forward pass has found already."""

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, pairs: Pairs, thresholds: tuple[Tensor, Tensor], temperature: float, hardest: int
    ) -> tuple[Tensor, Tensor]:
        unit = pairs.unit
        total, in_unit, hard = unit.new_zeros(()), torch.zeros_like(unit), _Hardest.none(unit)
        for block in pairs.blocks():
            part, weights = _differences(block.student, block.teacher, block.positive, thresholds, temperature)
            total = total + part
            in_unit[block.rows].addmm_(weights, unit)
            in_unit.addmm_(weights.T, unit[block.rows])
            hard = hard.with_block(block, min(hardest, len(pairs)))
        share = 1 / pairs.positives.clamp_min(1).to(unit.dtype)
        in_positive = through_normalisation(in_unit * share, unit, pairs.inverse)

        negative, to_first, to_second = _hard_differences(hard, unit, thresholds, temperature)
        in_unit = torch.zeros_like(unit).index_add_(0, hard.first, to_first).index_add_(0, hard.second, to_second)
        in_negative = through_normalisation(in_unit, unit, pairs.inverse)
        ctx.save_for_backward(in_positive, in_negative)
        ctx.dtype = student.dtype
        return total * share, negative

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        in_positive, in_negative = ctx.saved_tensors
        in_student = torch.addcmul(in_positive * gradients[0], in_negative, gradients[1])
        return in_student.to(ctx.dtype), *(None,) * 4


class _Hardest(NamedTuple):
    """The negative pairs with the largest cosines of the student's, (N,) each; -inf for those that are none."""

    cosine: Tensor
    teacher: Tensor
    first: Tensor
    second: Tensor

    @classmethod
    def none(cls, like: Tensor) -> "_Hardest":
        places = torch.empty(0, dtype=torch.int64, device=like.device)
        return cls(like.new_empty(0), like.new_empty(0), places, places)

    def with_block(self, block: PairBlock, most: int) -> "_Hardest":
        """The hardest of these and a block's."""
        values, place = _shown_alone(block.student, block.negative).topk(min(most, block.negative.numel()))
        found = _Hardest(values, *_of_places(block.teacher, place, block.rows.start))
        if not len(self.cosine):
            return found
        both = [torch.cat(each) for each in zip(self, found, strict=True)]
        place = both[0].topk(min(most, len(both[0]))).indices
        return _Hardest(*(each[place] for each in both))


@fused()
def _shown_alone(cosine: Tensor, shown: Tensor) -> Tensor:
    return torch.where(shown, cosine, -torch.inf).flatten()


@fused()
def _of_places(teacher: Tensor, place: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
    """The teacher's cosines at some places of a block, and the rows of these pairs."""
    batch = teacher.shape[1]
    return teacher.flatten()[place], torch.div(place, batch, rounding_mode="floor") + first, place % batch


@fused(kernels=3)
def _hard_differences(
    hard: _Hardest, unit: Tensor, thresholds: tuple[Tensor, Tensor], temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The mean squared difference of ranks, and its gradients in the pairs' unit embeddings, (N, D) each."""
    chosen = hard.cosine > -torch.inf
    cosine = torch.where(chosen, hard.cosine, 0.0)
    total, weights = _differences(cosine, hard.teacher, chosen, thresholds, temperature)
    share = 1 / chosen.sum().clamp_min(1).to(unit.dtype)
    weights = (weights * share).unsqueeze(1)
    return total * share, weights * unit[hard.second], weights * unit[hard.first]
