"""TensorBoard curves and log lines of the distillation, written by the head, so that every trainer gets them."""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger(__name__)

# Curves only: in a line they would hide the loss terms.
_NOT_IN_LINES = "gradient_"


class TensorBoardLog:
    """Writes scalars under ``kd/`` beside the trainer's own, and a line to the log where the trainer shows one.

    The event file is opened at the first writing and not before: the trainer's ``wandb.init(sync_tensorboard=True)``,
    which its ``using_wandb`` asks for, sends on what is written to event files that are opened after it.

    ``folder`` is the trainer's ``OUTPUT/tensorboard``, ``every`` the steps between two writings. All ranks must agree
    on ``every``, since finding the values may take all of them; ``writes`` says whether this one writes.
    """

    def __init__(self, folder: str | os.PathLike[str], every: int, writes: bool) -> None:
        self.folder = Path(folder)
        self.every = max(1, every)
        self.writes = writes
        self._writer: SummaryWriter | None = None

    def __deepcopy__(self, memo: dict[int, object]) -> "TensorBoardLog":
        """The same log: there is one file."""
        return self

    def due(self, step: int) -> bool:
        """Whether a step, counted from 1, is written."""
        return step % self.every == 0

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write one step's scalars, on the rank that writes."""
        if not self.writes:
            return
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            # Without a purge step: TensorBoard would take it as a restart and drop the trainer's own scalars.
            self._writer = SummaryWriter(log_dir=str(self.folder), filename_suffix=".kd")
        for name, value in values.items():
            self._writer.add_scalar(f"kd/{name}", value, step)
        self._writer.flush()
        shown = "".join(f"{name} {value:.4f}   " for name, value in values.items() if _NOT_IN_LINES not in name)
        logger.info("kd: %sGlobal Step: %d", shown, step)
