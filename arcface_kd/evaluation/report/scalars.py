"""Curves of a run, read back from its TensorBoard event files."""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from arcface_kd.errors import DataError


class Curve(NamedTuple):
    """Points (N,) of a line; x are steps or false accept rates."""

    x: NDArray[np.float64]
    y: NDArray[np.float64]


def read_scalars(folder: str | os.PathLike[str]) -> dict[str, Curve]:
    """All scalar curves of a TensorBoard folder by tag, every point of them."""
    from tensorboard.backend.event_processing import event_accumulator

    files = sorted(Path(folder).glob("events.out.tfevents.*"))
    if not files:
        raise DataError(f"{folder} holds no TensorBoard event files; a run writes them to OUTPUT/tensorboard")
    newest: dict[str, dict[int, tuple[float, float]]] = {}
    for file in files:
        if not file.is_file():
            raise DataError(f"{file} is no regular file; remove it")
        # One file at a time: given a folder with several writers, tensorboard's own reader keeps to the last file.
        events = event_accumulator.EventAccumulator(
            str(file), size_guidance=event_accumulator.STORE_EVERYTHING_SIZE_GUIDANCE
        )
        try:
            events.Reload()
        # It reads up to what is cut short, but takes a record's length and content for right: protobuf's DecodeError,
        # or the MemoryError of a length.
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(f"{file} is damaged ({reason[:200]}); remove it, or get it again") from error
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
