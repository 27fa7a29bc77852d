"""A small drawing surface in face units: smooth curves, fills, ribbons and soft masks.

Everything is measured in *face units*: one unit is one pixel of the aligned 112 x 112 crop, the origin is the nose
tip of the average face, x runs to the viewer's right, y down. The field is larger than the crop, so that a turned,
shifted or shrunk head still has its hair and ears. A canvas is any square array over the field; the number of its rows
sets its resolution.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, cast

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

FIELD_LEFT, FIELD_TOP, FIELD_SIZE = -80, -94, 160
"""The square of the plane that is drawn, in face units."""

SIDE = 280
"""Rows of the painted canvas: 1.75 a unit, finer than the crop so that lids and lashes survive the warp to the crop."""

_SUBPIXEL_BITS = 4
_CURVE_SAMPLES = 5
_NOTHING = 1 / 512
_LEVELS_A_UNIT = np.float32(36)
_CORNER = np.array([FIELD_LEFT, FIELD_TOP], np.float32)

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Colour = NDArray[np.float32]
"""RGB, 0 to 255."""


def to_pixels(points: Floats) -> Floats:
    """Convert face units (..., 2) to pixel coordinates on the painted canvas; pixel centres are integers."""
    return (points - _CORNER) * np.float32(SIDE / FIELD_SIZE) - np.float32(0.5)


def sample(canvas: Bytes | Floats, x: Floats, y: Floats, *, beyond: float | None = None) -> NDArray[Any]:
    """Read a canvas at face units ``x``, ``y`` (h, w) by bilinear interpolation.

    ``beyond`` is the value outside the field; None continues its border.
    """
    scale = np.float32(len(canvas) / FIELD_SIZE)
    columns, rows = (x - np.float32(FIELD_LEFT)) * scale, (y - np.float32(FIELD_TOP)) * scale
    columns -= np.float32(0.5)
    rows -= np.float32(0.5)
    border = cv2.BORDER_REPLICATE if beyond is None else cv2.BORDER_CONSTANT
    return cv2.remap(canvas, columns, rows, cv2.INTER_LINEAR, borderMode=border, borderValue=(beyond or 0.0,) * 4)


@lru_cache(maxsize=64)
def _catmull_rom(count: int, closed: bool) -> Floats:
    """The matrix that turns ``count`` control points into a dense curve through all of them.

    It is applied by ``einsum``: on matrices this small, the threads that BLAS wakes cost many times the product.
    """
    t = np.linspace(0, 1, _CURVE_SAMPLES, endpoint=False)[:, None]
    weights = 0.5 * np.hstack([-t + 2 * t**2 - t**3, 2 - 5 * t**2 + 3 * t**3, t + 4 * t**2 - 3 * t**3, t**3 - t**2])
    segments = count if closed else count - 1
    basis = np.zeros((segments * _CURVE_SAMPLES + (not closed), count), np.float32)
    for segment in range(segments):
        rows = slice(segment * _CURVE_SAMPLES, (segment + 1) * _CURVE_SAMPLES)
        for tap in range(4):
            control = segment + tap - 1
            column = control % count if closed else min(max(control, 0), count - 1)
            basis[rows, column] += weights[:, tap]
    if not closed:
        basis[-1, -1] = 1
    return basis


def curve(points: ArrayLike) -> Floats:
    """A smooth open curve through ``points`` (..., K, 2): five samples a segment and the last point."""
    return _through(points, closed=False)


def loop(points: ArrayLike) -> Floats:
    """A smooth closed curve through ``points`` (..., K, 2)."""
    return _through(points, closed=True)


def _through(points: ArrayLike, *, closed: bool) -> Floats:
    controls = np.asarray(points, np.float32)
    return cast(Floats, np.einsum("sk,...kc->...sc", _catmull_rom(controls.shape[-2], closed), controls))


_ANGLES = np.arange(16, dtype=np.float32) * np.float32(2 * np.pi / 16)
_CIRCLE = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], 1)


def ellipse(centre: tuple[float, float], radii: tuple[float, float]) -> Floats:
    """An axis-parallel ellipse as an outline (16, 2)."""
    return cast(Floats, _CIRCLE * np.array(radii, np.float32) + np.array(centre, np.float32))


def ribbon(spine: Floats, widths: ArrayLike) -> Floats:
    """The outline (2 K, 2) of a line of changing thickness, in face units."""
    along = np.empty_like(spine)
    along[1:-1] = spine[2:] - spine[:-2]
    along[0], along[-1] = spine[1] - spine[0], spine[-1] - spine[-2]
    across = along[:, ::-1] * np.array([-0.5, 0.5], np.float32)
    across *= (np.asarray(widths, np.float32) / (np.hypot(along[:, 0], along[:, 1]) + np.float32(1e-6)))[:, None]
    return np.concatenate([spine + across, (spine - across)[::-1]])


def mirrored(right_side: ArrayLike) -> Floats:
    """Close an outline that is given for x >= 0 from top to bottom: both halves, clockwise."""
    half = np.asarray(right_side, np.float32)
    other = half[::-1] * np.array([-1, 1], np.float32)
    return np.concatenate([half, other[np.abs(other[:, 0]) > 1e-3]])


def both_sides(right_side: ArrayLike) -> list[Floats]:
    """Points (K, 2) of the viewer's right half of a face and their mirror image."""
    half = np.asarray(right_side, np.float32)
    return [half, half * np.array([-1, 1], np.float32)]


@lru_cache(maxsize=8)
def _fixed_point_map(side: int) -> tuple[np.float32, Floats]:
    """Scale and offset from face units to pixels in OpenCV's fixed point: one product and one sum for each outline."""
    one = np.float32(1 << _SUBPIXEL_BITS)
    scale = np.float32(side / FIELD_SIZE) * one
    return scale, -_CORNER * scale - one / 2


def _fixed_point(outlines: Floats, side: int) -> NDArray[np.int32]:
    scale, offset = _fixed_point_map(side)
    return cast("NDArray[np.int32]", np.rint(outlines * scale + offset).astype(np.int32))


def _scalar(colour: ArrayLike) -> tuple[float, float, float, float]:
    red, green, blue = np.asarray(colour).tolist()
    return red, green, blue, 255.0


def fill(canvas: Bytes, outline: Floats, colour: ArrayLike) -> None:
    """Fill an outline on an RGBA canvas with an opaque colour."""
    points = _fixed_point(outline, len(canvas))
    cv2.fillPoly(canvas, [points], _scalar(colour), cv2.LINE_AA, _SUBPIXEL_BITS)


def disc(canvas: Bytes, centre: tuple[float, float], radius: float, colour: ArrayLike) -> None:
    """Fill a circle on an RGBA canvas with an opaque colour."""
    scale, (offset_x, offset_y) = _fixed_point_map(len(canvas))
    place = round(float(centre[0] * scale + offset_x)), round(float(centre[1] * scale + offset_y))
    cv2.circle(canvas, place, round(float(radius * scale)), _scalar(colour), -1, cv2.LINE_AA, _SUBPIXEL_BITS)


def strokes(
    canvas: Bytes, lines: Sequence[Floats] | Floats, colour: ArrayLike, *, closed: bool = False, pixels: int = 1
) -> None:
    """Draw lines, each (K, 2), ``pixels`` canvas pixels thick on an RGBA canvas."""
    if isinstance(lines, np.ndarray):
        points = list(_fixed_point(lines, len(canvas)))
    else:
        points = [_fixed_point(line, len(canvas)) for line in lines]
    cv2.polylines(canvas, points, closed, _scalar(colour), pixels, cv2.LINE_AA, _SUBPIXEL_BITS)


def hard_mask(outlines: Sequence[Floats], side: int = SIDE) -> Bytes:
    """The union of outlines as a mask (side, side), 255 inside."""
    mask = np.zeros((side, side), np.uint8)
    for outline in outlines:
        cv2.fillPoly(mask, [_fixed_point(outline, side)], 255.0, cv2.LINE_AA, _SUBPIXEL_BITS)  # type: ignore[call-overload]
    return mask


def soft_mask(outlines: Sequence[Floats], softness: float) -> Floats:
    """The union of outlines as a mask (SIDE, SIDE) in [0, 1] whose edge fades over ``softness`` > 0 units."""
    # A wide blur is as good on a coarse canvas, and many times cheaper.
    coarseness = int(np.clip(softness, 1, 5))
    side = SIDE // coarseness
    blurred = cv2.GaussianBlur(hard_mask(outlines, side), (0, 0), softness * side / FIELD_SIZE)
    mask = blurred.astype(np.float32) * np.float32(1 / 255)
    return mask if side == SIDE else cv2.resize(mask, (SIDE, SIDE))  # type: ignore[return-value]


def blend(canvas: Bytes, mask: Floats, paint: ArrayLike) -> None:
    """Lay paint, a colour or another canvas, over an RGBA canvas (H, W, 4), where the mask (H, W) is not zero."""
    left, top, width, height = cv2.boundingRect((mask > _NOTHING).astype(np.uint8))
    if width == 0:
        return
    box = slice(top, top + height), slice(left, left + width)
    under, share = canvas[box], mask[box]
    over = np.asarray(paint)
    over = np.full_like(under, np.asarray(_scalar(over), np.uint8)) if over.ndim == 1 else over[box]
    canvas[box] = cv2.blendLinear(under, over, 1 - share, share)


def textured(colour: Colour, noise: Floats, contrast: float) -> Bytes:
    """An opaque canvas (H, W, 4) of one colour whose brightness varies with noise (H, W), about standard normal."""
    # Through a table of 256 shades: no arithmetic on four channels.
    levels = (np.arange(256, dtype=np.float32) - 128) / _LEVELS_A_UNIT
    shades = np.full((256, 4), 255, np.uint8)
    shades[:, :3] = (colour * (1 + np.float32(contrast) * levels[:, None])).clip(0, 255)
    level = (noise * _LEVELS_A_UNIT + 128).clip(0, 255).astype(np.uint8)
    return cv2.LUT(cv2.merge([level] * 4), shades[None])  # type: ignore[return-value]


def mix(one: ArrayLike, other: ArrayLike, share: float) -> Colour:
    """The colour that lies ``share`` of the way from ``one`` to ``other``."""
    start = np.asarray(one, np.float32)
    return start + (np.asarray(other, np.float32) - start) * np.float32(share)
