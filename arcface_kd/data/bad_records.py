"""The bad records that a run has passed over: told one by one as they are met, and counted at the end of an epoch."""

import logging
from collections.abc import Sequence
from typing import NamedTuple

from torch import distributed

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
    """What one loader has passed over.

    Every record is told once by the rank that meets it, with its key, its place and what is wrong with it. At the end
    of an epoch rank 0 tells those that other ranks have met and it has not heard of, and the number of them all.

    Attributes:
        found: every bad record that was met so far, by its index.

    Args:
        of_all_ranks: whether an epoch's end brings together what the ranks of the default process group have met; all
            of them must then get there.
    """

    def __init__(self, *, of_all_ranks: bool = False) -> None:
        self.found: dict[int, str] = {}
        self._of_all_ranks = of_all_ranks
        self._of_epoch: dict[int, str] = {}

    def note(self, bad: Sequence[BadRecord]) -> None:
        """Keep what a batch has passed over."""
        for index, message in bad:
            self._of_epoch[index] = message
            self._tell(index, message)

    def _tell(self, index: int, message: str) -> None:
        if index not in self.found:
            self.found[index] = message
            logger.warning("skipped: %s", printable(message))

    def end_epoch(self) -> int:
        """Count and tell what the epoch has passed over, each record once, and begin a new one."""
        of_ranks = [self._of_epoch]
        rank = 0
        if self._of_all_ranks and distributed.is_available() and distributed.is_initialized():
            rank = distributed.get_rank()
            of_ranks = [{} for _ in range(distributed.get_world_size())]
            distributed.all_gather_object(of_ranks, self._of_epoch)
        self._of_epoch = {}
        every = {index: message for found in of_ranks for index, message in found.items()}
        if rank == 0:
            for index in sorted(every):
                self._tell(index, every[index])
            if every:
                shares = f" ({' + '.join(str(len(found)) for found in of_ranks)})" if len(of_ranks) > 1 else ""
                logger.warning(
                    "%d bad records%s were skipped in this epoch, the next good one shown in place of each",
                    *(len(every), shares),
                )
        return len(every)
