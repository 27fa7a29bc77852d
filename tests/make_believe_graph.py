"""A make-believe CUDA graph: operations on the CPU, noted while a graph is recorded and done when it is replayed.

As on a GPU, recording computes nothing: what it has written to memory from before is put back. A replay does each
operation over the very memory that the recording saw; what the function's Python would decide anew, it does not.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from arcface_kd.distillation import head


def _tensors(value: object) -> list[Tensor]:
    return [each for each in tree_flatten(value)[0] if isinstance(each, Tensor)]


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.noted: list[tuple[Callable[..., Any], Any, Any, Any]] = []
        self._made: set[int] = set()
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for place, argument in enumerate(function._schema.arguments):
            given = kwargs.get(argument.name, args[place] if place < len(args) else None)
            if argument.alias_info is not None and argument.alias_info.is_write:
                for each in _tensors(given):
                    self._keep(each)
        result = function(*args, **kwargs)
        self._made |= {each.untyped_storage()._cdata for each in _tensors(result)}
        self.noted.append((function, args, kwargs, result))
        return result

    def _keep(self, tensor: Tensor) -> None:
        memory = tensor.untyped_storage()._cdata
        if memory not in self._made:
            whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
            self._before.setdefault(memory, (whole, whole.clone()))

    def put_back(self) -> None:
        for whole, before in self._before.values():
            whole.copy_(before)


class Graph:
    """In place of ``torch.cuda.CUDAGraph``."""

    recorded = 0
    replayed = 0

    def capture_begin(self, pool: object, capture_error_mode: str) -> None:
        type(self).recorded += 1
        self._operations = _Operations()
        self._operations.__enter__()

    def capture_end(self) -> None:
        self._operations.__exit__(None, None, None)
        self._operations.put_back()

    def replay(self) -> None:
        type(self).replayed += 1
        with torch.no_grad():
            for function, args, kwargs, noted in self._operations.noted:
                for old, new in zip(_tensors(noted), _tensors(function(*args, **kwargs)), strict=True):
                    if old.untyped_storage()._cdata != new.untyped_storage()._cdata:
                        old.copy_(new)


class _Stream:
    def __init__(self, device: object) -> None:
        return

    def wait_stream(self, other: object) -> None:
        return


@contextlib.contextmanager
def make_believe_graphs() -> Iterator[type[Graph]]:
    """Inside, steps that a GPU would replay are replayed on the CPU; gives the class that counts them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "CUDAGraph", Graph)
        patch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
        patch.setattr(torch.cuda, "Stream", _Stream)
        patch.setattr(torch.cuda, "current_stream", _Stream)
        patch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        patch.setattr(head, "replays", lambda batch: not batch.observed)
        for each in ("recorded", "replayed"):
            patch.setattr(Graph, each, 0)
        yield Graph
