"""Quantisation-aware fine-tuning: the network, rounded as its int8 file will be, learns its own float embeddings.

Step sizes of activations are learned with the weights, after Esser et al., "Learned Step Size Quantization" (ICLR 2020,
arXiv 1902.08153); rounding passes the gradient on. The student as it is teaches the student in 8 bits by the squared
distance of unit embeddings, so that no labels are wanted.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from arcface_kd.export.int8 import QUANTIZED, kept_in_float
from arcface_kd.losses.embedding_losses import squared_distance
from arcface_kd.system.device import default_device
from arcface_kd.teachers.onnx.graph import OnnxGraph
from arcface_kd.teachers.onnx.torch_module import TorchGraph

_WEIGHT_RATE, _SCALE_RATE = 1e-5, 1e-2
_BATCH = 16
_LEVELS = 255
_LEAST_SCALE = 1e-12

Ranges = Mapping[str, tuple[float, float]]
"""The least and the largest value of activations, by name."""


class FakeQuantizedGraph(TorchGraph):
    """An ONNX graph whose weights and activations are rounded where :func:`arcface_kd.export.int8.quantize` does it.

    It is in evaluation mode. Weights are int8 with a scale for each output channel; activations, the inputs and outputs
    of the same nodes, uint8 with a scale each, which is learned and begins with the mean range of batches. The graph is
    in float32, ``leading`` as `quantize` takes it; ``shown`` are (N, 3, S, S) images, prepared as the graph wants them.
    """

    def __init__(self, graph: OnnxGraph, leading: float, shown: Tensor) -> None:
        super().__init__(graph)
        import onnx

        model = onnx.load_model_from_string(self.graph.model)
        kept = kept_in_float(model, leading)
        nodes = [node for node in model.graph.node if node.op_type in QUANTIZED and node.name not in kept]
        self._axes = {node.input[1]: _output_axis(node) for node in nodes if node.input[1] in self._places}
        rounded = {name for node in nodes for name in (*node.input[:2], *node.output)} - self._axes.keys()
        self._met: dict[str, list[Tensor]] = {name: [] for name in sorted(rounded)}
        self._scales: dict[str, int] = {}
        self._zeros: dict[str, int] = {}
        self.log_scales = nn.ParameterList()
        # Batch norms have their statistics, here and while it is tuned.
        self.eval()
        with torch.no_grad():
            for images in shown.split(_BATCH):
                self(images)
        for name, met in self._met.items():
            # An image that is rounded itself is given, not returned by a node.
            if met:
                low, high = torch.stack(met).mean(0).unbind()
                scale = ((high - low) / _LEVELS).clamp_min(_LEAST_SCALE)
                self._scales[name], self._zeros[name] = len(self.log_scales), int((-low / scale).round())
                self.log_scales.append(nn.Parameter(scale.log()))
        self._met = {}

    def weight(self, name: str) -> Tensor:
        """A weight, rounded where the file has it in 8 bits."""
        weight = super().weight(name)
        if name not in self._axes:
            return weight
        axis = self._axes[name]
        others = [dimension for dimension in range(weight.dim()) if dimension != axis]
        scale = weight.detach().abs().amax(others).clamp_min(_LEAST_SCALE) / 127
        zero = torch.zeros_like(scale, dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(weight, scale, zero, axis, -127, 127)

    def activation(self, name: str, value: Tensor) -> Tensor:
        """An activation, rounded where the file has it in 8 bits."""
        if name in self._met:
            self._met[name].append(torch.stack([value.amin().clamp_max(0), value.amax().clamp_min(0)]))
        if name not in self._scales:
            return value
        scale, zero = self.log_scales[self._scales[name]].exp(), self._zeros[name]
        steps = (value / scale + zero).clamp(0, _LEVELS)
        rounded: Tensor = (steps + (steps.round() - steps).detach() - zero) * scale
        return rounded

    def ranges(self) -> dict[str, tuple[float, float]]:
        """What the activations' scales have come to."""
        found = {}
        for name, place in self._scales.items():
            scale, zero = float(self.log_scales[place].detach().exp()), self._zeros[name]
            found[name] = (-zero * scale, (_LEVELS - zero) * scale)
        return found


def _output_axis(node: Any) -> int:
    """The axis of a weight that its output channels are along."""
    transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    return 0 if node.op_type == "Conv" or transposed else 1


def tune(
    model: bytes,
    shown: NDArray[Any],
    batch: Callable[[int], NDArray[Any]],
    teacher: Callable[[Tensor], Tensor],
    *,
    leading: float,
    steps: int,
) -> tuple[bytes, Ranges]:
    """Fine-tune a network for `arcface_kd.export.int8.quantize`; batch norms keep their statistics.

    Args:
        model: a serialised ONNX model in float32, ``data`` to ``embedding``, its nodes named.
        shown: float32 (N, 3, 112, 112), prepared as the network wants them; the first ranges are theirs.
        batch: the images of a step by its number, prepared alike.
        teacher: images to (B, D) embeddings, those of the network in float32.
        leading: as `quantize` takes it.
        steps: of Adam, its rate falling to 0; at least 1.

    Returns:
        The serialised model, in float32 with other weights, and the ranges that go with it. A TeacherError names an
        operator that torch has no counterpart of here.
    """
    device = default_device()
    graph = OnnxGraph(model, "data", "embedding", size=112, fixed_batch=None, parameter_count=0, digest="")
    network = FakeQuantizedGraph(graph, leading, torch.from_numpy(shown)).to(device)
    scales = list(network.log_scales.parameters())
    groups = [{"params": list(network.weights.parameters()), "lr": _WEIGHT_RATE}, {"params": scales, "lr": _SCALE_RATE}]
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    for step in tqdm(range(steps), desc="tuning for 8 bits", unit="step", disable=None):
        images = torch.from_numpy(batch(step)).to(device)
        with torch.no_grad():
            wanted = teacher(images)
        loss = squared_distance(network(images), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.serialised(), network.ranges()
