r"""Grouped KD's primary classes: for each row the target and the highest logits, whatever rank holds them.

A group is the target and the other classes whose logit is at least a row's threshold. The threshold is found without a
sort, digit by digit: a histogram of each row's logits, summed over ranks, says in which of 2048 bins the last class of
the group is; another one of that bin says where in it. All ranks see the same histograms and end at the same threshold,
so that the group is that of all classes together.

Classes whose logits are level, up to a few roundings of the largest logit that there can be, are in or out together: a
group may be larger than asked for by those that are level with its last one.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from arcface_kd.distributed.ranks import RankGroup
from arcface_kd.losses.class_chunks import slices
from arcface_kd.losses.class_weights import VisitedClasses

_BINS = 2048
# Histograms that lead from the range of logits to what the format can tell apart.
_DIGITS = {torch.float32: 2, torch.float64: 4}
# Cosines of factors in a narrow format may pass 1 a little.
_BEYOND = 1.03125
# The next histogram spans a little more than the bin that it looks into, whose edges are rounded.
_WIDER = 1.03125


@dataclass(frozen=True)
class FixedSize:
    """The target and the ``size - 1`` other classes with the highest logits; ``size`` is at least 1."""

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"a group of {self.size} classes is asked for; it must be at least 1")


@dataclass(frozen=True)
class BatchMass:
    """One number of classes for all rows, by the batch's mean probability, as in Grouped KD's published code.

    With p the mean over the batch of the softmax at temperature 1, (C,), K is the first of 1, 1 + step, 1 + 2 step, ...
    for which the K largest entries of p add up to ``mass``, in (0, 1]. Each row's group is then that of
    :class:`FixedSize`.
    """

    mass: float
    step: int = 100

    def __post_init__(self) -> None:
        _check_mass(self.mass)
        if self.step < 1:
            raise ValueError(f"the step of a group's size is {self.step}; it must be at least 1")


@dataclass(frozen=True)
class SampleMass:
    """Each row's target and the fewest others that make up ``mass``, in (0, 1], at the KD temperature."""

    mass: float

    def __post_init__(self) -> None:
        _check_mass(self.mass)


GroupRule = FixedSize | BatchMass | SampleMass


def _check_mass(mass: float) -> None:
    if not 0 < mass <= 1:
        raise ValueError(f"the cumulative probability of a group is {mass}; it must be in (0, 1]")


class _Range(NamedTuple):
    """Where a histogram looks: 2048 bins from ``high`` downwards, (B,) each."""

    high: Tensor
    width: Tensor  # of a bin

    def inside(self, place: Tensor) -> "_Range":
        """The range of one bin of each row, (B,) as :meth:`RankedLogits._place` finds them."""
        margin = self.width * ((_WIDER - 1) / 2)
        return _Range(self.high - (place - 1) * self.width + margin, self.width * (_WIDER / _BINS))


class RankedLogits:
    """The logits that classes are ranked by, over all ranks.

    ``values`` (K, B) are this shard's logits over the temperature, but for the targets, which are
    :data:`~arcface_kd.losses.sharded_logits.HIDDEN`; ``target`` (B,) are the targets' own, the same on every rank, for
    the ``valid`` rows, those with a label. ``classes`` says which classes of the shard ``values`` are of, and where the
    targets are. No logit is above ``limit`` in absolute value, but for rounding. ``shift`` (B,) is subtracted before an
    exponential is taken; None where none can leave the number format. ``chunk`` classes are taken at a time.
    ``of_each_rank`` is how many classes each rank holds; None asks the ranks if it must be known.
    """

    def __init__(
        self,
        values: Tensor,
        target: Tensor,
        valid: Tensor,
        classes: VisitedClasses,
        limit: float,
        temperature: float,
        shift: Tensor | None,
        ranks: RankGroup,
        chunk: int,
        of_each_rank: list[int] | None = None,
    ) -> None:
        self.values, self.target, self.valid, self.classes = values, target, valid, classes
        self.temperature, self.shift, self.ranks, self.chunk = temperature, shift, ranks, chunk
        self.of_each_rank = of_each_rank
        highest = torch.full_like(target, limit * _BEYOND)
        self._range = _Range(highest, highest * (2 / _BINS))

    def thresholds(self, rule: GroupRule) -> Tensor:
        """For each row a number between the lowest logit in the group and the highest one outside.

        (B,), over the temperature, the same on every rank; the target's own logit is not looked at.
        """
        where = self._range
        by_mass = isinstance(rule, SampleMass)
        sums = self._sums(where, by_mass)
        if isinstance(rule, SampleMass):
            own = self._weights(self.target) * self.valid
            wanted = ((sums[:, -1] + own) * rule.mass - own).clamp_min(0)
        else:
            size = self._size_for_batch(rule) if isinstance(rule, BatchMass) else rule.size
            wanted = torch.zeros_like(self.target) + (size - 1)
        for _ in range(1, _DIGITS[self.values.dtype]):
            where = where.inside(self._place(sums, wanted))
            sums = self._sums(where, by_mass)
        # The lower edge of the last bin, and a little for its rounding.
        return where.high - (self._place(sums, wanted) + 0.25) * where.width

    @staticmethod
    def _place(sums: Tensor, wanted: Tensor) -> Tensor:
        """The bin, (B,), in which running sums (B, bins) reach what is wanted, (B,)."""
        return torch.searchsorted(sums, wanted.unsqueeze(1)).squeeze(1).clamp_max(sums.shape[1] - 1)

    def _sums(self, where: _Range, by_mass: bool) -> Tensor:
        """How many classes all ranks have, but for the targets, from the highest logit down to each bin.

        (B, bins + 2) running sums: first all above the range, last everything, hidden targets included. ``by_mass``
        adds up exponentials instead of counting.
        """
        size, batch = min(self.chunk, self.values.shape[0]), self.values.shape[1]
        table = self.values.new_zeros(batch, _BINS + 2)
        scaled, weights = self.values.new_empty(2, size, batch).unbind()
        one = self.values.new_ones(())
        # Rows of the batch, each beside its own histogram: a scatter along the last dimension runs many times as fast
        # on a CPU as one along the first.
        places = torch.empty(batch, size, dtype=torch.int64, device=table.device)
        for part in slices(self.values.shape[0], self.chunk):
            values = self.values[part]
            count = values.shape[0]
            place = places[:, :count].copy_(self._bin(values, where, scaled[:count]).T)
            counted = self._weights(values, out=weights[:count]).T if by_mass else one
            table.scatter_add_(1, place, counted.expand(place.shape))
        return self.ranks.sum_(table).cumsum(1)

    @staticmethod
    def _bin(values: Tensor, where: _Range, out: Tensor) -> Tensor:
        """Bins of values, not yet cut to whole numbers: 0 above the range, bins + 1 below."""
        place = torch.addcmul(1 + where.high / where.width, values, -1 / where.width, out=out)
        # A batch that fp16 has spoilt must not write outside the table.
        return place.nan_to_num_(0.0).clamp_(0, _BINS + 1)

    def _weights(self, values: Tensor, power: float = 1.0, out: Tensor | None = None) -> Tensor:
        """Exponentials of ``power`` times the logits."""
        weights = torch.mul(values, power, out=out)
        if self.shift is not None:
            weights.sub_(self.shift * power)
        return weights.exp_()

    def _size_for_batch(self, rule: BatchMass) -> Tensor:
        """The number of classes that a batch's mean probability asks for, scalar."""
        share = self._mean_probability()
        sizes = self.ranks.sizes(len(share)) if self.of_each_rank is None else self.of_each_rank
        largest = self.ranks.gather(share, sizes).sort(descending=True).values
        reached = largest.double().cumsum(0)[:: rule.step].contiguous()
        return 1 + rule.step * torch.searchsorted(reached, rule.mass)

    def _mean_probability(self) -> Tensor:
        """The batch's mean softmax at temperature 1, (C,), for the classes of this shard; 0 for classes left out."""
        own = self._weights(self.target, self.temperature)
        buffer = torch.empty_like(self.values[: self.chunk])
        total = torch.zeros_like(own)
        for part in slices(self.values.shape[0], self.chunk):
            weights = self._weights(self.values[part], self.temperature, buffer[: len(self.values[part])])
            total.add_(weights.sum(0))
        rows = self.valid / self.valid.sum().clamp_min(1) / (self.ranks.sum_(total) + own)
        classes = self.classes
        mean = rows.new_zeros(len(classes.centers))
        for part in slices(self.values.shape[0], self.chunk):
            weights = self._weights(self.values[part], self.temperature, buffer[: len(self.values[part])])
            mean[classes.chosen(part)] = weights @ rows
        return mean.index_add_(0, classes.target, own * rows * classes.owned)
