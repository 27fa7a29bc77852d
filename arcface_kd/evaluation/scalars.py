"""Curves of a run, read back from its TensorBoard event files."""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from arcface_kd.errors import DataError


class Curve(NamedTuple):
    """Points of a line.

    Attributes:
        x: (N,) steps or false accept rates.
        y: (N,) values.
    """

    x: NDArray[np.float64]
    y: NDArray[np.float64]


def read_scalars(folder: str | os.PathLike[str]) -> dict[str, Curve]:
    """All scalar curves of a TensorBoard folder, every point of them.

    Args:
        folder: a run's ``tensorboard`` folder.

    Returns:
        Curves over steps by tag.

    Raises:
        DataError: the folder holds no event files.
    """
    from tensorboard.backend.event_processing import event_accumulator

    files = sorted(Path(folder).glob("events.out.tfevents.*"))
    if not files:
        raise DataError(f"{folder} holds no TensorBoard event files; a run writes them to OUTPUT/tensorboard")
    newest: dict[str, dict[int, tuple[float, float]]] = {}
    for file in files:
        # One file at a time: given a folder with several writers, tensorboard's own reader keeps to the last file.
        events = event_accumulator.EventAccumulator(
            str(file), size_guidance=event_accumulator.STORE_EVERYTHING_SIZE_GUIDANCE
        ).Reload()
        for tag in events.Tags()["scalars"]:
            points = newest.setdefault(tag, {})
            for event in events.Scalars(tag):
                # A resumed run writes some steps again; what was written last is what the run went on from.
                if event.step not in points or points[event.step][0] <= event.wall_time:
                    points[event.step] = (event.wall_time, event.value)
    return {
        tag: Curve(
            np.array(sorted(points), dtype=np.float64),
            np.array([points[step][1] for step in sorted(points)], dtype=np.float64),
        )
        for tag, points in sorted(newest.items())
    }
