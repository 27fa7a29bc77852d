"""A make-believe GPU: tensors live on the CPU, their storages say that they are on the device.

Inside :func:`make_believe_gpu`, ``"cuda"`` is a device of its own. Noted is what a real one would suffer from:
operations that mix tensors of both devices (which a GPU refuses), values that the host asks for (it waits for the
device), and kernel launches, forward and backward. A function that :func:`arcface_kd.losses.fused.fused` compiles for a
GPU counts as the kernels that it says; its numbers come from torch's own operations.
"""

import contextlib
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

# Loaded here: its first import looks at tensors, which is no business of the step that happens to come first.
import torch._dynamo
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from arcface_kd.losses import angle_sums, fused, narrow_products

_CUDA = torch.device("cuda", 0)

# Operations that make another view of the same memory, or memory without numbers: no kernel.
_NO_KERNEL = (
    *("view", "_unsafe_view", "expand", "slice", "select", "transpose", "t.default", "unsqueeze", "squeeze", "permute"),
    *("as_strided", "alias", "detach", "unbind", "split", "chunk", "narrow", "diagonal", "reshape", "lift_fresh"),
    *("set_", "unfold", "is_same_size", "sym_", "movedim", "empty", "new_empty", "resize", "_local_scalar"),
)
_SYNCS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal.", "unique", "_unique")
_VALUES = ("tolist", "numpy", "item", "__bool__", "__float__", "__int__", "__index__")


def on_device(tensor: object) -> bool:
    """Whether a tensor is on the make-believe device."""
    return isinstance(tensor, Tensor) and getattr(tensor.untyped_storage(), "make_believe", False)


def _put(tensor: Tensor) -> Tensor:
    tensor.untyped_storage().make_believe = True  # type: ignore[attr-defined]
    return tensor


def _is_cuda(device: object) -> bool:
    return str(device).startswith("cuda")


def _place() -> str:
    """The line of the package that called."""
    for frame in reversed(traceback.extract_stack()):
        if "arcface_kd/" in frame.filename:
            return f"{frame.filename.split('arcface_kd/')[-1]}:{frame.lineno}"
    return "a test"


@dataclass
class Record:
    """What has happened on the device since the last :meth:`clear`.

    Attributes:
        launches: kernels, by operation.
        syncs: waits for the device, by operation and line.
        mixes: operations over tensors of both devices, by operation and line.
    """

    launches: Counter[str] = field(default_factory=Counter)
    syncs: Counter[str] = field(default_factory=Counter)
    mixes: Counter[str] = field(default_factory=Counter)
    _inside_kernel: int = 0
    _makes_on_device: bool = False

    def clear(self) -> None:
        for counter in (self.launches, self.syncs, self.mixes):
            counter.clear()

    def launch(self, operation: str, kernels: int = 1) -> None:
        if not self._inside_kernel:
            self.launches[operation] += kernels

    def sync(self, operation: str) -> None:
        self.syncs[f"{operation} at {_place()}"] += 1

    def as_kernels(self, function: Callable[..., Any], kernels: int, kernel: object) -> Callable[..., Any]:
        """In place of :func:`arcface_kd.losses.fused.on_gpu`."""

        def run(*arguments: Any, **keywords: Any) -> Any:
            self.launch(function.__name__, kernels)
            self._inside_kernel += 1
            try:
                return function(*arguments, **keywords)
            finally:
                self._inside_kernel -= 1

        return run


class _Operations(TorchDispatchMode):
    """Counts what reaches torch's operations, forward and backward, and hands the mark on to their results."""

    def __init__(self, record: Record) -> None:
        super().__init__()
        self.record = record

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        record = self.record
        tensors = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, Tensor)]
        there = [on_device(each) for each in tensors]
        result = function(*args, **kwargs)
        if not (any(there) or record._makes_on_device):
            return result
        name = str(function).removeprefix("aten.")
        if any(there) and not name.startswith(("_to_copy", "copy_")):
            # A number that torch has wrapped goes along as an argument.
            strays = [tuple(each.shape) for each, on in zip(tensors, there, strict=True) if not on and each.dim()]
            if strays:
                record.mixes[f"{name} with {strays} of the CPU at {_place()}"] += 1
        if name.startswith(_SYNCS):
            record.sync(name)
        if name.startswith(("index.Tensor", "index_put")):
            index = [each for each in args[1] if each is not None]
            if any(each.dtype in (torch.bool, torch.uint8) for each in index):
                record.sync(f"{name} by a mask")
            if any(each.dim() and not on_device(each) for each in index):
                record.sync(f"{name} by an index of the CPU")
        if not name.startswith(_NO_KERNEL):
            record.launch(name)
        for each in tree_flatten(result)[0]:
            if isinstance(each, Tensor):
                _put(each)
        return result


class _Devices(TorchFunctionMode):
    """Makes ``"cuda"`` of what asks for a device, and copies what goes from one to the other."""

    def __init__(self, record: Record) -> None:
        super().__init__()
        self.record = record

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(function, "__name__", "")
        source = args[0] if args and isinstance(args[0], Tensor) else None
        if source is not None and name in ("to", "cuda", "cpu"):
            return self._moved(name, source, args, kwargs)
        if source is not None and name in _VALUES and on_device(source):
            self.record.sync(name)
        if name == "mm" and kwargs.pop("out_dtype", None) is not None:
            return self._narrow_product(*args)
        kwargs.pop("pin_memory", None)
        return self._made(function, name, source, args, kwargs)

    def _narrow_product(self, a: Tensor, b: Tensor) -> Tensor:
        """cuBLAS's product of narrow factors in fp32, which no CPU has."""
        self.record.launch("mm")
        self.record._inside_kernel += 1
        try:
            return a.float() @ b.float()
        finally:
            self.record._inside_kernel -= 1

    def _moved(self, name: str, source: Tensor, args: Any, kwargs: dict[str, Any]) -> Tensor:
        """``to``, ``cuda`` and ``cpu``: another format as on the source's device, and a copy to the other one."""
        device = {"cuda": "cuda", "cpu": "cpu"}.get(name, kwargs.pop("device", None))
        waits, others = not kwargs.pop("non_blocking", False), []
        for each in args[1:]:
            if isinstance(each, Tensor):
                device, each = ("cuda" if on_device(each) else "cpu"), each.dtype
            if isinstance(each, bool):
                waits = not each
            elif isinstance(each, torch.dtype):
                others.append(each)
            elif each is not None:
                device = each
        moved: Tensor = Tensor.to(source, *others, **kwargs) if others or kwargs else source  # type: ignore[call-overload]
        if device is None or _is_cuda(device) == on_device(source):
            return moved
        if waits or not _is_cuda(device):
            self.record.sync(f"a copy of {tuple(source.shape)} to {device}")
        moved = moved.clone()
        moved.untyped_storage().make_believe = _is_cuda(device)  # type: ignore[attr-defined]
        return moved

    def _made(self, function: Any, name: str, source: Tensor | None, args: Any, kwargs: dict[str, Any]) -> Any:
        device = kwargs.get("device")
        if device is not None:
            kwargs["device"] = "cpu"
        there = _is_cuda(device) or (name == "new_tensor" and on_device(source))
        if there and name in ("tensor", "as_tensor", "new_tensor"):
            self.record.sync(f"{name} of numbers of the host")
            return _put(function(*args, **kwargs))
        before, self.record._makes_on_device = self.record._makes_on_device, self.record._makes_on_device or there
        try:
            return function(*args, **kwargs)
        finally:
            self.record._makes_on_device = before


class _Event:
    def record(self, stream: object) -> None:
        return

    def synchronize(self) -> None:
        return


@contextlib.contextmanager
def make_believe_gpu() -> Iterator[Record]:
    """Inside, ``"cuda"`` is a device; what happens on it is in the record."""
    record = Record()
    generator = torch.Generator
    backward = torch.autograd.function.BackwardCFunction.apply

    def in_modes(node: Any, *gradients: Any) -> Any:
        # The engine calls functions in Python outside of the modes that were there when it was called.
        with _Devices(record):
            return backward(node, *gradients)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.autograd.function.BackwardCFunction, "apply", in_modes)
        patch.setattr(Tensor, "is_cuda", property(on_device), raising=False)
        patch.setattr(Tensor, "device", property(lambda tensor: _CUDA if on_device(tensor) else torch.device("cpu")))
        patch.setattr(torch, "Generator", lambda device="cpu": generator())
        patch.setattr(torch.cuda, "Event", _Event)
        patch.setattr(torch.cuda, "current_stream", lambda device=None: None)
        for module in (fused, narrow_products, angle_sums):
            patch.setattr(module, "on_gpu", record.as_kernels)
        with _Operations(record), _Devices(record):
            yield record
