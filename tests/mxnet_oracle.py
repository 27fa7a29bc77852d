"""mxnet 1.9.1 as an oracle, where it installs: it still wants ``numpy.bool``, which numpy took away in 1.24."""

import functools
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import ParamSpec, TypeVar

import numpy as np
import pytest

_P = ParamSpec("_P")
_R = TypeVar("_R")


def silently(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Run a function that calls mxnet, which uses names that scipy and numpy are about to take away."""

    @functools.wraps(function)
    def quiet(*arguments: _P.args, **keywords: _P.kwargs) -> _R:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function(*arguments, **keywords)

    return quiet


def import_mxnet() -> ModuleType:
    """The mxnet package, or a skip with the reason."""
    if "bool" not in vars(np):
        np.bool = bool  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("mxnet", reason="mxnet, the oracle, is not installed here", exc_type=ImportError)
