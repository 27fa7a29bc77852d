r"""Grouped KD's primary classes: for each row the highest logits, whatever rank holds them.

A group is the set of classes whose logit is at least a row's threshold. So it is found without a sort, digit by digit:
a histogram of each row's logits, summed over ranks, says in which of 2048 bins the last class of the group is; another
one of that bin says where in it. All ranks see the same histograms and end at the same threshold, so that the group is
that of all classes together.

Classes whose logits are level, up to a few roundings of the largest logit that there can be, are in or out together: a
group may be larger than asked for by those that are level with its last one.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from arcface_kd.losses.sharded_logits import slices
from arcface_kd.sharding import RankGroup

_BINS = 2048
# Histograms that lead from the range of logits to what the format can tell apart.
_DIGITS = {torch.float32: 2, torch.float64: 4}
# Cosines of factors in a narrow format may pass 1 a little.
_BEYOND = 1.03125
# The next histogram spans a little more than the bin that it looks into, whose edges are rounded.
_WIDER = 1.03125
# Halvings that tell the multiples of a step apart, whatever the number of classes.
_SIZE_HALVINGS = 24


@dataclass(frozen=True)
class FixedSize:
    """The ``size`` classes with the highest logits.

    Attributes:
        size: K, at least 1; more than there are take them all.

    Raises:
        ValueError: a size below 1.
    """

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"a group of {self.size} classes is asked for; it must be at least 1")


@dataclass(frozen=True)
class BatchMass:
    """As many classes of the highest logits as the batch's mean probability asks for, the same number for each row.

    Grouped KD's published code: the smallest multiple K of ``step`` for which the K most likely classes of a row hold,
    averaged over the batch, a share of ``mass`` of the probability (the softmax at temperature 1).

    That share is read from the histogram, with all classes of a bin taken for equally likely: K can be a step off where
    the share comes within about 1e-4 of ``mass``.

    Attributes:
        mass: tau, in (0, 1].
        step: of K, at least 1.

    Raises:
        ValueError: one of them out of range.
    """

    mass: float
    step: int = 100

    def __post_init__(self) -> None:
        _check_mass(self.mass)
        if self.step < 1:
            raise ValueError(f"the step of a group's size is {self.step}; it must be at least 1")


@dataclass(frozen=True)
class SampleMass:
    """Each row's fewest classes that hold a share of ``mass`` of its softened probability (at the KD temperature).

    Attributes:
        mass: tau, in (0, 1].

    Raises:
        ValueError: a share out of range.
    """

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

    Args:
        values: (K, B) this shard's logits over the temperature, but for the targets, which are
            :data:`~arcface_kd.losses.sharded_logits.HIDDEN`.
        target: (B,) the targets' own, the same on every rank; anything for rows without label.
        valid: (B,) bool, rows with a label.
        hidden: (B,) bool, rows whose target is among ``values``.
        limit: the largest absolute value that a logit over the temperature can have but for rounding.
        temperature: that they were divided by.
        shift: (B,) to subtract before an exponential is taken, or None where none can leave the number format.
        ranks: the ranks that share the classes.
        chunk: classes at a time.
    """

    def __init__(
        self,
        values: Tensor,
        target: Tensor,
        valid: Tensor,
        hidden: Tensor,
        limit: float,
        temperature: float,
        shift: Tensor | None,
        ranks: RankGroup,
        chunk: int,
    ) -> None:
        self.values, self.target, self.valid, self.hidden = values, target, valid, hidden
        self.temperature, self.shift, self.ranks, self.chunk = temperature, shift, ranks, chunk
        # A target may be below the range, by its margin; it is then among the last.
        highest = torch.full_like(target, limit * _BEYOND)
        self._range = _Range(highest, highest * (2 / _BINS))

    def thresholds(self, rule: GroupRule) -> Tensor:
        """Find the group.

        Args:
            rule: how large it is.

        Returns:
            (B,) a number for each row that is at most the lowest logit (over the temperature) in the group and above
            the highest one outside, the same on every rank.
        """
        where = self._range
        temperature = self.temperature if isinstance(rule, SampleMass) else None
        if isinstance(rule, BatchMass):
            sums, weights = self._sums(where, None, 1.0)
            wanted = self._size_for_batch(rule, sums, weights)
        else:
            (sums,) = self._sums(where, temperature)
            everything = sums[:, -1]
            wanted = everything.clamp_max(rule.size) if isinstance(rule, FixedSize) else everything * rule.mass
        for _ in range(1, _DIGITS[self.values.dtype]):
            where = where.inside(self._place(sums, wanted))
            (sums,) = self._sums(where, temperature)
        # The lower edge of the last bin, and a little for its rounding.
        return where.high - (self._place(sums, wanted) + 0.25) * where.width

    @staticmethod
    def _place(sums: Tensor, wanted: Tensor) -> Tensor:
        """The bin, (B,), in which running sums (B, bins) reach what is wanted, (B,)."""
        return torch.searchsorted(sums, wanted.unsqueeze(1)).squeeze(1).clamp_max(sums.shape[1] - 1)

    def _sums(self, where: _Range, *temperatures: float | None) -> list[Tensor]:
        """What the classes of all ranks come to, from the highest logit down to each bin.

        Args:
            where: the range that the bins cover.
            temperatures: of the exponentials to add up, or None to count classes: a result for each.

        Returns:
            (B, bins + 2) running sums: first all above the range, last everything.
        """
        size, batch = min(self.chunk, self.values.shape[0]), self.values.shape[1]
        table = self.values.new_zeros(len(temperatures), batch, _BINS + 2)
        scaled, weights = self.values.new_empty(2, size, batch).unbind()
        one = self.values.new_ones(())
        # Rows of the batch, each beside its own histogram: a scatter along the last dimension runs many times as fast
        # on a CPU as one along the first.
        places = torch.empty(batch, size, dtype=torch.int64, device=table.device)
        for part in slices(self.values.shape[0], self.chunk):
            values = self.values[part]
            count = values.shape[0]
            place = places[:, :count].copy_(self._bin(values, where, scaled[:count]).T)
            for sums, temperature in zip(table, temperatures, strict=True):
                counted = one if temperature is None else self._weights(values, temperature, weights[:count]).T
                sums.scatter_add_(1, place, counted.expand(place.shape))
        for sums, temperature in zip(table, temperatures, strict=True):
            if temperature is None:
                # Targets are hidden far below all others and have been counted there.
                sums[:, -1] -= self.hidden.to(sums.dtype)
        table = self.ranks.sum_(table)
        place = self._bin(self.target, where).long().unsqueeze(1)
        for sums, temperature in zip(table, temperatures, strict=True):
            own = self.valid.to(table.dtype)
            if temperature is not None:
                own = own * self._weights(self.target, temperature)
            sums.scatter_add_(1, place, own.unsqueeze(1))
        return [sums.cumsum(1) for sums in table]

    def _bin(self, values: Tensor, where: _Range, out: Tensor | None = None) -> Tensor:
        """Bins of values, not yet cut to whole numbers: 0 above the range, bins + 1 below."""
        place = torch.addcmul(1 + where.high / where.width, values, -1 / where.width, out=out)
        # A batch that fp16 has spoilt must not write outside the table.
        return place.nan_to_num_(0.0).clamp_(0, _BINS + 1)

    def _weights(self, values: Tensor, temperature: float, out: Tensor | None = None) -> Tensor:
        """Exponentials, at another temperature than the one that the logits were divided by already."""
        weights = torch.mul(values, self.temperature / temperature, out=out)
        if self.shift is not None:
            weights.sub_(self.shift * (self.temperature / temperature))
        return weights.exp_()

    def _size_for_batch(self, rule: BatchMass, numbers: Tensor, weights: Tensor) -> Tensor:
        """The number of classes that a batch's mean probability asks for, by bisection over the multiples of the step.

        Args:
            rule: the share and the step.
            numbers: (B, bins + 2) running numbers of classes.
            weights: (B, bins + 2) running weights at temperature 1.

        Returns:
            (B,) that number, the same for all rows but for those that have fewer classes.
        """
        valid = self.valid.to(weights.dtype)
        share_of_row = valid / valid.sum().clamp_min(1)
        shares = weights / weights[:, -1:] * share_of_row.unsqueeze(1)
        # What comes before a bin.
        earlier_numbers, earlier_shares = pad(numbers, (1, 0)), pad(shares, (1, 0))
        classes = numbers[:, -1]
        # One number for all rows, though a row whose target was not drawn has a class more.
        most = classes.amax() if classes.numel() else classes.sum()
        high = (most / rule.step).ceil()
        low = torch.zeros_like(high)
        for _ in range(_SIZE_HALVINGS):
            steps = ((low + high) / 2).floor()
            size = (steps * rule.step).minimum(classes)
            place = self._place(numbers, size).unsqueeze(1)
            first, last = earlier_numbers.gather(1, place), numbers.gather(1, place)
            part = ((size.unsqueeze(1) - first) / (last - first).clamp_min(1)).clamp(0, 1)
            enough = torch.lerp(earlier_shares.gather(1, place), shares.gather(1, place), part).sum() >= rule.mass
            low, high = torch.where(enough, low, steps), torch.where(enough, steps, high)
        return (high * rule.step).minimum(classes).clamp_min(1)
