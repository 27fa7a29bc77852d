"""The normalisation that an ONNX graph does itself, before its first layer: found by trying, not by nodes' names.

The image is followed through arithmetic and changes of layout, and what comes out is computed for a few images. Where
each channel is ``a x + b`` of one channel of the input, that is a normalisation. Its constants tell which input it is
for, since its results have one of a few usual ranges.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arcface_kd.teachers.onnx.form import constants, keep_only
from arcface_kd.teachers.onnx.graph import MOST_ELEMENTS, OnnxGraph
from arcface_kd.teachers.options import Preprocessing, Triple, in_words

_FOLLOWED = frozenset(
    (
        *("Sub", "Add", "Mul", "Div", "Neg", "Sum", "BatchNormalization", "Clip", "Max", "Min", "ImageScaler"),
        *("Cast", "CastLike", "Identity", "Dropout", "Expand", "Resize", "Upsample"),
        *("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Gather", "Slice", "Split", "Concat"),
        *("QuantizeLinear", "DequantizeLinear", "QLinearAdd", "QLinearMul"),
    )
)
_MEASURES = frozenset(("Shape", "Size"))
# What a graph may be shown, as (pixel - mean) / std; a tie goes to the first.
_RANGES: Mapping[str, tuple[float, float]] = {
    "0..255": (0.0, 1.0),
    "0..1": (0.0, 255.0),
    "-1..1": (127.5, 127.5),
    "-127.5..127.5": (127.5, 1.0),
}
# What every other teacher is shown: taken where nothing tells another range clearly.
_DEFAULT = "-1..1"
# Mean and std in pixel values that networks are trained with: faces, 0..1, pixels as they are, -0.5..0.5, ImageNet's
# or a batch norm's, ImageNet's mean alone.
_USUAL = ((127.5, 127.5), (0.0, 255.0), (0.0, 1.0), (127.5, 255.0), (116.0, 57.7), (127.5, 1.0))
_MEAN_UNIT = 60.0
_TOO_FAR = 1.2
_TIE = 0.1
# Red is the brightest channel of skin, and of ImageNet, by some ten steps.
_REDDER = 4.0
# By ONNX's numbers of element types.
_IMAGE_TYPES = {1: np.float32, 2: np.uint8, 10: np.float16, 11: np.float64}
# 8-bit graphs round to a 255th of the range.
_TOLERANCE = 0.02


@dataclass(frozen=True)
class InputNormalisation:
    """What a graph does to its image: channel c becomes ``scale[c] x + shift[c]``, x being channel ``order[c]``."""

    scale: Triple  # per channel, not 0
    shift: Triple  # per channel
    order: tuple[int, int, int] = (0, 1, 2)  # which channel of the input each one is made of
    takes_bytes: bool = False  # the input is whole numbers 0..255

    @property
    def input_range(self) -> str | None:
        """The range that the input should have, a key such as ``0..255``; None where the constants do not tell."""
        if self.takes_bytes:
            return "0..255"
        if min(self.scale) <= 0:
            return None
        # Rounded, so that the last digits of a constant break no tie.
        distances = {name: round(self._distance(name), 3) for name in _RANGES}
        nearest = min(_RANGES, key=lambda name: distances[name])
        if distances[nearest] > _TOO_FAR:
            return None
        return _DEFAULT if distances[_DEFAULT] <= distances[nearest] + _TIE else nearest

    def _overall(self, name: str) -> tuple[list[float], list[float]]:
        """Mean and std in pixel values of range and graph together, per channel."""
        mean, std = _RANGES[name]
        pairs = list(zip(self.scale, self.shift, strict=True))
        return [mean - b * std / a for a, b in pairs], [std / a for a, _ in pairs]

    def _distance(self, name: str) -> float:
        means, stds = self._overall(name)
        return min(
            sum(abs(math.log(s / std)) + abs(m - mean) / _MEAN_UNIT for m, s in zip(means, stds, strict=True)) / 3
            for mean, std in _USUAL
        )

    def preprocessing(self, size: int) -> Preprocessing:
        """The input with which preparation and graph are what the network was trained with."""
        name = self.input_range
        mean, std = _RANGES[name or _DEFAULT]
        means = self._overall(name)[0] if name is not None else [0.0] * 3
        trained_on_bgr = means[2] - means[0] > _REDDER
        turned = self.order == (2, 1, 0)
        return Preprocessing("bgr" if trained_on_bgr != turned else "rgb", (mean,) * 3, (std,) * 3, size)

    @property
    def is_identity(self) -> bool:
        """Whether nothing is done to the image."""
        same = np.allclose(self.scale, 1, atol=1e-3) and np.allclose(self.shift, 0, atol=1e-3)
        return bool(same) and self.order == (0, 1, 2)

    def __str__(self) -> str:
        if self.is_identity:
            return "takes whole numbers 0..255"
        pairs = list(zip(self.scale, self.shift, strict=True))
        formula = f"(x - {_in_words(-b / a for a, b in pairs)}) / {_in_words(1 / a for a, _ in pairs)}"
        turned = "" if self.order == (0, 1, 2) else ", channels swapped"
        return f"normalises inside: {formula} of {self.input_range or 'a range that its numbers do not tell'}{turned}"


def _in_words(values: Iterable[float]) -> str:
    red, green, blue = (float(f"{value:.5g}") + 0.0 for value in values)
    return in_words((red, green, blue))


def find_normalisation(graph: OnnxGraph, size: int) -> InputNormalisation | None:
    """What a graph does to its image before the first layer; None where nothing, or not the same for every pixel."""
    import onnx

    model = onnx.load_model_from_string(graph.model)
    kind = _IMAGE_TYPES.get(model.graph.input[0].type.tensor_type.elem_type)
    if kind is None:
        return None
    takes_bytes = kind == np.uint8
    places = _leading_values(model, graph.input_name)
    if places and (graph.fixed_batch or 1) * 3 * size * size <= MOST_ELEMENTS:
        for found in _tried(model, graph, places, size, kind):
            if found is not None:
                normalisation = InputNormalisation(*found, takes_bytes)
                return None if normalisation.is_identity and not takes_bytes else normalisation
    return InputNormalisation((1.0,) * 3, (0.0,) * 3, takes_bytes=True) if takes_bytes else None


def _leading_values(model: Any, image: str) -> list[str]:
    """Values in front of the first layer that all of the image passes through, in order."""
    held = constants(model)
    last: dict[str, int] = {}
    for number, node in enumerate(model.graph.node):
        if node.op_type not in _MEASURES:
            last.update(dict.fromkeys(node.input, number))
    waiting, followed = {image}, {image}
    found: list[str] = []
    for number, node in enumerate(model.graph.node):
        if not waiting.intersection(node.input) or node.op_type in _MEASURES:
            continue
        if _is_followed(node, held) and waiting.intersection(node.input) <= followed:
            followed.update(node.output)
        waiting.update(node.output)
        waiting = {name for name in waiting if last.get(name, -1) > number}
        if not waiting & followed:
            break
        if len(waiting) == 1:
            found.extend(waiting & followed)
    return list(dict.fromkeys(found))


def _is_followed(node: Any, held: Mapping[str, Any]) -> bool:
    if node.op_type in ("Conv", "MatMul"):
        # A layer of one pixel and three channels may be no more than factors and a swap.
        shape = next((list(held[name].dims) for name in node.input[1:2] if name in held), [])
        return shape[:1] == [3] and set(shape[1:]) <= {1, 3}
    return node.op_type in _FOLLOWED


_Found = tuple[Triple, Triple, tuple[int, int, int]]


def _tried(model: Any, graph: OnnxGraph, places: list[str], size: int, kind: Any) -> list[_Found | None]:
    """What each of the places holds, the last one first."""
    import onnxruntime

    keep_only(model, places)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    # Black, the three channels, another colour, and noise.
    colours = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [0.2, 0.8, 0.4]])
    noise = np.random.default_rng(0).random((1, 3, size, size))
    probes = np.concatenate([np.tile(colours[:, :, None, None], (size, size)), noise])
    answers: dict[str, list[_Found | None]] = {place: [] for place in places}
    try:
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"], enable_fallback=0
        )
        # A graph that clips its input to 0..1 or rounds it to 8 bits may answer to small numbers alone.
        for brightest in (255, 1):
            shown = np.floor(probes * brightest).astype(kind) if kind == np.uint8 else (probes * brightest).astype(kind)
            batches = [np.repeat(image[None], graph.fixed_batch or 1, axis=0) for image in shown]
            results = [session.run(places, {graph.input_name: batch}) for batch in batches]
            for place, name in enumerate(places):
                answers[name].append(_affine(shown.astype(np.float64), [result[place] for result in results]))
    # A graph that onnxruntime cannot run is refused when it is run as a whole.
    except Exception:
        return []
    return [next((each for each in answers[name] if each is not None), None) for name in reversed(places)]


def _affine(shown: NDArray[Any], results: list[NDArray[Any]]) -> _Found | None:
    """Scale, shift and order of the channels, where that is all that was done to the probes."""
    axes = [axis for axis in (1, 3) if results[0].ndim == 4 and results[0].shape[axis] == 3]
    for axis in axes:
        maps = np.stack([np.moveaxis(result[0].astype(np.float64), axis - 1, 0) for result in results])
        brightest = shown[1].max()
        levels = maps[:4].mean((2, 3))
        shift, matrix = levels[0], (levels[1:] - levels[0]).T / brightest
        order = np.abs(matrix).argmax(1)
        scale = matrix[np.arange(3), order]
        # Noise tells whether pixels stay where they are; a graph that scales the image shows it in colours alone.
        told = len(shown) if maps.shape == shown.shape else len(shown) - 1
        colours = shown[:told] if told == len(shown) else shown[:told, :, :1, :1]
        wanted = scale[:, None, None] * colours[:, order] + shift[:, None, None]
        reach = np.abs(scale).max() * brightest
        blind = np.abs(scale).min() * brightest <= _TOLERANCE * reach
        if not blind and sorted(order) == [0, 1, 2] and np.abs(maps[:told] - wanted).max() <= _TOLERANCE * reach:
            a, b = (tuple(float(f"{value:.6g}") for value in values) for values in (scale, shift))
            return (a[0], a[1], a[2]), (b[0], b[1], b[2]), (int(order[0]), int(order[1]), int(order[2]))
    return None
