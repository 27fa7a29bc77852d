r"""Similarity-preserving distillation (Tung and Mori, ICCV 2019, arXiv 1907.09682) as a method of arcface_kd.

With F the (B, D) embeddings of a batch, and G = F F^T whose rows are normalised:

    loss = weight * || G_student - G_teacher ||^2 / B^2

Published: weight 3000, beside a classification loss.
"""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import normalize

from arcface_kd.config.options import Options, Weight
from arcface_kd.methods.base import Batch, Method, Requirement


@dataclass(frozen=True)
class SimilarityConfig(Options):
    """Each field is an option on the command line: ``--kd-option similarity.weight=100``."""

    weight: Weight = 3000.0


class SimilarityPreserving(Method):
    """Rows that the teacher finds alike are to be alike for the student."""

    Config = SimilarityConfig
    requires = frozenset({Requirement.TEACHER_EMBEDDINGS})
    # It compares the student with itself, so the dimensions of student and teacher may differ.
    projects = False

    @classmethod
    def needs_labels(cls, config: SimilarityConfig) -> bool:
        """No."""
        return False

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The loss terms of the gathered batch, by name."""
        assert batch.teacher is not None
        student, teacher = normalize(batch.embeddings.float()), normalize(batch.teacher.float())
        difference = normalize(student @ student.T) - normalize(teacher @ teacher.T)
        return {"similarity": self.config.weight * difference.square().mean()}
