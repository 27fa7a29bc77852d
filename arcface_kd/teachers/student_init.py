"""A run's student that starts from a file: a checkpoint's weights, or an ONNX graph that is trained itself."""

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from arcface_kd.errors import TeacherError, first_line
from arcface_kd.system.device import autocast_dtype
from arcface_kd.teachers.base import Teacher, load_teacher
from arcface_kd.teachers.checkpoint import CheckpointSource
from arcface_kd.teachers.onnx.graph import OnnxGraph
from arcface_kd.teachers.onnx.session import OnnxNetwork
from arcface_kd.teachers.onnx.torch_module import TorchGraph
from arcface_kd.teachers.options import Preprocessing, TeacherOptions
from arcface_kd.teachers.preparation import prepared


class TrainedGraph(TorchGraph):
    """An ONNX graph as a backbone: its embeddings are (B, D) in float32.

    ``fp16`` autocasts up to the embedding layer, float16 on GPUs and bfloat16 on CPUs that have it, as in backbones.
    """

    def __init__(self, graph: OnnxGraph, *, fp16: bool = False) -> None:
        super().__init__(graph)
        self.fp16 = fp16
        self._layer_input = self.embedding_layer_input()

    def forward(self, images: Tensor) -> Tensor:
        """Embed images (B, 3, S, S) that are prepared as the graph wants them."""
        device = images.device
        narrow = autocast_dtype(device) if self.fp16 else None
        # The network's precision is its own, whatever autocast is around it.
        in_full = torch.autocast(device.type, enabled=False)
        if narrow is None or self._layer_input is None:
            with in_full:
                return super().forward(images).flatten(1)
        with torch.autocast(device.type, dtype=narrow):
            (activation,) = self.run({self.graph.input_name: images}, [self._layer_input])
        with in_full:
            return self.behind(self._layer_input, activation.float()).flatten(1)


def start_from(
    source: str | os.PathLike[str],
    options: TeacherOptions | Mapping[str, object] | None,
    build: Callable[[], nn.Module],
    embedding_size: int,
    *,
    name: str = "",
    fp16: bool = False,
) -> tuple[nn.Module, Preprocessing]:
    """A network in training mode with the weights that a file holds, and how it wants its images.

    A checkpoint is of the network that ``build`` builds; an ONNX file brings its own, which ``fp16`` autocasts. The
    name of the run's network says what a checkpoint is of, where it has a colon and tensors do not tell.
    """
    options = TeacherOptions.of(options)
    if ":" in name and options.network is None and CheckpointSource.accepts(source):
        options = replace(options, network=name)
    teacher = load_teacher(source, options)
    if teacher.embedding_size != embedding_size:
        size = teacher.embedding_size
        met = f"{source} has embeddings of dimension {size}"
        raise TeacherError(f"{met} and the run {embedding_size}: set embedding_size={size}")
    network = teacher.network
    if isinstance(network, OnnxNetwork | TorchGraph):
        return TrainedGraph(network.graph, fp16=fp16).train(), teacher.preprocessing
    if not isinstance(network, nn.Module):
        raise TeacherError(f"{source}: a run starts from a checkpoint or an ONNX file, not from {teacher.description}")
    stated = options.channels, options.mean, options.std
    if teacher.preprocessing != Preprocessing() and stated == (None, None, None):
        raise TeacherError(
            f"{source} wants {teacher.preprocessing}, and a student is judged on RGB, (x - 127.5) / 127.5: to have "
            "it learn that, give --kd-option teacher.channels=rgb teacher.mean=127.5 teacher.std=127.5"
        )
    built = build()
    try:
        built.load_state_dict(network.state_dict())
    except RuntimeError as error:
        raise TeacherError(f"{source} does not fit the run's network: {first_line(error)}") from error
    return built, teacher.preprocessing


def prepare_images(network: nn.Module, preprocessing: Preprocessing) -> None:
    """Have a network prepare the student's images as it wants them; its state stays as it is."""
    if preprocessing == Preprocessing():
        return

    def prepare(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return prepared(arguments[0], preprocessing), *arguments[1:]

    network.register_forward_pre_hook(prepare)


def trained_graph_file(teacher: Teacher, state: Mapping[str, Tensor]) -> bytes:
    """The bytes of the ONNX file, for any batch size, of a trained graph."""
    network = teacher.network
    if not isinstance(network, OnnxNetwork | TorchGraph):
        raise TeacherError(f"{teacher.description} is no ONNX graph")
    graph = TrainedGraph(network.graph)
    try:
        with torch.no_grad():
            graph.load_state_dict(state)
    except RuntimeError as error:
        raise TeacherError(f"the trained weights do not fit {teacher.description}: {first_line(error)}") from error
    return graph.serialised()
