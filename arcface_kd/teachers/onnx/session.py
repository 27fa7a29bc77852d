"""An ONNX graph run by onnxruntime, for batches of any size."""

import logging
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from arcface_kd.errors import TeacherError, first_line
from arcface_kd.teachers.onnx.graph import MOST_ELEMENTS, OnnxGraph, free_batch
from arcface_kd.teachers.options import Preprocessing
from arcface_kd.teachers.preparation import as_rows, prepared

logger = logging.getLogger(__name__)

_CPU = torch.device("cpu")
_CUDA = "CUDAExecutionProvider"
_INPUT_TYPES: dict[str, torch.dtype] = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(double)": torch.float64,
    "tensor(uint8)": torch.uint8,
}


def _providers(device: torch.device) -> list[tuple[str, dict[str, object]]]:
    """CUDA for a GPU where onnxruntime has it, and the CPU behind it; no CoreML, which rounds to float16."""
    import onnxruntime

    chosen: list[tuple[str, dict[str, object]]] = []
    if device.type == "cuda" and _CUDA in onnxruntime.get_available_providers():
        if hasattr(onnxruntime, "preload_dlls"):
            onnxruntime.preload_dlls()
        chosen.append((_CUDA, {"device_id": torch.cuda.current_device() if device.index is None else device.index}))
    chosen.append(("CPUExecutionProvider", {}))
    return chosen


class OnnxNetwork(nn.Module):
    """An ONNX graph as a module without parameters.

    It begins on the CPU and follows its images to their GPU, which is not known when a teacher is loaded, where
    onnxruntime has CUDA. The session is made anew there, and after pickling.

    Attributes:
        graph: what is computed.
    """

    def __init__(self, graph: OnnxGraph) -> None:
        """Build the session; with a fixed batch size, images are run in portions of it."""
        super().__init__()
        self.graph = graph
        self._asked = _CPU
        self._session: Any = self._new_session()

    def _new_session(self) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Idle threads that spin would take the cores from torch.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # Errors are exceptions; warnings tell of optimisations not taken.
        options.log_severity_level = 4
        providers = _providers(self._asked)
        try:
            # The fallback would print to stdout and try the same providers again.
            session = onnxruntime.InferenceSession(self.graph.model, options, providers=providers, enable_fallback=0)
        # onnxruntime's exceptions share no base class of their own.
        except Exception as error:
            raise TeacherError(f"onnxruntime cannot run the graph: {first_line(error)}") from error
        cuda = session.get_providers()[0] == _CUDA
        if self._asked.type == "cuda" and not cuda:
            why = f"could not start {_CUDA}" if providers[0][0] == _CUDA else "has no CUDA"
            logger.warning("the ONNX teacher runs on the CPU, to which each batch is copied: onnxruntime %s", why)
        kind = session.get_inputs()[0].type
        if kind not in _INPUT_TYPES:
            raise TeacherError(f"the graph takes {kind}; wanted floating-point or uint8 images")
        self._input_type = _INPUT_TYPES[kind]
        self._place = torch.device("cuda", int(str(providers[0][1]["device_id"]))) if cuda else _CPU
        return session

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_session": None}

    def _follow(self, device: torch.device) -> None:
        if device not in (self._asked, self._place) or self._session is None:
            self._asked = device
            self._session = self._new_session()

    def _apply(self, fn: Any, recurse: bool = True) -> "OnnxNetwork":
        self._follow(fn(torch.empty(0, device=self._place)).device)
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Run the graph on prepared images: (B, D) float32 on the CPU, or whatever it makes of them."""
        if images.device.type == "cuda" or self._session is None:
            self._follow(images.device)
        if self._input_type == torch.uint8:
            images = images.round().clamp(0, 255)
        images = images.to(self._input_type)
        size = self.graph.fixed_batch
        if size is None:
            return self._run(images)
        portions = []
        for portion in images.split(size):
            missing = size - len(portion)
            padded = torch.cat([portion, portion[-1:].expand(missing, -1, -1, -1)]) if missing else portion
            portions.append(self._run(padded)[: len(portion)])
        return torch.cat(portions)

    def _run(self, images: Tensor) -> Tensor:
        images = images.to(self._place).contiguous()
        if images.device.type == "cuda":
            # onnxruntime has a stream of its own and must not read the images before torch has written them.
            torch.cuda.current_stream(images.device).synchronize()
        binding = self._session.io_binding()
        element = np.dtype(str(images.dtype).removeprefix("torch."))
        where = images.device
        binding.bind_input(
            self.graph.input_name, where.type, where.index or 0, element.type, tuple(images.shape), images.data_ptr()
        )
        binding.bind_output(self.graph.output_name, "cpu")
        self._session.run_with_iobinding(binding)
        (embeddings,) = binding.copy_outputs_to_cpu()
        if embeddings.dtype.kind != "f":
            raise TeacherError(f"the graph returns {embeddings.dtype}; wanted floating-point embeddings")
        return as_rows(torch.from_numpy(embeddings.astype(np.float32, copy=True)), len(images))


def _agrees(network: OnnxNetwork, wanted: Preprocessing) -> bool:
    """Whether three unlike images embed in one batch as they do one by one."""
    size = wanted.size
    noise = torch.rand((3, 3, size, size), generator=torch.Generator().manual_seed(1))
    images = prepared(noise * 2 - 1, wanted)
    try:
        together = network(images)
        alone = torch.cat([network(image[None]) for image in images])
    # A graph that takes no batch may raise any of onnxruntime's exceptions.
    except Exception:
        return False
    if not alone.numel() or not torch.isfinite(alone).all():
        # Not for the batch size; the teacher's own test reports it.
        return bool(together.shape == alone.shape)
    scale = float(alone.abs().max())
    return together.shape == alone.shape and bool(torch.allclose(together, alone, rtol=1e-3, atol=1e-3 * scale))


def any_batch(graph: OnnxGraph, wanted: Preprocessing) -> OnnxNetwork:
    """A session that takes batches of any size and embeds each image as it would alone.

    The batch size is freed where test images prove it right; else images are run in portions of the declared batch
    size, or one by one where none is declared.
    """
    freed = free_batch(graph)
    try:
        network = OnnxNetwork(freed)
        if _agrees(network, wanted):
            return network
    except TeacherError:
        if freed is graph:
            raise
    if (graph.fixed_batch or 1) * 3 * wanted.size**2 > MOST_ELEMENTS:
        raise TeacherError(f"the graph takes {graph.fixed_batch} images at a time and no others; wanted any number")
    logger.warning("the ONNX teacher's batch size cannot be freed; images are embedded in portions of it, more slowly")
    return OnnxNetwork(replace(graph, fixed_batch=graph.fixed_batch or 1))
