"""Bad records that a run has skipped: each is logged when it is met, and all are counted at the end of an epoch."""

import logging
from collections.abc import Sequence
from typing import NamedTuple

from arcface_kd.distributed.ranks import RankGroup
from arcface_kd.system.console import printable

logger = logging.getLogger(__name__)


class BadRecord(NamedTuple):
    """A record that was passed over.

    Attributes:
        index: the image's index in its data set.
        message: which record it is, where it stands and what is wrong with it.
    """

    index: int  # type: ignore[assignment]
    message: str


class SkippedRecords:
    """The bad records that one loader has skipped.

    The rank that meets a record logs it once, with its key, its place and what is wrong with it. At the end of an epoch
    rank 0 logs those that only other ranks have met, and how many there were in all.

    Attributes:
        found: every bad record so far, by its index.

    Args:
        of_all_ranks: whether the ranks of the default process group share their records at an epoch's end, which all
            of them must then reach.
    """

    def __init__(self, *, of_all_ranks: bool = False) -> None:
        self.found: dict[int, str] = {}
        self._of_all_ranks = of_all_ranks
        self._of_epoch: dict[int, str] = {}

    def note(self, bad: Sequence[BadRecord]) -> None:
        """Keep what a batch has skipped."""
        for index, message in bad:
            self._of_epoch[index] = message
            self._log(index, message)

    def _log(self, index: int, message: str) -> None:
        if index not in self.found:
            self.found[index] = message
            logger.warning("skipped: %s", printable(message))

    def end_epoch(self) -> int:
        """Count and log what the epoch has skipped, each record once, and begin a new one."""
        ranks = RankGroup(alone=not self._of_all_ranks)
        of_ranks = ranks.gather_objects(self._of_epoch)
        self._of_epoch = {}
        every = {index: message for found in of_ranks for index, message in found.items()}
        if ranks.rank == 0:
            for index in sorted(every):
                self._log(index, every[index])
            if every:
                shares = f" ({' + '.join(str(len(found)) for found in of_ranks)})" if len(of_ranks) > 1 else ""
                logger.warning(
                    "%d bad records%s were skipped in this epoch, the next good one shown in place of each",
                    *(len(every), shares),
                )
        return len(every)
