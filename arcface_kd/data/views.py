"""Degraded views of a face, as cameras see them: pure functions of an image and the random numbers of its view.

``crop``, ``lowres`` and ``photometric`` have the parameters of CVLface's and AdaFace's training, where each has the
probability 0.2:

    crop         area U(0.2, 1) of the image, ratio of the sides 3/4 to 4/3 (uniform in the logarithm), in its place
    lowres       side times U(0.2, 1), there and back, each by one of nearest, linear, area and cubic
    photometric  brightness b, contrast c and saturation s, U(0.5, 1.5) each; no hue

Otherwise than there, Lanczos is left out of the interpolations: it differs from cubic by 1 grey level and takes OpenCV
seven times as long. And the photometric changes are one map, b (c (s x + (1 - s) g) + (1 - c) m) with a pixel's grey g
and the image's mean grey m, clipped at its end; there each is clipped and rounded, in an order that is drawn.

``affine`` and ``mix`` are chosen here:

    affine       turn of U(-10, 10) degrees, scale U(0.9, 1.1), shift of U(-4, 4) pixels of 112 each way, black outside
    mix          lam x + (1 - lam) z with lam U(0, 1) and z any image of the data set
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from arcface_kd.config.augmentation import Augmentation
from arcface_kd.data.sampler import uniforms

_INTERPOLATIONS = (cv2.INTER_NEAREST, cv2.INTER_LINEAR, cv2.INTER_AREA, cv2.INTER_CUBIC)
# Of red, green and blue, as OpenCV weighs them.
_GREY = (0.299, 0.587, 0.114)
_CROP_TRIES = 10
# In this order: faces, alignment, picture.
_CHANGES = ("mix", "affine", "crop", "lowres", "photometric")
# Whether each happens, and then at most so many numbers for each.
_DRAWS = len(_CHANGES) + sum((2, 4, 2 * _CROP_TRIES + 2, 3, 3))


def draws_of(seeds: Sequence[int]) -> NDArray[Any]:
    """The random numbers of the views with these seeds, (N, K) in [0, 1)."""
    return uniforms(np.array(seeds, dtype=np.uint64), _DRAWS)


def are_degraded(draws: NDArray[Any], augmentation: Augmentation) -> NDArray[Any]:
    """Which of the views with these random numbers (N, K) differ from their images, bool (N,)."""
    chances = np.array([getattr(augmentation, name) for name in _CHANGES])
    found: NDArray[Any] = np.any(draws[:, : len(_CHANGES)] < chances, axis=1)
    return found


def view_of(
    image: NDArray[Any], draws: NDArray[Any], augmentation: Augmentation, other: Callable[[float], NDArray[Any]]
) -> tuple[NDArray[Any], bool]:
    """Degrade an image (H, W, 3) by the view's random numbers (K,), and say whether it is a mixture.

    ``other`` gives the image at a place of the data set, from 0 (the first) to 1, for a mixture.
    """
    numbers = iter(draws.tolist())
    mix, *changes = [next(numbers) < getattr(augmentation, name) for name in _CHANGES]
    if mix:
        share = next(numbers)
        image = cv2.addWeighted(image, share, other(next(numbers)), 1 - share, 0)
    for happens, change in zip(changes, (_moved, _cropped, _small_and_back, _relit), strict=True):
        if happens:
            image = change(image, numbers)
    return image, mix


def _between(draws: Iterator[float], low: float, high: float) -> float:
    return low + (high - low) * next(draws)


def _moved(image: NDArray[Any], draws: Iterator[float]) -> NDArray[Any]:
    height, width = image.shape[:2]
    turn, scale = _between(draws, -10, 10), _between(draws, 0.9, 1.1)
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), turn, scale)
    shift = np.zeros_like(matrix)
    shift[:, 2] = _between(draws, -4, 4) * width / 112, _between(draws, -4, 4) * height / 112
    return cv2.warpAffine(image, matrix + shift, (width, height))


def _cropped(image: NDArray[Any], draws: Iterator[float]) -> NDArray[Any]:
    height, width = image.shape[:2]
    for _ in range(_CROP_TRIES):
        area = height * width * _between(draws, 0.2, 1)
        ratio = math.exp(_between(draws, math.log(3 / 4), math.log(4 / 3)))
        tall, wide = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if tall <= height and wide <= width:
            top, left = int(next(draws) * (height - tall + 1)), int(next(draws) * (width - wide + 1))
            part = np.s_[top : top + tall, left : left + wide]
            cropped = np.zeros_like(image)
            cropped[part] = image[part]
            return cropped
    return image


def _small_and_back(image: NDArray[Any], draws: Iterator[float]) -> NDArray[Any]:
    height, width = image.shape[:2]
    share = _between(draws, 0.2, 1)
    small = _resized(image, (int(share * width), int(share * height)), draws)
    return _resized(small, (width, height), draws)


def _resized(image: NDArray[Any], size: tuple[int, int], draws: Iterator[float]) -> NDArray[Any]:
    interpolation = _INTERPOLATIONS[int(next(draws) * len(_INTERPOLATIONS))]
    if interpolation == cv2.INTER_AREA and size[0] < image.shape[1]:
        # By area, OpenCV takes a third of the time where the side is a whole multiple of what it becomes.
        times = max(2, min(4, image.shape[1] // size[0]))
        image = cv2.resize(image, (times * size[0], times * size[1]), interpolation=cv2.INTER_LINEAR)
    return cv2.resize(image, size, interpolation=interpolation)


def _relit(image: NDArray[Any], draws: Iterator[float]) -> NDArray[Any]:
    brightness, contrast, saturation = (_between(draws, 0.5, 1.5) for _ in range(3))
    both, mean = brightness * contrast, cv2.mean(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[0]
    own, offset = both * saturation, brightness * (1 - contrast) * mean
    red, green, blue = (both * (1 - saturation) * share for share in _GREY)
    # numpy's ways to build so small a matrix take longer than the map.
    rows = (own + red, green, blue, offset), (red, own + green, blue, offset), (red, green, own + blue, offset)
    return cv2.transform(image, np.array(rows))
