"""A make-believe CUDA graph: operations on the CPU, noted while a graph is recorded and done when it is replayed.

As on a GPU, recording computes nothing: what it has written to memory from before is put back. A replay does each
operation over the very memory that the recording saw; what the function's Python would decide anew, it does not.
"""

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from arcface_kd.distillation import head


def _tensors(value: object) -> list[Tensor]:
    return [each for each in tree_flatten(value)[0] if isinstance(each, Tensor)]


class _Operations(TorchDispatchMode):
    def __init__(self, *, refuses: bool) -> None:
        super().__init__()
        self.refuses = refuses
        self.noted: list[tuple[Callable[..., Any], Any, Any, Any]] = []
        self._made: set[int] = set()
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.refuses and len(self.noted) == 5:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
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
    """In place of ``torch.cuda.CUDAGraph``; as torch 2.11's, it does not clear up behind a recording that has failed.

    Attributes:
        recorded: how many have begun.
        replayed: how many replays.
        refused: which one is refused half-way, counted from 1; 0 refuses none.
        underway: what of torch takes a recording to be going on.
    """

    recorded = 0
    replayed = 0
    refused = 0
    underway: ClassVar[set[str]] = set()

    def capture_begin(self, pool: object, capture_error_mode: str) -> None:
        assert not gc.isenabled()
        type(self).recorded += 1
        self.underway.update(("allocator", "generator"))
        self._operations = _Operations(refuses=self.recorded == self.refused)
        self._operations.__enter__()

    def capture_end(self) -> None:
        self._operations.__exit__(None, None, None)
        self._operations.put_back()
        if self._operations.refuses:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        self.underway.clear()

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


class _Generator:
    def clone_state(self) -> "_Generator":
        return _Generator()

    def graphsafe_set_state(self, state: "_Generator") -> None:
        Graph.underway.discard("generator")


@contextlib.contextmanager
def make_believe_graphs() -> Iterator[type[Graph]]:
    """Inside, steps that a GPU would replay are replayed on the CPU; gives the class that counts them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "CUDAGraph", Graph)
        patch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
        patch.setattr(torch.cuda, "Stream", _Stream)
        patch.setattr(torch.cuda, "current_stream", _Stream)
        patch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        patch.setattr(torch.cuda, "default_generators", {None: _Generator()})
        patch.setattr(torch._C, "_cuda_endAllocateToPool", lambda device, pool: Graph.underway.discard("allocator"))
        patch.setattr(head, "replays", lambda batch: not batch.observed)
        for each in ("recorded", "replayed", "refused"):
            patch.setattr(Graph, each, 0)
        yield Graph
