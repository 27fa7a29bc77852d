r"""RKD: relational knowledge distillation (Park, Kim, Lu, Cho, CVPR 2019, arXiv 1904.05068).

Compared are not the embeddings themselves, but their distances and angles to each other. With psi over the rows of the
gathered batch and Huber's difference l (quadratic below 1, then linear):

    psi_ij  = || f_i - f_j || / mean over pairs             the relative distance of two rows
    psi_ijk = cos of the angle at j between i and k         the angle at which a row sees two others
    loss = 25 mean_ij l(psi_ij of the student, of the teacher) + 50 mean_ijk l(psi_ijk of the student, of the teacher)

25 and 50 are the published weights beside a classification loss; the means over all ordered pairs and triples, those of
a row with itself included, are the published code's. Chosen here: unit embeddings, since faces are compared by their
cosine. Time grows with the cube of the gathered batch, which is shared out among the ranks.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from arcface_kd.config.options import Options, Weight
from arcface_kd.errors import ConfigError
from arcface_kd.losses.embedding_losses import angle_loss, distance_loss
from arcface_kd.methods.base import Batch, Method, Requirement


@dataclass(frozen=True)
class RKDConfig(Options):
    """RKD's knobs.

    Attributes:
        distance_weight: of the difference of relative distances, at least 0.
        angle_weight: of the difference of angles, at least 0; a weight of 0 takes the term out.

    Raises:
        ConfigError: both are 0.
    """

    distance_weight: Weight = 25.0
    angle_weight: Weight = 50.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.distance_weight == self.angle_weight == 0:
            raise ConfigError("distance_weight and angle_weight are both 0; one of them must be positive")


class RKD(Method):
    """Match the teacher's relative distances and angles between the rows of a batch.

    Terms: ``rkd_distance`` and ``rkd_angle``, weighted; one with a weight of 0 is left out.
    """

    Config = RKDConfig
    requires = frozenset({Requirement.TEACHER_EMBEDDINGS})
    projects = False
    config: RKDConfig

    @classmethod
    def needs_labels(cls, config: Any) -> bool:
        """No."""
        return False

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The gathered batch's relations, of which each rank takes its own rows' part."""
        assert batch.teacher is not None
        ranks = self.context.ranks
        rows = ranks.own_slice(batch.sizes)
        terms: dict[str, Tensor] = {}
        if self.config.distance_weight:
            part = distance_loss(batch.embeddings, batch.teacher, rows)
            terms["rkd_distance"] = ranks.computed_in_parts(part * self.config.distance_weight)
        if self.config.angle_weight:
            part = angle_loss(batch.embeddings, batch.teacher, rows)
            terms["rkd_angle"] = ranks.computed_in_parts(part * self.config.angle_weight)
        return terms
