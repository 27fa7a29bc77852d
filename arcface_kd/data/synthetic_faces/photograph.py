"""One picture of a face: posed, aligned, lit and taken.

The camera sees the face as an aligned crop: the five landmarks of the posed head are fitted to the ArcFace template by
a similarity, as a face detector's alignment would do it, with a little error.
"""

import cmath
from typing import cast

import cv2
import numpy as np

from arcface_kd.data.formats.face_alignment import CROP, TEMPLATE
from arcface_kd.data.synthetic_faces.canvas import Bytes, Floats, sample
from arcface_kd.data.synthetic_faces.features import landmarks
from arcface_kd.data.synthetic_faces.portrait import Portrait
from arcface_kd.data.synthetic_faces.relief import Surface
from arcface_kd.data.synthetic_faces.shot import Camera, Shot, draw_shot
from arcface_kd.data.synthetic_faces.traits import chance

_TARGET_MIDDLE = complex(*TEMPLATE.mean(axis=0))
_TARGET_CENTRED = [complex(x, y) - _TARGET_MIDDLE for x, y in TEMPLATE.tolist()]
_CROP_Y, _CROP_X = np.mgrid[0:CROP, 0:CROP].astype(np.float32)
_COARSE_Y, _COARSE_X = _CROP_Y[::2, ::2] + np.float32(0.5), _CROP_X[::2, ::2] + np.float32(0.5)
_DEPTH_STEPS = 4
_DEPTH_DAMPING = np.float32(0.7)
_GLOSS_SQUARINGS = 4
"""Four squarings are a Phong exponent of 16: skin, neither wet nor matt."""

_MID_GREY = 118.0
_LUMA = np.array([0.299, 0.587, 0.114])


def alignment(points: Floats, shot: Shot) -> Floats:
    """The similarity (2, 3) that fits landmarks (5, 2) to the template, as a detector's alignment would.

    Least squares in closed form, with points as complex numbers, then the detector's error: roll, zoom and shift.
    """
    # On five points Python's own numbers are faster than arrays.
    source = [complex(x, y) for x, y in points.tolist()]
    middle = sum(source) / len(source)
    centred = [(point - middle).conjugate() for point in source]
    turn = sum(a * b for a, b in zip(centred, _TARGET_CENTRED, strict=True)) / sum(abs(a) ** 2 for a in centred)
    turn *= cmath.rect(shot.zoom, shot.roll)
    shift = _TARGET_MIDDLE + complex(*shot.shift) - turn * middle
    return np.array([(turn.real, -turn.imag, shift.real), (turn.imag, turn.real, shift.imag)])


def visible_points(height: Floats, face_landmarks: Floats, shot: Shot) -> tuple[Floats, Floats]:
    """For every pixel of the crop, the point of the frontal face that it shows, face units x and y.

    A pixel of a parallel projection shows the (x, y) with ``P (x, y, height(x, y)) = pixel``: a fixed point, which
    damped iteration finds even where the near side of the head is steep. It runs on a quarter of the pixels, for
    heights are smooth; one step on all of them restores the edges.
    """
    rotation = shot.rotation
    x, y = face_landmarks[:, 0], face_landmarks[:, 1]
    points = np.stack([x, y, sample(height, x[:, None], y[:, None])[:, 0]], 1)
    posed = (points[:, None] * rotation[:2]).sum(2)
    fit = alignment(posed, shot)
    # Crop pixels to the frontal face as if it were flat: the inverse of an affine map.
    flatten = np.hstack([fit[:, :1] * rotation[0, :2] + fit[:, 1:2] * rotation[1, :2], fit[:, 2:]])
    back = cv2.invertAffineTransform(flatten).astype(np.float32)
    flat_x = back[0, 0] * _CROP_X + back[0, 1] * _CROP_Y + back[0, 2]
    flat_y = back[1, 0] * _CROP_X + back[1, 1] * _CROP_Y + back[1, 2]
    # What a unit of height moves a point on the flat face: R[:2, :2]^-1 R[:2, 2], which for a rotation is this.
    slide = -rotation[2, :2] / rotation[2, 2]
    coarse_x = back[0, 0] * _COARSE_X + back[0, 1] * _COARSE_Y + back[0, 2]
    coarse_y = back[1, 0] * _COARSE_X + back[1, 1] * _COARSE_Y + back[1, 2]
    depth = np.zeros_like(coarse_x)
    for _ in range(_DEPTH_STEPS):
        found = sample(height, coarse_x - slide[0] * depth, coarse_y - slide[1] * depth)
        depth += (found - depth) * _DEPTH_DAMPING
    depth = cv2.resize(depth, (CROP, CROP), interpolation=cv2.INTER_LINEAR)
    depth = sample(height, flat_x - slide[0] * depth, flat_y - slide[1] * depth)
    return flat_x - slide[0] * depth, flat_y - slide[1] * depth


def _illuminate(surface: Surface, x: Floats, y: Floats, shot: Shot) -> tuple[Floats, Floats]:
    """Exposed linear light (3, CROP, CROP) from the visible points, and their gloss (CROP, CROP) in [0, 1]."""
    slope_x, slope_y, hollow = cv2.split(sample(surface.shape, x, y))
    rotation, light = shot.rotation, shot.light
    length = 1 / np.sqrt(slope_x * slope_x + slope_y * slope_y + 1)

    def facing(direction: Floats) -> Floats:
        """Cosine between the surface and a direction that is given in the camera's axes."""
        ray = (rotation * direction[:, None]).sum(0) / np.sqrt((direction**2).sum())
        return cast(Floats, (ray[2] - slope_x * ray[0] - slope_y * ray[1]) * length)

    # Light that wraps a little around the edge stands in for the scattering of skin.
    key = ((facing(light.direction) + 0.15) / 1.15).clip(0, None)
    sky = (1 - 0.16 * hollow).clip(0.45, 1.15)
    gloss = facing(light.direction + np.array([0, 0, 1], np.float32)).clip(0, 1)
    for _ in range(_GLOSS_SQUARINGS):
        gloss *= gloss
    key_colour, sky_colour = light.key * shot.camera.exposure, light.ambient * shot.camera.exposure
    return key * key_colour[:, None, None] + sky * sky_colour[:, None, None], gloss


def _background(rng: np.random.Generator) -> Floats:
    """Out-of-focus colours (3, CROP, CROP)."""
    cells = int(rng.integers(2, 7))
    tone = rng.uniform(30, 210) + rng.normal(0, 25, 3)
    patches = tone[:, None, None] + rng.normal(0, rng.uniform(8, 50), (cells, cells))
    patches += rng.normal(0, 10, (3, cells, cells))
    mode = cv2.INTER_LINEAR if chance(rng, 0.7) else cv2.INTER_NEAREST
    return np.stack([cv2.resize(plane, (CROP, CROP), interpolation=mode) for plane in patches.astype(np.float32)])


def _occlude(planes: Floats, rng: np.random.Generator) -> None:
    """Something between face and camera: a hand, a microphone, another's shoulder; in place, (3, CROP, CROP)."""
    mask = np.zeros((CROP, CROP), np.uint8)
    angle = rng.uniform(0, 2 * np.pi)
    centre = 56 + 48 * np.array([np.cos(angle), np.sin(angle)])
    radii = rng.uniform(12, 38, 2).astype(int).tolist()
    cv2.ellipse(mask, centre.astype(int).tolist(), radii, rng.uniform(0, 180), 0, 360, 255.0, -1, cv2.LINE_AA)  # type: ignore[call-overload]
    share = mask * np.float32(1 / 255)
    planes += (rng.uniform(15, 200, (3, 1, 1)).astype(np.float32) - planes) * share


def _expose(planes: Floats, camera: Camera, rng: np.random.Generator) -> Bytes:
    """Picture style, lens and sensor: from planes (3, CROP, CROP) to pixels (CROP, CROP, 3)."""
    picture = cv2.transform(cv2.merge(list(planes)), _colour_matrix(camera))
    if camera.blur > 0.3:
        picture = cv2.GaussianBlur(picture, (0, 0), camera.blur)
    if camera.motion is not None:
        picture = cv2.filter2D(picture, -1, _motion_kernel(*camera.motion))
    if camera.shrink < 1:
        small = round(CROP * camera.shrink)
        picture = cv2.resize(picture, (small, small), interpolation=cv2.INTER_AREA)
        picture = cv2.resize(picture, (CROP, CROP), interpolation=cv2.INTER_LINEAR)
    # Three random bytes add up to nearly a normal deviate, of deviation 128, at a third of its cost.
    bits = rng.integers(0, 256, (3, CROP, CROP), dtype=np.uint8)
    grain = (bits.sum(axis=0, dtype=np.float32) - np.float32(382.5)) * np.float32(camera.noise / 128)
    return cv2.add(picture, cv2.merge([grain, grain, grain]), dtype=cv2.CV_8U)  # type: ignore[return-value]


def _colour_matrix(camera: Camera) -> Floats:
    """Saturation, then contrast about mid grey, as one affine map of RGB (3, 4)."""
    saturate = camera.saturation * np.eye(3) + (1 - camera.saturation) * _LUMA
    offset = np.full((3, 1), _MID_GREY * (1 - camera.contrast))
    return np.hstack([camera.contrast * saturate, offset]).astype(np.float32)


def _motion_kernel(length: float, angle: float) -> Floats:
    """Blur along a line ``length`` pixels long."""
    kernel = np.zeros((9, 9), np.float32)
    half = 0.5 * length * np.array([np.cos(angle), np.sin(angle)])
    ends = np.rint((np.array([4, 4]) + np.stack([-half, half])) * 16).astype(int)
    cv2.line(kernel, ends[0].tolist(), ends[1].tolist(), 1.0, 1, cv2.LINE_AA, 4)  # type: ignore[call-overload]
    return cast(Floats, kernel / kernel.sum())


def photograph(portrait: Portrait, rng: np.random.Generator) -> tuple[Bytes, int]:
    """Take one picture: RGB pixels (112, 112, 3) and the JPEG quality to store them with."""
    identity = portrait.identity
    shot = draw_shot(rng, identity.glasses)
    canvas = portrait.paint(shot.expression)
    surface = portrait.relief.surface(shot.expression.smile)
    x, y = visible_points(surface.height, landmarks(identity, shot.expression), shot)
    seen = cv2.split(sample(canvas, x, y, beyond=0))
    light, gloss = _illuminate(surface, x, y, shot)
    # Albedo is stored as displayed (gamma 2, close to sRGB), so linear light multiplies it as a square root. Empty
    # canvas is black, so the colours at its edge are premultiplied by their alpha.
    face = np.stack(seen[:3]) * np.sqrt(light)
    cover = seen[3] * np.float32(1 / 255)
    face += gloss * cover * np.float32(255 * identity.marks.oiliness)
    picture = face + _background(rng) * (1 - cover)
    if chance(rng, 0.15):
        _occlude(picture, rng)
    return _expose(picture, shot.camera, rng), shot.camera.quality
