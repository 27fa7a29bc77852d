"""A teacher cut in two at a feature map: the trunk makes the map of images, the tail the embedding of a map.

The tail is frozen and differentiable in the map. Checkpoints, modules and ONNX graphs are cut alike; that all of the
embedding passes through the place is tried on images.
"""

from collections.abc import Callable
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from arcface_kd.backbones.face_backbone import FaceBackbone
from arcface_kd.backbones.feature_taps import MapPlace, find_map
from arcface_kd.errors import ConfigError, TeacherError, first_line
from arcface_kd.teachers.base import Teacher
from arcface_kd.teachers.onnx.session import OnnxNetwork
from arcface_kd.teachers.onnx.torch_module import TorchGraph
from arcface_kd.teachers.preparation import TOLERANCE


class _Cut(Protocol):
    @property
    def network(self) -> nn.Module: ...

    def trunk(self, prepared: Tensor) -> Tensor: ...

    def tail(self, feature_map: Tensor) -> Tensor: ...


class _CutBackbone:
    """A backbone of this package at its last map."""

    def __init__(self, network: FaceBackbone) -> None:
        self.network = network
        self.trunk, self.tail = network.feature_map, network.tail


class _Passed(Exception):
    """The map has been found: the rest of the network need not run."""


class _CutModule:
    """Any module at a place that is known by name.

    The tail is the network itself, with the given map put in the place. What lies before the place is run on one empty
    image, or on a whole batch of them where the network needs as many images as maps.
    """

    def __init__(self, network: nn.Module, place: MapPlace, size: int) -> None:
        self.network, self.place, self.size = network, place, size
        self.counts_images = False
        self._dimensions = 4

    def trunk(self, prepared: Tensor) -> Tensor:
        found: list[Tensor] = []

        def take(value: Any) -> None:
            found.append(self.place.to_map(value))
            self._dimensions = value.dim()
            raise _Passed

        try:
            with _hook(self.network, self.place, take):
                self.network(prepared)
        except _Passed:
            return found[0]
        raise TeacherError(f"it does not pass through {self.place}")

    def tail(self, feature_map: Tensor) -> Tensor:
        value = self.place.from_map(feature_map, self._dimensions)
        if self.place.is_input:
            return cast(Tensor, self.network.get_submodule(self.place.module)(value))
        count = feature_map.shape[0] if self.counts_images else 1
        empty = feature_map.new_zeros(count, 3, self.size, self.size)
        with _hook(self.network, self.place, lambda _: value):
            return cast(Tensor, self.network(empty))


def _hook(network: nn.Module, place: MapPlace, see: Callable[[Any], Any]) -> Any:
    """A hook in a place for the time of a ``with`` block; what it returns replaces the value."""
    module = network.get_submodule(place.module)
    if place.is_input:
        return module.register_forward_pre_hook(lambda _, inputs: see(inputs[0]))
    return module.register_forward_hook(lambda _, inputs, output: see(output))


class _CutGraph:
    """A torch graph at a tensor that is known by name."""

    def __init__(self, network: TorchGraph, name: str) -> None:
        self.network: nn.Module = network
        self.trunk = lambda prepared: network.run({network.graph.input_name: prepared}, [name])[0]
        self.tail = lambda feature_map: network.behind(name, feature_map)


class CutTeacher:
    """A teacher's trunk and tail. Neither is a module: they stay out of every ``state_dict``, optimiser and DDP.

    Attributes:
        map_shape: (C, H, W) of the map.
        embedding_size: dimension Dt.
        place: where the cut is, in words.
    """

    def __init__(self, teacher: Teacher, cut: _Cut, place: str) -> None:
        """Cut a teacher, and try that its halves make it up."""
        self._teacher, self._cut, self.place = teacher, cut, place
        self.embedding_size = teacher.embedding_size
        cut.network.eval().requires_grad_(False)
        self.map_shape = self._tried()

    @torch.no_grad()
    def feature_map(self, images: Tensor) -> Tensor:
        """The teacher's map (B, C, H, W), float32, of images as the student sees them."""
        if len(images) == 0:
            return images.new_zeros((0, *self.map_shape), dtype=torch.float32)
        self._ready(images.device)
        with self._teacher.autocast(images.device):
            return self._cut.trunk(self._teacher.prepare(images.float())).float()

    def tail(self, feature_map: Tensor) -> Tensor:
        """The teacher's embedding (B, Dt) of a map, float32, not normalised, with gradient in the map."""
        if len(feature_map) == 0:
            return feature_map.flatten(1).sum(1, keepdim=True).expand(0, self.embedding_size)
        self._ready(feature_map.device)
        with self._teacher.autocast(feature_map.device):
            return self._cut.tail(feature_map).flatten(1).float()

    def _ready(self, device: torch.device) -> None:
        network = self._cut.network
        if network.training:
            network.eval()
        weight = next(network.parameters(), None)
        if weight is not None and weight.device != device:
            network.to(device)

    def _tried(self) -> tuple[int, int, int]:
        """The map's shape; raise unless the tail makes of three images' maps what the teacher makes of the images."""
        size = self._teacher.preprocessing.size
        images = torch.rand((3, 3, size, size), generator=torch.Generator().manual_seed(2)) * 2 - 1
        images = images.to(self._teacher.device or "cpu")
        wanted = normalize(self._teacher(images))
        cut, fault = self._cut, ""
        # A network that counts its images is found out by its tail failing on one empty image for three maps.
        for counts_images in (False, True) if isinstance(cut, _CutModule) else (False,):
            if isinstance(cut, _CutModule):
                cut.counts_images = counts_images
            try:
                found = self.feature_map(images)
                with torch.no_grad():
                    met = normalize(self.tail(found))
            except ConfigError as error:
                raise TeacherError(f"teacher {self._teacher.description}: {error}") from error
            # Anybody's network, run from the middle: it may raise anything.
            except Exception as error:
                fault = f"what lies behind it cannot be run alone: {first_line(error)}"
                continue
            if met.shape == wanted.shape and (met - wanted).abs().max() < TOLERANCE[self._teacher.precision]:
                channels, height, width = found.shape[1:]
                return channels, height, width
            fault = "the embedding is not made of it alone"
        where = f"teacher {self._teacher.description} cannot be cut at {self.place}"
        raise TeacherError(f"{where}: {fault}; name a place that all of the embedding passes through")


def cut_teacher(teacher: Teacher, name: str | None = None, tap: int = 0) -> CutTeacher:
    """Cut a teacher at a feature map.

    Args:
        teacher: from a checkpoint, a module or an ONNX file.
        name: the module whose output is the map (``layer4``), or the ONNX graph's tensor; None finds the map: in the
            networks of this package and of arcface_torch by their modules' names, in an ONNX graph the last tensor
            (B, C, H, W) larger than 1x1 that all of the embedding passes through.
        tap: which map is found: 0 is the last, 1 the last one that is larger in height and width, and so on.

    Raises:
        TeacherError: no such place, or not all of the embedding passes through it.
    """
    network = teacher.network
    where = f"teacher {teacher.description}"
    if isinstance(network, OnnxNetwork | TorchGraph):
        try:
            graph = network if isinstance(network, TorchGraph) else TorchGraph(network.graph).eval()
            graph.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            tensor = _graph_map(graph, teacher.preprocessing.size, name, tap)
        except TeacherError as error:
            raise TeacherError(f"{where}: {error}") from error
        return CutTeacher(teacher, _CutGraph(graph, tensor), f"the tensor {tensor!r}")
    if not isinstance(network, nn.Module):
        raise TeacherError(f"{where} is a function and cannot be cut at a feature map; give the module itself")
    if isinstance(network, FaceBackbone) and name is None and tap == 0:
        return CutTeacher(teacher, _CutBackbone(network), "its last feature map")
    try:
        place = find_map(network, name, tap)
    except ConfigError as error:
        raise TeacherError(f"{where}: {error}") from error
    return CutTeacher(teacher, _CutModule(network, place, teacher.preprocessing.size), str(place))


@torch.no_grad()
def _graph_map(graph: TorchGraph, size: int, name: str | None, tap: int) -> str:
    """The tensor of a graph that is its map."""
    bottlenecks = graph.bottlenecks()
    device = next((weight.device for weight in graph.parameters()), None)
    values = graph.run({graph.graph.input_name: torch.zeros(2, 3, size, size, device=device)}, bottlenecks)
    shapes = {each: tuple(value.shape) for each, value in zip(bottlenecks, values, strict=True)}
    maps = {each: shape for each, shape in shapes.items() if len(shape) == 4 and shape[2] * shape[3] > 1}
    listed = ", ".join(f"{each} {shape[1]}x{shape[2]}x{shape[3]}" for each, shape in maps.items()) or "none"
    if name is not None:
        if name not in maps:
            raise TeacherError(f"the embedding passes through no feature map {name!r}; there are {listed}")
        return name
    # The last map of each size, from the embedding backwards.
    last = {shape[2:]: each for each, shape in maps.items()}
    places = list(reversed(last.values()))
    if not 0 <= tap < len(places):
        raise TeacherError(f"the graph has no feature map {tap} sizes before its last; there are {listed}")
    return places[tap]
