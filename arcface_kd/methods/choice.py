"""Which method to choose, by the number of identities, images and labels."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# Measured were 985 identities, published are 85,742.
MANY_IDENTITIES = 10_000
FEW_IMAGES = 5


class Records(NamedTuple):
    """The counts that decide on a method."""

    images: int  # number of images
    labelled: int  # images with a label
    identities: int  # of these

    @classmethod
    def of(cls, labels: NDArray[np.int64]) -> "Records":
        """Count labels (N,), where -1 is none."""
        known = labels[labels >= 0]
        return cls(len(labels), len(known), len(np.unique(known)))

    @property
    def many(self) -> bool:
        """Whether there are many identities."""
        return self.identities >= MANY_IDENTITIES

    @property
    def few_images(self) -> bool:
        """Whether there are few images of each identity on average, all of them labelled."""
        return 0 < self.labelled <= FEW_IMAGES * self.identities and self.labelled == self.images

    def __str__(self) -> str:
        told = f"{self.images:,} images, {self.identities:,} identities"
        if self.labelled < self.images:
            return f"{told}, {self.images - self.labelled:,} images without a label"
        return f"{told}, {self.labelled / max(1, self.identities):.1f} images an identity"


class Choice(NamedTuple):
    """One line of the table."""

    have: str  # what one has
    take: str  # the method, as flags
    why: str  # the row that says so, measured here or published
    fits: Callable[[Records], bool]  # whether some records are such


CHOICES = (
    Choice(
        "no labels",
        "--kd bank",
        "measured on 6,433 images: 92.4 % in 12 epochs (90.3 to 92.5 % by embedding distillation), level in 30; "
        "embedding distillation with student.augment=strong has 96.5 % in 60",
        lambda records: not records.identities,
    ),
    Choice(
        "under 10,000 identities, at most 5 images of each on average",
        "--kd tcs",
        "measured at 5, 2, 1 images of 985 identities: 86.1, 83.3, 74.5 % against 78.8, 74.7, 68.0 % alone",
        lambda records: records.few_images and not records.many,
    ),
    Choice(
        "under 10,000 identities, with or without further images of nobody",
        "--kd embedding --kd-option embedding.labels=none",
        "measured on 985 identities: 91.1 % against 84.8 % alone, 89.3 % with adadistill; in 30 epochs "
        "92.4 % (93.0 % with tcs) against 90.8 % with adadistill, in 60 93.8 %, 96.5 % with student.augment=strong",
        lambda records: records.identities > 0 and not records.many and not records.few_images,
    ),
    Choice(
        "10,000 identities and more",
        "--kd adadistill",
        "published, MS1MV2: IJB-C 93.3 % at FAR 1e-4 against 89.1 % alone, 91.3 % by embedding distillation",
        lambda records: records.many,
    ),
    Choice(
        "the same, the teacher's classifier for them, and no time to run the teacher",
        "--kd arcdistill",
        "published, MS1MV2: IJB-C 91.7 % at FAR 1e-4 against 89.1 % alone",
        lambda records: records.many,
    ),
    Choice(
        "10,000 identities and more, and further images of nobody",
        "--kd adadistill+embedding",
        "measured on 985 identities, all labelled: TAR at FAR 1e-2 73.0 % against 60.3 % with adadistill",
        lambda records: records.many and records.labelled < records.images,
    ),
)


def choices_for(records: Records) -> list[Choice]:
    """The lines of the table that fit some records, at least one."""
    return [choice for choice in CHOICES if choice.fits(records)]
