"""A function of tensors as CUDA graphs: recorded once, and replayed from then on for the price of a few launches.

What a GPU computes in the step of a frozen head takes it a fraction of the time that the host takes to ask for it, one
kernel after the other. A graph asks for all of them at once.

Collectives stay outside: the recording is cut where one stands, and a replay is graph, collective, graph and so on.
So it holds over any backend, and a rank that replays goes along with one that does not.
"""

import contextlib
import gc
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from arcface_kd.distributed.ranks import RankGroup
from arcface_kd.errors import first_line

logger = logging.getLogger(__name__)

NOT_RECORDED = "a head's step cannot be recorded as a CUDA graph"
"""In the warning of a step that runs as it is."""

Given = Sequence[Tensor | None]

# Kernels are compiled and chosen in the first calls, which a recording cannot hold.
_CALLS_BEFORE = 3


class StepGraph:
    """Calls a function as it is at first, then records it and replays it.

    It does so anew where the inputs' shapes or the function's memory are others than before. Where it cannot be
    recorded, a warning says so once, and it is called as it is.

    Args:
        function: of tensors; its operations may depend on their shapes and on nothing else, and change no memory beside
            ``memory``. Its collectives are sums and maxima of ``ranks``.
        memory: gives the tensors that it reads and writes beside its inputs.
        ranks: whose collectives it calls.
    """

    def __init__(
        self,
        function: Callable[..., tuple[Tensor, ...]],
        memory: Callable[[], Iterable[Tensor]],
        ranks: RankGroup,
    ) -> None:
        self._function, self._memory, self._ranks = function, memory, ranks
        self._key: object = None
        self._calls = 0
        self._fails = False
        self._recorded: _Recording | None = None

    def __call__(self, *given: Tensor | None) -> tuple[Tensor, ...]:
        """What the function returns for tensors, or None in their places."""
        if self._fails:
            return self._function(*given)
        key = (
            *(None if each is None else (each.shape, each.dtype) for each in given),
            *(each.data_ptr() for each in self._memory()),
        )
        if key != self._key:
            self._key, self._calls, self._recorded = key, 0, None
        self._calls += 1
        if self._calls <= _CALLS_BEFORE:
            return self._function(*given)
        if self._recorded is None:
            try:
                self._recorded = _Recording(self._function, given, self._ranks)
            except RuntimeError as error:
                # Nothing has been computed yet, and nothing but time depends on it.
                logger.warning("%s: %s", NOT_RECORDED, first_line(error))
                self._fails = True
                return self._function(*given)
        return self._recorded.replay(given)


class _Recording:
    """The function's kernels over memory of their own, in pieces between its collectives."""

    def __init__(self, function: Callable[..., tuple[Tensor, ...]], given: Given, ranks: RankGroup) -> None:
        self._pieces: list[Callable[[], Any]] = []
        self._pool = torch.cuda.graph_pool_handle()
        # On the stream that replays will run on, whose memory this is.
        self._given = [None if each is None else each.detach().clone() for each in given]
        device = next(each.device for each in given if each is not None)
        # A stream of its own: torch 2.12 gives cuBLAS's workspace up with the first of a stream's graphs that goes.
        current, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
        side.wait_stream(current)
        with torch.cuda.stream(side), _nothing_collected():
            try:
                self._begin()
                ranks.instead = self._cut
                self._found = function(*self._given)
                self._graph.capture_end()
            except BaseException:
                self._give_up(device)
                raise
            finally:
                ranks.instead = None
        self._pieces.append(self._graph.replay)
        current.wait_stream(side)

    def _begin(self) -> None:
        self._graph = torch.cuda.CUDAGraph()
        # Loader threads and NCCL's own may go on asking the device for memory and events.
        self._graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")

    def _cut(self, collective: Callable[[], object]) -> None:
        """End the graph, put down the collective, and begin the next graph."""
        self._graph.capture_end()
        self._pieces += [self._graph.replay, collective]
        self._begin()

    def _give_up(self, device: torch.device) -> None:
        """End a recording that has failed; torch leaves half of it to others, all its versions before 2.13.

        Its allocator would give back no memory that two streams share, as the loader's images, and its generator would
        refuse to draw.
        """
        with contextlib.suppress(RuntimeError):
            self._graph.capture_end()
        # There is no public name for it.
        with contextlib.suppress(RuntimeError, AttributeError):
            torch._C._cuda_endAllocateToPool(device.index, self._pool)
        generator = torch.cuda.default_generators[device.index]
        generator.graphsafe_set_state(generator.clone_state())

    @torch.no_grad()
    def replay(self, given: Given) -> tuple[Tensor, ...]:
        for mine, theirs in zip(self._given, given, strict=True):
            if mine is not None and theirs is not None:
                mine.copy_(theirs)
        for piece in self._pieces:
            piece()
        # The next replay writes over them.
        return tuple(each.clone() for each in self._found)


@contextlib.contextmanager
def _nothing_collected() -> Iterator[None]:
    """Without garbage collection: CUDA refuses to free another graph or a kernel's module while it records."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
