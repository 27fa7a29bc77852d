r"""Similarity-preserving distillation (Tung and Mori, ICCV 2019, arXiv 1907.09682) as a method of arcface_kd.

With F the (B, D) embeddings of a batch, and G = F F^T whose rows are normalised:

    loss = weight * || G_student - G_teacher ||^2 / B^2

Rows that the teacher finds alike are to be alike for the student. Published: weight 3000, beside a classification loss.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import normalize

from arcface_kd.methods.base import Batch, Method, Requirement


@dataclass(frozen=True)
class SimilarityConfig:
    """The knobs, each an option on the command line: ``--kd-option similarity.weight=100``.

    Attributes:
        weight: of the loss, at least 0.

    Raises:
        ValueError: a negative weight; arcface_kd turns it into one line that names the option.
    """

    weight: float = 3000.0

    def __post_init__(self) -> None:
        if not self.weight >= 0:
            raise ValueError(f"weight is {self.weight}; it must be at least 0")


class SimilarityPreserving(Method):
    """Rows that the teacher finds alike are to be alike for the student.

    Terms: ``similarity``.

    Args:
        config: the knobs.
        context: the run.
    """

    Config = SimilarityConfig
    requires: ClassVar[frozenset[Requirement]] = frozenset({Requirement.TEACHER_EMBEDDINGS})
    # It compares the student with itself, so the dimensions of student and teacher may differ.
    projects: ClassVar[bool] = False
    config: SimilarityConfig

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The loss of the gathered batch, which every rank sees and computes in full.

        Args:
            batch: the gathered batch, with teacher embeddings.

        Returns:
            ``{"similarity": scalar}``.
        """
        # `requires` has made sure that there is a teacher.
        assert batch.teacher is not None
        student, teacher = normalize(batch.embeddings.float()), normalize(batch.teacher.float())
        difference = normalize(student @ student.T) - normalize(teacher @ teacher.T)
        loss = self.config.weight * difference.square().mean()
        return {"similarity": self.context.ranks.computed_by_all(loss)}
