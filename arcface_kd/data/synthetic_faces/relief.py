"""The third dimension: a height map of the face, from which pose and shading follow.

Heights are face units towards the viewer; the grid has one cell a unit over the field of :mod:`.canvas`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import cv2
import numpy as np

from arcface_kd.data.synthetic_faces.canvas import (
    FIELD_LEFT,
    FIELD_SIZE,
    FIELD_TOP,
    Floats,
    both_sides,
    curve,
    hard_mask,
    ribbon,
)
from arcface_kd.data.synthetic_faces.traits import Eyes, Identity, Mouth, Nose

_X = (FIELD_LEFT + 0.5 + np.arange(FIELD_SIZE, dtype=np.float32))[None, :]
_Y = (FIELD_TOP + 0.5 + np.arange(FIELD_SIZE, dtype=np.float32))[:, None]


@dataclass(frozen=True)
class Surface:
    """A height map and what light needs to know of it; all of it is linear in the heights."""

    height: Floats  # (FIELD_SIZE, FIELD_SIZE), face units
    # (FIELD_SIZE, FIELD_SIZE, 3): slope in x, slope in y, and how much lower than its surroundings a point lies, which
    # shades it from the sky.
    shape: Floats

    @classmethod
    def of(cls, height: Floats) -> "Surface":
        """Derive slopes and hollows from heights."""
        slope_x = cv2.Sobel(height, cv2.CV_32F, 1, 0, scale=1 / 8)
        slope_y = cv2.Sobel(height, cv2.CV_32F, 0, 1, scale=1 / 8)
        hollow = cv2.GaussianBlur(height, (0, 0), 4) - height
        return cls(height, np.asarray(cv2.merge([slope_x, slope_y, hollow]), np.float32))


@dataclass(frozen=True)
class Relief:
    """The head of one identity."""

    rest: Surface  # the face at rest
    smile: Surface  # what a full smile adds: raised cheeks, deeper folds beside the mouth

    def surface(self, smile: float) -> Surface:
        """The face with a smile between 0 (or less: that is painted) and 1."""
        if smile <= 0:
            return self.rest
        share = np.float32(smile)
        return Surface(
            self.rest.height + share * self.smile.height,
            self.rest.shape + share * self.smile.shape,
        )


def _bump(x: float, y: float, width: float, height: float) -> Floats:
    """A Gaussian bump of unit height; separable, so two short exponentials and an outer product."""
    return cast(Floats, np.exp(-(((_X - x) / width) ** 2)) * np.exp(-(((_Y - y) / height) ** 2)))


def _pair(x: float, y: float, width: float, height: float) -> Floats:
    """The same bump on both sides of the face."""
    both = np.exp(-(((_X - x) / width) ** 2)) + np.exp(-(((_X + x) / width) ** 2))
    return cast(Floats, both * np.exp(-(((_Y - y) / height) ** 2)))


def _crease(lines: Sequence[Floats], width: float, softness: float) -> Floats:
    """Soft grooves of unit depth along lines."""
    mask = hard_mask([ribbon(line, width) for line in lines], FIELD_SIZE).astype(np.float32) / 255
    return cv2.GaussianBlur(mask, (0, 0), softness)  # type: ignore[return-value]


def _skull(identity: Identity) -> Floats:
    """The head without features: flat in front, receding faster to the sides; never so steep that a pose folds it."""
    head = identity.head
    sideways = np.abs(_X) / head.cheek
    upward = np.abs(_Y + 15) / 70
    return cast(
        Floats,
        -head.depth * (0.25 * sideways**2 + 0.75 * sideways**3.2).clip(0, 2.2) - 0.5 * head.depth * upward**2.4,
    )


def _nose(nose: Nose, eyes: Eyes) -> Floats:
    nasion, tip = eyes.y - 1, nose.tip_y
    middle = (nasion + tip) / 2
    wing, bridge = nose.half_width, nose.bridge_half_width
    # Stations down the nose: y, height, half width.
    profile = np.array(
        [
            (nasion - 14, 0.0, 1.5 * bridge),
            (nasion, 0.55 * nose.bridge, bridge),
            (middle, nose.bridge + nose.hump, 1.05 * bridge),
            (tip - 3, 0.9 * nose.tip, 0.62 * wing),
            (tip, nose.tip, 0.68 * wing),
            (tip + 4, 0.62 * nose.tip, 0.72 * wing),
            (tip + 8.5, 0.0, 0.8 * wing),
        ]
    )
    height = np.interp(_Y, profile[:, 0], profile[:, 1]).astype(np.float32)
    width = np.interp(_Y, profile[:, 0], profile[:, 2]).astype(np.float32)
    axis = nose.bend * np.interp(_Y, [nasion, middle, tip], [0, 1, 0.4]).astype(np.float32)
    ridge = height * np.exp(-(((_X - axis) / width) ** 2))
    wings = _pair(nose.half_width * 0.78, tip + 2.5, 2.8, 3.4)
    return cast(Floats, ridge + 0.26 * nose.tip * wings)


def _eyes(identity: Identity) -> Floats:
    eyes, brows = identity.eyes, identity.brows
    sockets = _pair(eyes.half_spacing - 2, eyes.y, 9, 6.0) * eyes.socket
    balls = _pair(eyes.half_spacing, eyes.y, 5.2, 4.2) * (0.55 * eyes.socket + 0.9)
    bags = _pair(eyes.half_spacing, eyes.y + 5.5, 6, 1.8) * (0.9 * eyes.bags)
    ridge = _pair((brows.inner + brows.outer) / 2, eyes.y - brows.lift + 1, 12, 4) * brows.ridge
    return cast(Floats, balls - sockets + bags + ridge)


def _mouth(mouth: Mouth) -> Floats:
    def lip(middle: float, thickness: float) -> Floats:
        return cast(Floats, np.exp(-(((_Y - middle) / (0.6 * thickness + 0.8)) ** 2)) * (0.47 * thickness))

    lips = lip(mouth.y - 0.5 * mouth.upper, mouth.upper) + lip(mouth.y + 0.55 * mouth.lower, mouth.lower)
    parting = np.exp(-((_Y - mouth.y) ** 2)) * 0.8
    across = np.exp(-((_X / (mouth.half_width * 0.85)) ** 4))
    muzzle = _bump(0, mouth.y, mouth.half_width * 1.2, 12) * 2.5
    groove = _bump(0, mouth.y + mouth.lower + 4.5, mouth.half_width * 0.6, 2.6) * 1.6
    philtrum = _bump(0, mouth.y - mouth.upper - 4, 1.6, 3.2) * 0.7
    return cast(Floats, across * (lips - parting) + muzzle - groove - philtrum)


def _cheeks_and_chin(identity: Identity) -> Floats:
    cheeks, head = identity.cheeks, identity.head
    bones = _pair(head.cheek * 0.62, cheeks.bone_y, 10, 8) * cheeks.bone
    hollows = _pair(head.cheek * 0.66, cheeks.bone_y + 20, 8, 9) * cheeks.hollow
    chin = _bump(0, head.chin_y - 9, head.chin * 0.75, 6) * cheeks.chin
    cleft = _bump(0, head.chin_y - 8, 1.4, 3.5) * cheeks.cleft
    return cast(Floats, bones - hollows + chin - cleft)


def _nasolabial_folds(identity: Identity) -> list[Floats]:
    """The two lines from the wings of the nose to beside the mouth."""
    nose, mouth = identity.nose, identity.mouth
    start = nose.half_width + 1.5, nose.tip_y + 1
    middle = mouth.half_width * 0.95 + 1.5, (nose.tip_y + mouth.y) / 2 + 1
    end = mouth.half_width + 3.5, mouth.y + 2
    return both_sides(curve([start, middle, end]))


def _wrinkles(identity: Identity) -> Floats:
    eyes, brows, marks, head = identity.eyes, identity.brows, identity.marks, identity.head
    depth = 0.9 * marks.nasolabial * _crease(_nasolabial_folds(identity), 1.2, 1.1)
    if marks.forehead_lines > 0:
        lowest, reach = eyes.y - brows.lift - 7, 0.55 * head.temple
        lines = [curve([(-reach, y + 1), (0, y), (reach, y + 1)]) for y in (lowest, lowest - 5.5, lowest - 11)]
        depth += marks.forehead_lines * _crease(lines, 0.9, 0.7)
    if marks.crow_feet > 0:
        corner = eyes.half_spacing + eyes.half_width + 2
        rays = [[(corner, eyes.y + 0.4 * drop), (corner + 6, eyes.y + drop)] for drop in (-2.5, 0.8, 4)]
        depth += marks.crow_feet * _crease([line for ray in rays for line in both_sides(ray)], 0.8, 0.6)
    return depth


def build_relief(identity: Identity) -> Relief:
    """Model the head of one identity."""
    rest = (
        _skull(identity)
        + _nose(identity.nose, identity.eyes)
        + _eyes(identity)
        + _mouth(identity.mouth)
        + _cheeks_and_chin(identity)
        - _wrinkles(identity)
    )
    cheeks = _pair(identity.mouth.half_width + 9, identity.nose.tip_y + 3, 8, 6) * 2.4
    smile = cheeks - 1.3 * _crease(_nasolabial_folds(identity), 1.4, 1.2)
    # The tails of Gaussians end in denormal numbers, which slow every later use of the map.
    smile[np.abs(smile) < 1e-4] = 0
    smooth = cv2.GaussianBlur(rest.astype(np.float32), (0, 0), 0.7).astype(np.float32)
    return Relief(rest=Surface.of(smooth), smile=Surface.of(smile.astype(np.float32)))
