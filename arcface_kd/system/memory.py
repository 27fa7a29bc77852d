"""Turn errors of memory into one line: out of memory, or a process that the system has ended to free some."""

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor

import torch

from arcface_kd.errors import ArcfaceKDError, ResourceError


def out_of_memory_message(error: BaseException, remedy: str) -> str | None:
    """One line for an error that says that memory has run out, None for any other."""
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
    """Turn errors of memory into one line that starts with ``place``, such as ``step 7``."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        lacked = out_of_memory_message(error, remedy)
        if lacked is None:
            raise
        raise ResourceError(f"{place()}: {lacked}") from error
