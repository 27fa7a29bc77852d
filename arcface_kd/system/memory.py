"""What a machine did not give, in one line: memory, or a process that it has ended to get some back."""

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor

import torch

from arcface_kd.errors import ArcfaceKDError, ResourceError


def shortage(error: BaseException, remedy: str) -> str | None:
    """What the machine lacked, where that is what an error says.

    Args:
        error: any.
        remedy: what the user may do about memory that runs out.

    Returns:
        A line without a full stop, or None for an error about something else.
    """
    if not isinstance(error, MemoryError | RuntimeError) or isinstance(error, ArcfaceKDError):
        return None
    text = " ".join(str(error).split())
    details = f" ({text})" if text else ""
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError) or "can't allocate memory" in text:
        return f"out of memory: {remedy}{details}"
    if text.startswith("DataLoader worker"):
        return (
            "a process that reads images has ended, as the system does when memory runs out: lower num_workers or "
            f"batch_size{details}"
        )
    if isinstance(error, BrokenExecutor):
        return f"a process that helps with the work has ended, as the system does when memory runs out{details}"
    return None


@contextlib.contextmanager
def named_shortages(place: Callable[[], str], remedy: str) -> Iterator[None]:
    """Say in one line what the machine lacked.

    Args:
        place: where the work was, as the line begins; asked when something is lacking.
        remedy: what the user may do about memory that runs out.

    Raises:
        ResourceError: something was lacking.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        lacked = shortage(error, remedy)
        if lacked is None:
            raise
        raise ResourceError(f"{place()}: {lacked}") from error
