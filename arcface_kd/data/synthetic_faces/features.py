"""The part of a face that differs from image to image: mouth, eyes and brows move, eyewear and caps come and go."""

from dataclasses import dataclass
from enum import Enum

import numpy as np

from arcface_kd.data.synthetic_faces.canvas import (
    Bytes,
    Colour,
    Floats,
    blend,
    both_sides,
    curve,
    disc,
    ellipse,
    fill,
    hard_mask,
    loop,
    mirrored,
    mix,
    ribbon,
    strokes,
    to_pixels,
)
from arcface_kd.data.synthetic_faces.traits import Identity

_SCLERA = np.array([222, 213, 207], np.float32)
_PUPIL = (14, 12, 12)
_GLINT = (240, 240, 240)
_LASHES = (26, 20, 18)
_LID_EDGE = (90, 46, 40)
_LID_CREASE = (70, 34, 30)
_MOUTH_INSIDE = (62, 22, 24)
_TEETH = (226, 218, 202)
_TONGUE = (150, 72, 74)
_LIP_GLOSS = (255, 214, 204)
_DARK_LENS = (20, 20, 22)

_WIDEST_MOUTH = 9.0
"""Face units between the lips of a mouth opened fully."""


class Eyewear(Enum):
    """What is worn in one image."""

    NONE = "none"
    GLASSES = "glasses"
    SUNGLASSES = "sunglasses"


@dataclass(frozen=True)
class Expression:
    """What a face does and wears in one image."""

    smile: float  # -0.5 (downturned) to 1 (full)
    mouth_open: float  # 0 to 1
    brow_raise: float  # -1 (frown) to 1
    eyes_open: float  # 0.1 (nearly shut) to 1.25 (wide)
    gaze: tuple[float, float]  # shift of the irises (x, y), face units
    eyewear: Eyewear  # what is worn on the nose
    cap: Colour | None  # colour of a cap, None without one


def paint_features(canvas: Bytes, identity: Identity, expression: Expression, brow_hairs: Floats) -> None:
    """Paint mouth, eyes, brows and eyewear onto a head.

    ``brow_hairs`` are the lean of the single hairs of the brows (2, H, 2), each in [-1, 1].
    """
    _paint_mouth(canvas, identity, expression)
    _paint_eyes(canvas, identity, expression)
    _paint_brows(canvas, identity, expression, brow_hairs)
    if expression.cap is not None:
        _paint_cap(canvas, identity, expression.cap)
    if expression.eyewear is not Eyewear.NONE:
        _paint_eyewear(canvas, identity, dark=expression.eyewear is Eyewear.SUNGLASSES)


def landmarks(identity: Identity, expression: Expression) -> Floats:
    """Left eye, right eye, nose tip, left and right mouth corner (5, 2) as the viewer sees them, face units."""
    eyes, nose = identity.eyes, identity.nose
    eye, tip = (eyes.half_spacing, eyes.y), (nose.bend * 0.4, nose.tip_y)
    return np.array([(-eye[0], eye[1]), eye, tip, *_mouth_corners(identity, expression)], np.float32)


def _mouth_corners(identity: Identity, expression: Expression) -> tuple[tuple[float, float], tuple[float, float]]:
    mouth = identity.mouth
    half = mouth.half_width * (1 + 0.14 * expression.smile - 0.08 * expression.mouth_open)
    y = mouth.y - mouth.corner - 2.2 * expression.smile + 0.8 * expression.mouth_open
    return (-half, y - mouth.skew * half), (half, y + mouth.skew * half)


def _paint_mouth(canvas: Bytes, identity: Identity, expression: Expression) -> None:
    mouth, lips = identity.mouth, identity.colours.lips
    left, right = _mouth_corners(identity, expression)
    half = right[0]
    # A smile draws the lips thin.
    stretch = 1 - 0.18 * max(expression.smile, 0)
    upper, lower = mouth.upper * stretch, mouth.lower * stretch
    opening = _WIDEST_MOUTH * expression.mouth_open
    # The jaw opens a mouth, so the lower lip moves most.
    top, bottom = mouth.y - 0.25 * opening, mouth.y + 0.75 * opening

    def across(*points: tuple[float, float]) -> list[tuple[float, float]]:
        """Points given as (share of the way from the middle to a corner, y), tilted with the mouth."""
        return [(share * half, y + mouth.skew * share * half) for share, y in points]

    peak, shoulder = top - upper, top - 0.75 * upper
    above = across((-0.55, shoulder), (-0.2, peak), (0, peak + mouth.bow), (0.2, peak), (0.55, shoulder))
    below = across((0.6, bottom + 0.8 * lower), (0, bottom + lower), (-0.6, bottom + 0.8 * lower))
    fill(canvas, loop([left, *above, right, *below]), lips)
    shine = across((-0.5, bottom + 0.35 * lower), (0, bottom + 0.5 * lower), (0.5, bottom + 0.35 * lower))
    strokes(canvas, [curve(shine)], mix(lips, _LIP_GLOSS, 0.16), pixels=2)

    upper_edge = curve([left, *across((-0.5, top - 0.1), (0, top + 0.4), (0.5, top - 0.1)), right])
    line = mix(lips, _MOUTH_INSIDE, 0.75)
    if opening > 0.8:
        lower_edge = curve([right, *across((0.5, bottom), (0, bottom + 0.3), (-0.5, bottom)), left])
        fill(canvas, np.concatenate([upper_edge, lower_edge]), _MOUTH_INSIDE)
        biting = top + min(0.55 * opening, 3.2)
        teeth = across((0.72, (top + biting) / 2), (0.4, biting), (-0.4, biting), (-0.72, (top + biting) / 2))
        fill(canvas, np.concatenate([upper_edge[3:-3], curve(teeth)]), _TEETH)
        if opening > 4.5:
            fill(canvas, ellipse(across((0, bottom - 0.8))[0], (half * 0.5, 1.6)), _TONGUE)
        strokes(canvas, [lower_edge], line)
    strokes(canvas, [upper_edge], line)


_LID_STATIONS = np.array([-1, -0.5, 0.05, 0.6, 1], np.float32)
"""Where a lid's height is given, from the inner corner of the eye to the outer, in half widths."""

_UPPER_LID = np.array([0, 0.78, 1, 0.74, 0], np.float32)
_LOWER_LID = np.array([0, -0.7, -1, -0.85, 0], np.float32)
_CREASE = np.array([0.25, 0.85, 1, 0.85, 0.25], np.float32)
_LASH_TAPER = np.interp(np.linspace(0, 1, 21), [0, 0.5, 1], [0.5, 1, 0.9]).astype(np.float32)


def _paint_eyes(canvas: Bytes, identity: Identity, expression: Expression) -> None:
    """Eyeballs through the opening of the lids, then lashes and creases."""
    eyes, colours = identity.eyes, identity.colours
    along = _LID_STATIONS * np.float32(eyes.half_width)

    def lid(heights: Floats, rise: float, above: float = 0.0) -> list[Floats]:
        """A lid of both eyes: ``heights`` times ``rise`` over the line from corner to corner."""
        up = heights * np.float32(rise) + along * np.float32(eyes.tilt) + np.float32(above)
        return both_sides(curve(np.stack([along + np.float32(eyes.half_spacing), np.float32(eyes.y) - up], 1)))

    squint = 1 - 0.2 * max(expression.smile, 0)
    upper_lids = lid(_UPPER_LID, eyes.upper * expression.eyes_open)
    lower_lids = lid(_LOWER_LID, eyes.lower * squint * min(expression.eyes_open + 0.25, 1))
    _paint_eyeballs(canvas, identity, expression, upper_lids, lower_lids)

    lid_shadow = [edge + np.array([0, 0.7], np.float32) for edge in upper_lids]
    strokes(canvas, lid_shadow, mix(_SCLERA, _LASHES, 0.62))
    lash_colour = mix(colours.skin * np.float32(0.5), _LASHES, 0.45 + 0.5 * eyes.lashes)
    for edge in upper_lids:
        fill(canvas, ribbon(edge, _LASH_TAPER * np.float32(0.8 + eyes.lashes)), lash_colour)
    strokes(canvas, lower_lids, mix(colours.skin, _LID_EDGE, 0.4 + 0.25 * eyes.lashes))
    if eyes.crease > 0.6:
        strokes(
            canvas, [edge[2:-1] for edge in lid(_CREASE, eyes.upper, eyes.crease)], mix(colours.skin, _LID_CREASE, 0.45)
        )


def _paint_eyeballs(
    canvas: Bytes, identity: Identity, expression: Expression, upper_lids: list[Floats], lower_lids: list[Floats]
) -> None:
    eyes, iris = identity.eyes, identity.colours.iris
    reach = eyes.half_spacing + eyes.half_width + 1
    left, top = to_pixels(np.array([-reach, eyes.y - 8], np.float32)).astype(int)
    right, bottom = to_pixels(np.array([reach, eyes.y + 6], np.float32)).astype(int)
    strip = slice(top, bottom), slice(left, right)
    opening = hard_mask([np.concatenate([up, low[::-1]]) for up, low in zip(upper_lids, lower_lids, strict=True)])

    balls = np.empty_like(canvas)
    balls[strip] = (*_SCLERA, 255)
    for side in (-1, 1):
        x, y = side * eyes.half_spacing + expression.gaze[0], eyes.y - 0.5 + expression.gaze[1]
        for radius, colour in ((1.0, iris * np.float32(0.55)), (0.8, iris), (0.4, _PUPIL)):
            disc(balls, (x, y), radius * eyes.iris, colour)
        disc(balls, (x + 0.9, y - 1.1), 0.4, _GLINT)
    blend(canvas[strip], opening[strip].astype(np.float32) / 255, balls[strip])


_BROW_TAPER = np.interp(np.linspace(0, 1, 16), [0, 0.15, 0.6, 1], [0.6, 1, 0.9, 0.15]).astype(np.float32)


def _paint_brows(canvas: Bytes, identity: Identity, expression: Expression, brow_hairs: Floats) -> None:
    """A tapered band, then single hairs across it."""
    brows, colours = identity.brows, identity.colours
    colour = mix(colours.skin, colours.brow, 0.25 + 0.6 * brows.density)
    base = identity.eyes.y - brows.lift
    raised, frown = 2.2 * expression.brow_raise, max(-expression.brow_raise, 0)
    width = brows.outer - brows.inner
    spine = curve(
        [
            (brows.inner - 1.2 * frown, base - 0.8 * raised + 1.4 + 1.2 * frown),
            (brows.inner + 0.4 * width, base - raised - 0.6 * brows.arch),
            (brows.inner + 0.7 * width, base - raised - brows.arch - 0.6 * brows.slope),
            (brows.outer, base - 0.8 * raised + 1.2 - brows.slope),
        ]
    )
    outward = np.array([1.6, -0.5 * brows.thickness], np.float32)
    reach = np.array([0.9, 0.75], np.float32) * np.float32(brows.thickness)
    roots = spine[np.linspace(0, len(spine) - 3, brow_hairs.shape[1]).astype(int)]
    for band, lean, flip in zip(
        both_sides(ribbon(spine, _BROW_TAPER * brows.thickness)), brow_hairs, (1, -1), strict=True
    ):
        fill(canvas, band, colour)
        hairs = np.stack([roots, roots + lean * reach + outward], 1) * np.array([flip, 1], np.float32)
        strokes(canvas, hairs, mix(colour, colours.brow, 0.5))


def _paint_cap(canvas: Bytes, identity: Identity, colour: Colour) -> None:
    """A knitted cap: down to the forehead, over the hair, with a turned-up edge."""
    head, hair = identity.head, identity.hair
    side, edge = head.temple + 0.6 * hair.volume + 3, -42.0
    crown = [(0, head.crown_y - hair.volume), (0.62 * side, head.crown_y + 5 - 0.7 * hair.volume), (side, -56)]
    dome = np.concatenate([mirrored([*crown, (side, edge + 3)])])
    fill(canvas, loop([*dome[: len(crown) + 1], (0, edge), *dome[len(crown) + 1 :]]), colour)
    fold = curve([(-side, edge - 1), (-0.5 * side, edge - 4), (0, edge - 5), (0.5 * side, edge - 4), (side, edge - 1)])
    fill(canvas, ribbon(fold, 8.0), colour * np.float32(0.85))


_RIM = np.array([(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)], np.float32)


def _paint_eyewear(canvas: Bytes, identity: Identity, *, dark: bool) -> None:
    glasses, eyes = identity.glasses, identity.eyes
    half_width = min(glasses.half_width, eyes.half_spacing - 2.2)
    half_height = glasses.half_height
    # The corners of a round rim lie on the circle, those of a square one nearly on the square.
    roundness = np.array([1, 0.7 + 0.25 * glasses.squareness], np.float32)[np.arange(8) % 2][:, None]
    centre = np.array([eyes.half_spacing + 0.4, eyes.y + 1.5], np.float32)
    rims = both_sides(loop(centre + _RIM * roundness * np.array([half_width, half_height], np.float32)))
    if dark:
        lens: Colour = mix(glasses.colour, _DARK_LENS, 0.7)
        for rim in rims:
            fill(canvas, rim, lens)
    strokes(canvas, rims, glasses.colour, closed=True, pixels=glasses.frame_pixels)
    inner, outer = centre[0] - half_width, centre[0] + half_width
    bridge = curve([(-inner, eyes.y - 0.5), (0, eyes.y - 2), (inner, eyes.y - 0.5)])
    arms = both_sides([(outer, eyes.y - 1), (identity.head.cheek + 1, eyes.y - 2)])
    strokes(canvas, [bridge, *arms], glasses.colour, pixels=glasses.frame_pixels)
