"""What ``student.augment`` says: the ways in which a student's images are degraded, and how often each."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Annotated

from arcface_kd.config.options import Options, Range, build
from arcface_kd.errors import ConfigError, suggestion

Probability = Annotated[float, Range(0, 1)]


@dataclass(frozen=True)
class Augmentation(Options):
    """Probabilities in [0, 1] of what :mod:`arcface_kd.data.views` does to an image, each drawn by itself.

    Attributes:
        crop: leave a part of the image in its place, and the rest black.
        lowres: make it smaller, and as large as it was.
        photometric: change brightness, contrast and saturation.
        affine: turn, scale and shift it a little.
        mix: lay another face over it; the mixture has no label.
    """

    crop: Probability = 0.0
    lowres: Probability = 0.0
    photometric: Probability = 0.0
    affine: Probability = 0.0
    mix: Probability = 0.0

    @classmethod
    def read(cls, words: Sequence[str]) -> "Augmentation":
        """Read ``student.augment``: one of :data:`PRESETS`, or several ``NAME:PROBABILITY``."""
        if len(words) == 1 and words[0] in PRESETS:
            return PRESETS[words[0]]
        chances: dict[str, object] = {}
        for word in words:
            name, colon, chance = word.partition(":")
            if not colon:
                raise ConfigError(
                    f"student.augment is {','.join(words)!r}; it must be one of {', '.join(PRESETS)}, or a list such "
                    f"as crop:0.2,lowres:0.2{suggestion(word, PRESETS)}"
                )
            if name in chances:
                raise ConfigError(f"student.augment is {','.join(words)!r}; it names {name} twice")
            chances[name] = chance
        return build(cls, chances, "student.augment")

    def __bool__(self) -> bool:
        return any(vars(self).values())

    def __str__(self) -> str:
        found = [(field.name, getattr(self, field.name)) for field in fields(self)]
        return ",".join(f"{name}:{chance:g}" for name, chance in found if chance) or "flip"


PRESETS = {
    "flip": Augmentation(),
    # Published, see arcface_kd.data.views.
    "quality": Augmentation(crop=0.2, lowres=0.2, photometric=0.2),
    # Chosen here.
    "strong": Augmentation(crop=0.2, lowres=0.2, photometric=0.2, affine=0.5, mix=0.5),
}
