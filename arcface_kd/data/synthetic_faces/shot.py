"""The circumstances of one image: pose, expression, light and camera."""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from arcface_kd.data.synthetic_faces.canvas import Floats
from arcface_kd.data.synthetic_faces.features import Expression, Eyewear
from arcface_kd.data.synthetic_faces.traits import Glasses, about, chance, within


@dataclass(frozen=True)
class Light:
    """Illumination: directions point from the face to the light, colours are linear RGB gains."""

    direction: Floats
    key: Floats
    ambient: Floats


@dataclass(frozen=True)
class Camera:
    """What the camera does to the picture."""

    exposure: float  # gain on linear light
    contrast: float  # gain around mid grey
    saturation: float  # 0 is grey, 1 as is
    shrink: float  # side of the picture before it was enlarged to the crop, as a share of it; 1 is none
    blur: float  # standard deviation in pixels
    motion: tuple[float, float] | None  # path of the camera during exposure, (pixels, radians), or None
    noise: float  # standard deviation in grey levels
    quality: int  # JPEG quality


@dataclass(frozen=True)
class Shot:
    """What differs between two images of one identity."""

    yaw: float  # turn of the head, radians; positive shows the face looking to the viewer's right
    pitch: float  # nod of the head, radians; positive looks down
    roll: float  # error of the aligned crop, radians
    shift: tuple[float, float]  # error of the aligned crop (x, y), pixels
    zoom: float  # error of the aligned crop, 1 is none
    expression: Expression  # what the face does and wears
    light: Light  # what falls on it
    camera: Camera  # what it is taken with

    @cached_property
    def rotation(self) -> Floats:
        """From the axes of the face to those of the camera (3, 3): yaw, then pitch; aligning undoes the roll."""
        turn, turned, nod, nodded = math.cos(self.yaw), math.sin(self.yaw), math.cos(self.pitch), math.sin(self.pitch)
        right, down = (turn, 0, turned), (-nodded * turned, nod, nodded * turn)
        return np.array([right, down, (-nod * turned, -nodded, nod * turn)], np.float32)


def _draw_expression(rng: np.random.Generator, glasses: Glasses) -> Expression:
    eyewear = Eyewear.GLASSES if chance(rng, glasses.worn) else Eyewear.NONE
    if chance(rng, 0.02):
        eyewear = Eyewear.SUNGLASSES
    return Expression(
        smile=within(about(rng, 0.35, 0.5), -0.5, 1.1),
        mouth_open=float(rng.beta(1, 2.2)) if chance(rng, 0.4) else 0.0,
        brow_raise=about(rng, 0.05, 0.4),
        eyes_open=within(about(rng, 0.95, 0.16), 0.2, 1.25) if chance(rng, 0.96) else 0.12,
        gaze=(about(rng, 0, 1.2), about(rng, 0, 0.4)),
        eyewear=eyewear,
        cap=rng.uniform(20, 200, 3).astype(np.float32) if chance(rng, 0.1) else None,
    )


def _draw_light(rng: np.random.Generator) -> Light:
    direction = np.array([about(rng, 0, 1.0), about(rng, -0.5, 0.6), 1.0])
    warmth, tint = about(rng, 0, 0.16), about(rng, 0, 0.05)
    cast = np.array([1 + warmth, 1 + tint, 1 - warmth], np.float32)
    share = float(rng.uniform(0.3, 0.9))
    sky = np.array([1 - 0.4 * warmth, 1, 1 + 0.4 * warmth], np.float32)
    return Light(
        direction=(direction / np.linalg.norm(direction)).astype(np.float32),
        key=cast * np.float32(1.25 * share),
        ambient=sky * cast * np.float32(1 - share),
    )


def _draw_camera(rng: np.random.Generator) -> Camera:
    return Camera(
        exposure=float(np.exp(about(rng, -0.1, 0.38))),
        contrast=about(rng, 1.0, 0.18),
        saturation=0.0 if chance(rng, 0.12) else max(0.1, about(rng, 0.85, 0.3)),
        shrink=float(rng.uniform(0.3, 0.85)) if chance(rng, 0.35) else 1.0,
        blur=float(rng.gamma(1.5, 0.42)),
        motion=(float(rng.uniform(1.5, 6)), float(rng.uniform(0, np.pi))) if chance(rng, 0.12) else None,
        noise=float(rng.gamma(2.0, 2.3)),
        quality=int(rng.integers(30, 96)),
    )


def draw_shot(rng: np.random.Generator, glasses: Glasses) -> Shot:
    """Draw the circumstances of one image."""
    return Shot(
        yaw=float(np.radians(about(rng, 0, 20))),
        pitch=float(np.radians(about(rng, 0, 10))),
        roll=float(np.radians(about(rng, 0, 2.5))),
        shift=(about(rng, 0, 1.6), about(rng, 0, 1.6)),
        zoom=about(rng, 1, 0.04),
        expression=_draw_expression(rng, glasses),
        light=_draw_light(rng),
        camera=_draw_camera(rng),
    )
