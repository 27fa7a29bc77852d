"""What makes a synthetic person: the geometry and the colours that all images of one identity share.

Lengths are face units (see :mod:`.canvas`): pixels of the aligned crop, origin at the nose tip of the average face.
The averages follow the landmarks of the ArcFace template: eyes at y = -20, mouth at y = +20, 35 between the eyes.
"""

from dataclasses import dataclass
from enum import Enum

import numpy as np

from arcface_kd.data.synthetic_faces.canvas import Colour, mix

_SPREAD_LIMIT = 2.2
"""Traits stay within this many standard deviations: beyond it anatomy breaks (lids cross, the mouth meets the nose)."""

SKIN_TONES = ((238, 204, 186), (228, 186, 158), (210, 164, 132), (180, 130, 98), (136, 93, 68), (94, 64, 50))
"""From pale to dark, as seen in neutral light."""

HAIR_TONES = {
    "black": (42, 36, 35),
    "dark brown": (66, 48, 39),
    "brown": (98, 68, 46),
    "light brown": (142, 106, 72),
    "blond": (204, 170, 114),
    "red": (146, 70, 36),
    "grey": (146, 144, 142),
    "white": (212, 210, 206),
}

IRIS_TONES = ((66, 42, 28), (84, 56, 34), (112, 86, 48), (100, 116, 80), (106, 138, 166), (130, 142, 150))

GLASSES_TONES = ((24, 22, 22), (70, 44, 28), (130, 128, 130), (150, 116, 60), (90, 26, 34))


class HairStyle(Enum):
    """How the hair frames the face; what the crop shows of it."""

    BALD = "bald"
    CROPPED = "cropped"
    RECEDING = "receding"
    SHORT = "short"
    SIDE_PART = "side part"
    FRINGE = "fringe"
    LONG = "long"
    CURLY = "curly"


@dataclass(frozen=True)
class Head:
    """Outline of the head, half widths and heights."""

    temple: float
    cheek: float
    jaw: float
    jaw_y: float
    chin: float
    chin_y: float
    crown_y: float
    depth: float
    ear_size: float
    ear_protrusion: float


@dataclass(frozen=True)
class Eyes:
    """Both eyes; ``tilt`` raises the outer corner, ``hood`` hides the crease."""

    half_spacing: float
    y: float
    half_width: float
    upper: float
    lower: float
    tilt: float
    iris: float
    crease: float
    lashes: float
    bags: float
    socket: float


@dataclass(frozen=True)
class Brows:
    """Both brows; ``lift`` is the distance from eye centre to brow, ``slope`` raises the outer end."""

    lift: float
    inner: float
    outer: float
    thickness: float
    arch: float
    slope: float
    density: float
    ridge: float


@dataclass(frozen=True)
class Nose:
    """Nose; ``bridge`` and ``tip`` are heights above the cheek, ``hump`` bends the bridge outward."""

    tip_y: float
    half_width: float
    bridge_half_width: float
    bridge: float
    tip: float
    hump: float
    bend: float
    nostrils: float


@dataclass(frozen=True)
class Mouth:
    """Mouth; ``bow`` is the dip of the upper lip, ``corner`` raises the corners."""

    y: float
    half_width: float
    upper: float
    lower: float
    bow: float
    corner: float
    skew: float


@dataclass(frozen=True)
class Cheeks:
    """Relief of cheeks and chin."""

    bone: float
    bone_y: float
    hollow: float
    chin: float
    cleft: float


@dataclass(frozen=True)
class Hair:
    """Hair on the head."""

    style: HairStyle
    volume: float
    hairline_y: float
    parting: float
    length_y: float
    side_cover: float
    contrast: float


@dataclass(frozen=True)
class FacialHair:
    """Strengths in [0, 1]; zero is shaven."""

    stubble: float
    moustache: float
    goatee: float
    beard: float


@dataclass(frozen=True)
class Marks:
    """What skin carries: strengths in [0, 1], moles as rows (x, y, radius)."""

    freckles: float
    blush: float
    mottle: float
    forehead_lines: float
    nasolabial: float
    crow_feet: float
    moles: tuple[tuple[float, float, float], ...]
    oiliness: float


@dataclass(frozen=True)
class Glasses:
    """The pair that a person owns and how often it is worn."""

    worn: float
    half_width: float
    half_height: float
    squareness: float
    frame_pixels: int
    colour: Colour


@dataclass(frozen=True)
class Colours:
    """RGB in neutral light."""

    skin: Colour
    hair: Colour
    brow: Colour
    iris: Colour
    lips: Colour


@dataclass(frozen=True)
class Identity:
    """One synthetic person."""

    head: Head
    eyes: Eyes
    brows: Brows
    nose: Nose
    mouth: Mouth
    cheeks: Cheeks
    hair: Hair
    facial_hair: FacialHair
    marks: Marks
    glasses: Glasses
    colours: Colours


@dataclass(frozen=True)
class _Person:
    """What correlates the traits of one person, all in [0, 1]; the rest is drawn independently."""

    male: float
    age: float
    melanin: float


def within(value: float, low: float, high: float) -> float:
    """Clip a number; many times faster than ``np.clip`` on one."""
    return min(max(value, low), high)


def about(rng: np.random.Generator, mean: float, deviation: float) -> float:
    """Draw a trait from a normal distribution without its tails."""
    return mean + deviation * within(rng.standard_normal(), -_SPREAD_LIMIT, _SPREAD_LIMIT)


def chance(rng: np.random.Generator, probability: float) -> bool:
    """Throw a coin."""
    return bool(rng.random() < probability)


def _between_tones(tones: tuple[tuple[int, int, int], ...], position: float) -> Colour:
    """The colour at ``position`` in [0, 1] of a row of tones."""
    place = position * (len(tones) - 1)
    lower = min(int(place), len(tones) - 2)
    return mix(tones[lower], tones[lower + 1], place - lower)


def _head(rng: np.random.Generator, person: _Person) -> Head:
    cheek = about(rng, 43.5, 2.6)
    return Head(
        temple=cheek - about(rng, 3.0, 1.3),
        cheek=cheek,
        jaw=cheek - about(rng, 9.0 - 3.0 * person.male, 2.2),
        jaw_y=about(rng, 25, 3),
        chin=about(rng, 12 + 4 * person.male, 2.5),
        chin_y=about(rng, 45 + 2 * person.male, 3),
        crown_y=about(rng, -80, 3),
        depth=about(rng, 27, 2),
        ear_size=about(rng, 1.0 + 0.1 * person.male, 0.14),
        ear_protrusion=abs(about(rng, 2.5, 1.8)),
    )


def _eyes(rng: np.random.Generator, person: _Person) -> Eyes:
    return Eyes(
        half_spacing=about(rng, 17.6, 1.1),
        y=about(rng, -20.4, 0.9),
        half_width=about(rng, 7.4, 0.7),
        upper=about(rng, 3.0 - 0.3 * person.male, 0.6),
        lower=about(rng, 1.7, 0.35),
        tilt=about(rng, 0.06, 0.09),
        iris=about(rng, 3.1, 0.2),
        crease=max(0.0, about(rng, 1.7, 1.1)),
        lashes=within(about(rng, 0.8 - 0.6 * person.male, 0.2), 0, 1),
        bags=max(0.0, about(rng, 0.5 * person.age, 0.3)),
        socket=about(rng, 3.6, 1.3),
    )


def _brows(rng: np.random.Generator, person: _Person) -> Brows:
    return Brows(
        lift=about(rng, 10.0 - 1.2 * person.male, 1.4),
        inner=about(rng, 8.0, 1.6),
        outer=about(rng, 27.0, 1.8),
        thickness=max(0.9, about(rng, 2.0 + 1.2 * person.male, 0.7)),
        arch=about(rng, 2.6 - 1.2 * person.male, 1.1),
        slope=about(rng, 0.0, 1.4),
        density=within(about(rng, 0.7, 0.22), 0.2, 1),
        ridge=about(rng, 1.0 + 1.6 * person.male, 0.7),
    )


def _nose(rng: np.random.Generator, person: _Person) -> Nose:
    return Nose(
        tip_y=about(rng, 0.0, 1.8),
        half_width=about(rng, 8.0 + 0.6 * person.male + 1.4 * person.melanin, 1.1),
        bridge_half_width=about(rng, 4.2, 0.7),
        bridge=about(rng, 6.0 - 1.6 * person.melanin, 1.4),
        tip=about(rng, 11.5, 1.5),
        hump=about(rng, 0.3, 0.8),
        bend=about(rng, 0.0, 0.7),
        nostrils=within(about(rng, 0.6, 0.22), 0.1, 1),
    )


def _mouth(rng: np.random.Generator, person: _Person) -> Mouth:
    return Mouth(
        y=about(rng, 20.3, 1.4),
        half_width=about(rng, 14.2, 1.4),
        upper=max(1.2, about(rng, 3.0 - 0.7 * person.male + 1.0 * person.melanin, 0.8)),
        lower=max(1.8, about(rng, 4.2 - 0.6 * person.male + 1.0 * person.melanin, 0.9)),
        bow=abs(about(rng, 0.9, 0.5)),
        corner=about(rng, 0.0, 0.8),
        skew=about(rng, 0.0, 0.02),
    )


def _cheeks(rng: np.random.Generator, person: _Person) -> Cheeks:
    return Cheeks(
        bone=about(rng, 2.4, 1.1),
        bone_y=about(rng, -4, 2.5),
        hollow=max(0.0, about(rng, 1.0 + 0.8 * person.age, 1.0)),
        chin=about(rng, 3.5, 1.2),
        cleft=float(rng.uniform(0.4, 1.2)) if chance(rng, 0.08 + 0.15 * person.male) else 0.0,
    )


def _hair(rng: np.random.Generator, person: _Person) -> Hair:
    male_styles = {
        HairStyle.BALD: 0.05 + 0.2 * person.age,
        HairStyle.CROPPED: 0.25,
        HairStyle.RECEDING: 0.05 + 0.3 * person.age,
        HairStyle.SHORT: 0.35,
        HairStyle.SIDE_PART: 0.25,
        HairStyle.CURLY: 0.1,
        HairStyle.FRINGE: 0.08,
        HairStyle.LONG: 0.05,
    }
    female_styles = {
        HairStyle.LONG: 0.5,
        HairStyle.FRINGE: 0.3,
        HairStyle.SIDE_PART: 0.2,
        HairStyle.CURLY: 0.2,
        HairStyle.SHORT: 0.15,
        HairStyle.CROPPED: 0.03,
    }
    styles = male_styles if person.male > 0.5 else female_styles
    weights = np.array(list(styles.values()))
    style = list(styles)[int(rng.choice(len(weights), p=weights / weights.sum()))]
    return Hair(
        style=style,
        volume=max(2.0, about(rng, 8.0, 3.0)),
        hairline_y=about(rng, -56 - 3 * person.age * person.male, 3.5),
        parting=float(rng.uniform(-24, 24)),
        length_y=float(rng.uniform(15, 75)),
        side_cover=max(0.0, about(rng, 3.5, 2.5)),
        contrast=float(rng.uniform(0.18, 0.42)),
    )


def _facial_hair(rng: np.random.Generator, person: _Person) -> FacialHair:
    if person.male < 0.5:
        return FacialHair(stubble=0.0, moustache=0.0, goatee=0.0, beard=0.0)
    bearded = chance(rng, 0.2)
    return FacialHair(
        stubble=float(rng.beta(1.2, 1.6)),
        moustache=float(rng.uniform(0.5, 1)) if bearded or chance(rng, 0.15) else 0.0,
        goatee=float(rng.uniform(0.5, 1)) if bearded or chance(rng, 0.12) else 0.0,
        beard=float(rng.uniform(0.5, 1)) if bearded else 0.0,
    )


def _marks(rng: np.random.Generator, person: _Person, head: Head) -> Marks:
    moles = tuple(
        (float(rng.uniform(-0.8, 0.8) * head.cheek), float(rng.uniform(-45, 38)), float(rng.uniform(0.5, 1.1)))
        for _ in range(int(rng.poisson(0.9)))
    )
    return Marks(
        freckles=float(rng.uniform(0.3, 1)) if chance(rng, 0.2 * (1 - person.melanin)) else 0.0,
        blush=float(rng.beta(1.5, 2)) * (1 - 0.6 * person.melanin),
        mottle=float(rng.uniform(0.2, 1)),
        forehead_lines=max(0.0, about(rng, 1.3 * person.age - 0.3, 0.3)),
        nasolabial=max(0.05, about(rng, 0.25 + 0.9 * person.age, 0.2)),
        crow_feet=max(0.0, about(rng, 1.2 * person.age - 0.4, 0.25)),
        moles=moles,
        oiliness=float(rng.uniform(0.02, 0.16)),
    )


def _glasses(rng: np.random.Generator) -> Glasses:
    owns = chance(rng, 0.25)
    return Glasses(
        worn=float(rng.uniform(0.3, 0.95)) if owns else 0.03,
        half_width=about(rng, 13.0, 1.0),
        half_height=about(rng, 9.5, 1.3),
        squareness=float(rng.uniform(0, 1)),
        frame_pixels=int(rng.integers(1, 4)),
        colour=np.array(GLASSES_TONES[int(rng.integers(len(GLASSES_TONES)))], np.float32),
    )


def _colours(rng: np.random.Generator, person: _Person) -> Colours:
    skin = _between_tones(SKIN_TONES, person.melanin)
    skin = skin * np.float32(about(rng, 1, 0.025)) + np.array([about(rng, 0, 4), 0, about(rng, 0, 6)], np.float32)
    if chance(rng, 1.6 * (person.age - 0.55)):
        hair_name = "white" if chance(rng, 0.35) else "grey"
    elif chance(rng, 1.8 * person.melanin):
        hair_name = "black" if chance(rng, 0.7) else "dark brown"
    else:
        hair_name = ("black", "dark brown", "brown", "light brown", "blond", "red")[int(rng.integers(6))]
    hair = np.array(HAIR_TONES[hair_name], np.float32) * np.float32(about(rng, 1, 0.09))
    iris = _between_tones(IRIS_TONES, float(rng.random()) * (1 if chance(rng, 1 - person.melanin) else 0.3))
    lip_red = mix(skin * np.float32(0.72), (176, 74, 78), about(rng, 0.42 - 0.2 * person.male, 0.1))
    brow = mix(hair, (52, 38, 30), within(about(rng, 0.35, 0.2), 0, 1))
    return Colours(skin=np.clip(skin, 20, 252), hair=hair, brow=brow, iris=iris, lips=lip_red)


def draw_identity(rng: np.random.Generator) -> Identity:
    """Draw one person from the population."""
    person = _Person(male=float(rng.beta(0.6, 0.6)), age=float(rng.beta(1.3, 1.8)), melanin=float(rng.beta(0.9, 1.3)))
    head = _head(rng, person)
    return Identity(
        head=head,
        eyes=_eyes(rng, person),
        brows=_brows(rng, person),
        nose=_nose(rng, person),
        mouth=_mouth(rng, person),
        cheeks=_cheeks(rng, person),
        hair=_hair(rng, person),
        facial_hair=_facial_hair(rng, person),
        marks=_marks(rng, person, head),
        glasses=_glasses(rng),
        colours=_colours(rng, person),
    )
