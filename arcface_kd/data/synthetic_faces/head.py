"""The part of a face that an expression does not move: hair, ears, skin, nose and beard, painted once an identity."""

import cv2
import numpy as np

from arcface_kd.data.synthetic_faces.canvas import (
    FIELD_SIZE,
    FIELD_TOP,
    SIDE,
    Bytes,
    Colour,
    Floats,
    blend,
    both_sides,
    curve,
    ellipse,
    fill,
    hard_mask,
    loop,
    mirrored,
    mix,
    ribbon,
    soft_mask,
    strokes,
    textured,
    to_pixels,
)
from arcface_kd.data.synthetic_faces.traits import HairStyle, Identity

_BLUSH = (196, 92, 86)
_TIRED = (70, 34, 40)
_FRECKLE = (120, 66, 38)
_MOLE = (46, 28, 24)
_NOSTRIL = (44, 20, 18)
_WING_CREASE = (60, 30, 26)
_BEARD_TINT = (40, 32, 30)

_SHAVEN_SCALP = 0.22
"""How much hair colour shows through on a bald head."""

_NECK_SHADE = 0.7
"""The chin keeps light from the neck."""

_EARS_END_Y = -8
"""Below this height hair no longer grows out of the edge of the face."""


def _times(colour: Colour, factor: float) -> Colour:
    return colour * np.float32(factor)


def paint_head(identity: Identity, rng: np.random.Generator) -> Bytes:
    """Paint everything but brows, eyes and mouth: RGBA, alpha 0 where there is neither head nor hair."""
    canvas = np.zeros((SIDE, SIDE, 4), np.uint8)
    bald = identity.hair.style is HairStyle.BALD
    if not bald:
        _paint_hair(canvas, identity, rng)
    fill(canvas, _neck(identity), _times(identity.colours.skin, _NECK_SHADE))
    if identity.hair.style not in (HairStyle.LONG, HairStyle.FRINGE):
        _paint_ears(canvas, identity)
    hair_behind = canvas.copy()
    outline = _face_outline(identity)
    fill(canvas, _head_outline(identity) if bald else outline, identity.colours.skin)
    face = soft_mask([outline], 1.2)
    if bald:
        scalp = hard_mask([_head_outline(identity)]).astype(np.float32) / 255 * (1 - soft_mask([outline], 4))
        blend(canvas, scalp * np.float32(_SHAVEN_SCALP), identity.colours.hair)
    _tint_skin(canvas, identity, face, rng)
    _paint_marks(canvas, identity, face, rng)
    _paint_facial_hair(canvas, identity, face, rng)
    _paint_nose(canvas, identity)
    if not bald:
        _feather_hairline(canvas, hair_behind, face)
    return canvas


def _neck(identity: Identity) -> Floats:
    jaw = identity.head.jaw
    return mirrored([(jaw * 0.82, 5), (jaw * 0.8, 50), (jaw * 0.95, FIELD_SIZE + FIELD_TOP)])


def _head_outline(identity: Identity) -> Floats:
    head = identity.head
    crown = [(0, head.crown_y), (head.temple * 0.6, head.crown_y + 6), (head.temple * 0.96, -57)]
    sides = [(head.cheek, -34), (head.cheek, -14), (head.cheek * 0.98, 4)]
    chin = [(head.jaw, head.jaw_y), (head.chin, head.chin_y - 4), (0, head.chin_y)]
    return loop(mirrored([*crown, *sides, *chin]))


def _hairline(identity: Identity) -> list[tuple[float, float]]:
    """The edge between forehead and hair from the left temple to the right."""
    head, hair = identity.head, identity.hair
    y, side = hair.hairline_y, head.temple - hair.side_cover
    if hair.style is HairStyle.RECEDING:
        right = [(6, y - 1), (side * 0.72, y - 12), (side, -44)]
    elif hair.style is HairStyle.FRINGE:
        # A fringe ends above the brows, however high the hair begins.
        y = -39 + 0.6 * (y + 56)
        right = [(3, y - 1), (side * 0.6, y), (side, y + 9)]
    elif hair.style in (HairStyle.SIDE_PART, HairStyle.LONG):
        part = hair.parting
        left_fall, right_fall = ((part - side) * 0.55, y + 5), ((part + side) * 0.55, y + 5)
        return [(-side, -34), left_fall, (part, y - 7), right_fall, (side, -34)]
    else:
        right = [(side * 0.4, y), (side * 0.86, y + 9), (side, -38)]
    return [*((-x, height) for x, height in right[::-1]), *right]


def _face_outline(identity: Identity) -> Floats:
    """Visible skin: from the hairline down; hair that falls over the cheeks narrows it."""
    head, hair = identity.head, identity.hair
    cover = 1.2 * hair.side_cover if hair.style in (HairStyle.LONG, HairStyle.FRINGE) else 0.0
    cheek = head.cheek - cover
    right = [(cheek, -16), (min(head.cheek * 0.98, cheek), 4), (head.jaw, head.jaw_y), (head.chin, head.chin_y - 4)]
    left = [(-x, y) for x, y in right[::-1]]
    return loop([*_hairline(identity), *right, (0, head.chin_y), *left])


def _hair_outline(identity: Identity, rng: np.random.Generator) -> Floats:
    head, hair = identity.head, identity.hair
    close = hair.style in (HairStyle.CROPPED, HairStyle.RECEDING)
    falls = hair.style in (HairStyle.LONG, HairStyle.FRINGE)
    volume = hair.volume * (0.3 if close else 1.0)
    end_y = hair.length_y if falls else -12.0
    end_x = head.cheek + (1.2 * volume if falls else -2.0)
    crown = [(0, head.crown_y - volume), (head.temple * 0.62 + 0.7 * volume, head.crown_y + 5 - 0.7 * volume)]
    sides = [(head.temple * 0.98 + volume, -56), (head.cheek + volume * (1.1 if falls else 0.6), -26)]
    outline = loop(mirrored([*crown, *sides, (end_x, end_y), (0, end_y + 4)]))
    if hair.style is HairStyle.CURLY:
        angles = np.arctan2(outline[:, 1] + 30, outline[:, 0])
        bumps = 1.03 + 0.035 * np.sin(23 * angles + hair.parting) + 0.03 * rng.uniform(-1, 1, len(outline))
        outline = (outline * bumps[:, None]).astype(np.float32)
    return outline


def _paint_hair(canvas: Bytes, identity: Identity, rng: np.random.Generator) -> None:
    """The mass of hair behind and around the face."""
    mass = hard_mask([_hair_outline(identity, rng)]).astype(np.float32) / 255
    blend(canvas, mass, textured(identity.colours.hair, _strands(identity, rng), identity.hair.contrast))


def _strands(identity: Identity, rng: np.random.Generator) -> Floats:
    """Noise (SIDE, SIDE) of hair: drawn out along rays from the parting, or in curls."""
    if identity.hair.style is HairStyle.CURLY:
        curls = rng.standard_normal((SIDE // 5, SIDE // 5), dtype=np.float32)
        return cv2.resize(curls, (SIDE, SIDE), interpolation=cv2.INTER_LINEAR)  # type: ignore[return-value]
    # Angles in rows, radii in columns; some cells along a ray keep a strand from being one flat tone.
    rays = cv2.resize(rng.standard_normal((240, 14), dtype=np.float32), (160, 240), interpolation=cv2.INTER_LINEAR)
    root = to_pixels(np.array([identity.hair.parting * 0.6, identity.head.crown_y + 6], np.float32)).tolist()
    # The rays must reach every corner: what they do not reach, OpenCV leaves as it found it in memory.
    reach = 1.5 * SIDE
    mode = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP | cv2.WARP_FILL_OUTLIERS
    return cv2.warpPolar(rays, (SIDE, SIDE), root, reach, mode)  # type: ignore[return-value]


def _feather_hairline(canvas: Bytes, hair_behind: Bytes, face: Floats) -> None:
    """Let hair run out softly over forehead and temples."""
    rows = slice(0, int((_EARS_END_Y - FIELD_TOP) * SIDE / FIELD_SIZE))
    share = (1 - face[rows]) * (hair_behind[rows, :, 3] > 0)
    blend(canvas[rows], share.astype(np.float32), hair_behind[rows])


def _paint_ears(canvas: Bytes, identity: Identity) -> None:
    head, skin = identity.head, identity.colours.skin
    shell = np.array([(-4, -12), (2, -14), (5, -8), (4, 2), (1, 11), (-4, 12)], np.float32) * head.ear_size
    root = np.array([head.cheek + head.ear_protrusion - 2, -10], np.float32)
    for outer, inner in zip(
        both_sides(loop(root + shell)),
        both_sides(ellipse((root[0] + 0.8, -11), (1.9 * head.ear_size, 6.5 * head.ear_size))),
        strict=True,
    ):
        fill(canvas, outer, _times(skin, 0.95))
        fill(canvas, inner, _times(skin, 0.72))


def _tint_skin(canvas: Bytes, identity: Identity, face: Floats, rng: np.random.Generator) -> None:
    """Uneven pigment, blush, shadows around the eyes and under the lip."""
    marks, skin, eyes, mouth = identity.marks, identity.colours.skin, identity.eyes, identity.mouth
    blotches = rng.standard_normal((20, 20), dtype=np.float32)
    pores = rng.standard_normal((90, 90), dtype=np.float32)
    grain = cv2.resize(blotches, (90, 90), interpolation=cv2.INTER_CUBIC) + pores
    grain = cv2.resize(grain, (SIDE, SIDE), interpolation=cv2.INTER_LINEAR).astype(np.float32)
    blend(canvas, face, textured(skin, grain, 0.013 * marks.mottle))

    rosy = mix(skin, _BLUSH, 0.55)
    cheeks = soft_mask(both_sides(ellipse((25, 3), (9, 7))), 5)
    nose = soft_mask([ellipse((0, identity.nose.tip_y - 1), (5, 4))], 3)
    blend(canvas, (cheeks + 0.6 * nose).clip(0, 1) * np.float32(0.45 * marks.blush), rosy)
    sockets = soft_mask(both_sides(ellipse((eyes.half_spacing, eyes.y), (eyes.half_width + 2, 5))), 2.5)
    blend(canvas, sockets * np.float32(0.12 + 0.2 * min(eyes.bags, 1)), mix(skin, _TIRED, 0.6))
    under_lip = soft_mask([ellipse((0, mouth.y + mouth.lower + 3.5), (7, 1.2))], 1.2)
    blend(canvas, under_lip * np.float32(0.25), _times(skin, 0.6))


def _paint_marks(canvas: Bytes, identity: Identity, face: Floats, rng: np.random.Generator) -> None:
    marks, skin = identity.marks, identity.colours.skin
    if marks.freckles > 0:
        spots = rng.normal(0, 1, (int(70 * marks.freckles), 3))
        dots = [ellipse((18 * x, -3 + 8 * y), (0.35 + 0.15 * abs(size),) * 2) for x, y, size in spots]
        blend(canvas, soft_mask(dots, 0.3) * face * np.float32(0.6), mix(skin, _FRECKLE, 0.75))
    for x, y, radius in marks.moles:
        fill(canvas, ellipse((x, y), (radius, radius)), mix(skin, _MOLE, 0.8))


def _paint_nose(canvas: Bytes, identity: Identity) -> None:
    """Nostrils and the creases around the wings; the rest of a nose is shading."""
    nose, skin = identity.nose, identity.colours.skin
    nostril = ellipse((nose.half_width * 0.48, nose.tip_y + 4.6), (nose.half_width * 0.22, 0.5 + 0.9 * nose.nostrils))
    for outline in both_sides(nostril):
        fill(canvas, outline, mix(skin, _NOSTRIL, 0.45 + 0.4 * nose.nostrils))
    above, beside, below = (nose.half_width * 0.92, -1.5), (nose.half_width + 0.6, 2), (nose.half_width * 0.75, 5)
    crease = curve([above, beside, below]) + np.array([0, nose.tip_y], np.float32)
    strokes(canvas, both_sides(crease), mix(skin, _WING_CREASE, 0.35))


def _beard_outline(identity: Identity) -> Floats:
    """Where a beard grows: along the jaw, over the chin, up to the mouth and the nose."""
    head, mouth, nose = identity.head, identity.mouth, identity.nose
    upper_edge = [(mouth.half_width + 5, mouth.y - 9), (head.cheek * 0.72, 12), (head.cheek, -8)]
    lower_edge = [(head.jaw + 4, head.jaw_y), (head.chin + 3, head.chin_y), (0, head.chin_y + 4)]
    return loop(mirrored([(0, nose.tip_y + 8), *upper_edge, *lower_edge]))


def _moustache(identity: Identity) -> Floats:
    mouth = identity.mouth
    top_y = mouth.y - mouth.upper
    right = [(mouth.half_width * 0.5, top_y - 2.6), (mouth.half_width + 3, mouth.y + 2)]
    left = [(-x, y) for x, y in right[::-1]]
    return ribbon(curve([*left, (0, top_y - 2.2), *right]), 4.2)


def _paint_facial_hair(canvas: Bytes, identity: Identity, face: Floats, rng: np.random.Generator) -> None:
    facial, mouth = identity.facial_hair, identity.mouth
    jaw_share = max(0.34 * facial.stubble, facial.beard)
    if max(jaw_share, facial.moustache, facial.goatee) <= 0:
        return
    density = soft_mask([_beard_outline(identity)], 2.5) * np.float32(jaw_share)
    if facial.goatee > 0:
        chin = ellipse((0, mouth.y + mouth.lower + 14), (mouth.half_width * 0.85, 10))
        density = np.maximum(density, soft_mask([chin], 1.5) * np.float32(facial.goatee))
    if facial.moustache > 0:
        density = np.maximum(density, soft_mask([_moustache(identity)], 0.8) * np.float32(facial.moustache))
    lips = soft_mask([ellipse((0, mouth.y + 1), (mouth.half_width, mouth.lower + 2.5))], 1)
    grain = rng.uniform(0.55, 1.0, (SIDE // 2, SIDE // 2)).astype(np.float32)
    density = density * cv2.resize(grain, (SIDE, SIDE)) * (1 - lips) * face
    blend(canvas, density, mix(identity.colours.hair, _BEARD_TINT, 0.35))
