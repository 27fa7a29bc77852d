"""1:N identification: search a gallery of enrolled persons, of whom a probe may or may not be one."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arcface_kd.evaluation.roc import tar_at_far

RANKS = (1, 5, 10)
FPIR_LEVELS = (1e-1, 1e-2, 1e-3)
_COSINES_IN_MEMORY = 1 << 23


@dataclass(frozen=True, eq=False)
class Search:
    """What all probes found in one gallery."""

    # Int64 (M,), for each probe whose person is enrolled: 1, and 1 for each entry of another person that is as like the
    # probe as the person's best or more so. 1 is a hit; ties count against the model.
    mate_ranks: NDArray[np.int64]
    mate_scores: NDArray[Any]  # float64 (M,), the cosine with that best entry
    stranger_scores: NDArray[Any]  # float64 (S,), for each probe whose person is not enrolled: its largest cosine

    def tpir(self, levels: Sequence[float] = FPIR_LEVELS) -> dict[float, float | None]:
        """True positive identification rate at false positive identification rates, which are in (0, 1].

        A search is a true positive when the mate is first and above the threshold, and a false one when anybody is
        above it although the person is not enrolled. The threshold is the loosest one whose FPIR does not exceed the
        level. None where fewer than 1 / level probes are of strangers, or none of enrolled persons.
        """
        if not len(self.mate_scores) or not len(self.stranger_scores):
            return dict.fromkeys(levels)
        first = np.where(self.mate_ranks == 1, self.mate_scores, -np.inf)
        return tar_at_far(first, self.stranger_scores, levels)


def search(
    probes: NDArray[Any], probe_subjects: NDArray[np.int64], gallery: NDArray[Any], gallery_subjects: NDArray[np.int64]
) -> Search:
    """Compare each probe with each entry of a gallery; rows are L2-normalised, -1 is nobody."""
    enrolled = np.isin(probe_subjects, gallery_subjects)
    ranks = np.zeros(len(probes), dtype=np.int64)
    scores = np.empty(len(probes))
    together = max(1, _COSINES_IN_MEMORY // len(gallery))
    for start in range(0, len(probes), together):
        block = slice(start, start + together)
        cosines = probes[block] @ gallery.T
        mates = probe_subjects[block, None] == gallery_subjects
        best = np.where(mates, cosines, -np.inf).max(axis=1)
        ranks[block] = 1 + ((cosines >= best[:, None]) & ~mates).sum(axis=1)
        scores[block] = np.where(enrolled[block], best, cosines.max(axis=1))
    return Search(ranks[enrolled], scores[enrolled], scores[~enrolled])


@dataclass(frozen=True)
class IdentificationResult:
    """Searches of the same probes in one gallery or several."""

    mated: int  # searches for a person who is enrolled, over all galleries
    strangers: int  # searches for a person who is not
    # Share of the mated searches whose mate is among the first 1, 5, 10; ``None`` without mated searches.
    rank: dict[int, float | None]
    # Mean over the galleries of TPIR at each FPIR, ``None`` where a gallery cannot tell.
    tpir: dict[float, float | None]


def identification(
    searches: Sequence[Search], *, ranks: Sequence[int] = RANKS, levels: Sequence[float] = FPIR_LEVELS
) -> IdentificationResult:
    """Sum up searches as IJB does: ranks over all of them, rates as a mean over the galleries."""
    found = np.concatenate([one.mate_ranks for one in searches])
    rates = [one.tpir(levels) for one in searches]
    tpir: dict[float, float | None] = {}
    for level in levels:
        known = [rate[level] for rate in rates]
        tpir[level] = None if None in known else float(np.mean([rate for rate in known if rate is not None]))
    return IdentificationResult(
        mated=len(found),
        strangers=sum(len(one.stranger_scores) for one in searches),
        rank={rank: float(np.mean(found <= rank)) if len(found) else None for rank in ranks},
        tpir=tpir,
    )
