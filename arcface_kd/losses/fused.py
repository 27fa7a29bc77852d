"""Arithmetic that runs as written on a CPU and as one or two kernels on a GPU.

A step of a head has a hundred small operations on numbers of the batch's rows. On a GPU each would be a launch, which
costs more than its arithmetic: ``torch.compile`` makes one kernel of many. Where it cannot (no triton, no C compiler),
torch's own kernels take its place, with a warning. ``TORCH_COMPILE_DISABLE=1`` switches it off.
"""

import functools
import importlib
import logging
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from arcface_kd.errors import first_line

P = ParamSpec("P")
R = TypeVar("R")

logger = logging.getLogger(__name__)

FALLBACK = "the head takes torch's own kernels, which are slower"
"""In the warning of what cannot be compiled."""

# Starting others takes longer than to compile the few small kernels.
_IN_THIS_PROCESS: dict[str, Any] = {"compile_threads": 1}


def fused(kernels: int = 1) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Mark a function of tensors and constants, which changes nothing but its arguments, for few kernels on a GPU.

    ``kernels`` is one, and one more for each sum over the whole batch that others wait for.
    """

    def mark(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def run(*arguments: P.args, **keywords: P.kwargs) -> R:
            # A caller that is being compiled itself takes the function into its own kernels.
            if torch.compiler.is_compiling() or not any(
                isinstance(each, Tensor) and each.is_cuda for each in arguments
            ):
                return function(*arguments, **keywords)
            return on_gpu(function, kernels, None)(*arguments, **keywords)

        return run

    return mark


def on_gpu(function: Callable[P, R], kernels: int, kernel: Callable[P, R] | None) -> Callable[P, R]:
    """What runs in a function's place on a GPU: ``kernel``, written by hand, or the function compiled."""
    if not _compiles():
        return function
    return kernel or _compiled(function)


@functools.cache
def _compiled(function: Callable[P, R]) -> Callable[P, R]:
    # A run's shapes stay as they are, and kernels for one shape compile faster than those for any; torch finds by
    # itself which sizes change.
    chosen: Callable[P, R] = torch.compile(function, fullgraph=True, options=_IN_THIS_PROCESS)

    def run(*arguments: P.args, **keywords: P.kwargs) -> R:
        nonlocal chosen
        try:
            return chosen(*arguments, **keywords)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            # Whatever a compiler stumbles over, and it has many errors of its own: nothing but time depends on it.
            _warn(f"{function.__qualname__} cannot be compiled here", error)
            chosen = function
            return function(*arguments, **keywords)

    return run


@functools.cache
def _compiles() -> bool:
    """Whether kernels can be compiled here, found by compiling two: one as ``torch.compile`` does, one by hand."""
    try:
        with warnings.catch_warnings():
            # Told once a process, and about what the head does not do: TF32, the defaults of Triton's next release.
            warnings.simplefilter("ignore")
            values = torch.compile(_probe, options=_IN_THIS_PROCESS)(torch.ones(2, device="cuda"))
            _probe_by_kernel(importlib.import_module("triton"))[(1,)](values)
    except Exception as error:
        # Whatever a compiler that is missing or broken raises: nothing but time depends on it.
        _warn("no kernels can be compiled here", error)
        return False
    return True


def _probe(values: Tensor) -> Tensor:
    return values.exp() + 1


def _probe_by_kernel(triton: Any) -> Any:
    tl = importlib.import_module("triton.language")

    def probe_kernel(values):  # type: ignore[no-untyped-def]
        tl.store(values, tl.load(values) + 1)

    return triton.jit(probe_kernel)


def _warn(what: str, error: Exception) -> None:
    logger.warning("%s: %s: %s", what, FALLBACK, first_line(error))
