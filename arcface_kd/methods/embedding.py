r"""Embedding distillation: match the teacher's embedding.

    l2      weight * mean_i || f_s - f_t ||^2           summed over the dimension, averaged over the batch
    cosine  weight * mean_i ( 1 - cos(f_s, f_t) )

of unit embeddings. It is the feature distillation that PocketNet, MaskInv, QuantFace and AdaDistill's authors train or
compare with (Boutros et al., ECCV 2024, arXiv 2407.01332, section 4). For unit vectors the first is twice the second.

In a row's cosine the derivative of L2 is 2 weight, that of margin softmax with logit scale s about s (1 - p_y), which
goes from s = 64 at the start to a fraction of it. So a weight of 1, or the mean over the dimension in place of the sum,
does nothing beside a classification loss, and weights of 64 to 128 make the two alike in strength.
"""

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from arcface_kd.config.options import Options, Weight
from arcface_kd.losses.embedding_losses import squared_distance
from arcface_kd.methods.base import Batch, Method, Requirement, RunContext

Distance = Literal["l2", "cosine"]
Labels = Literal["classify", "none"]


@dataclass(frozen=True)
class EmbeddingConfig(Options):
    """Embedding distillation's knobs.

    Attributes:
        distance: ``l2`` (default) or ``cosine``, which is half of it.
        weight: of the distance, at least 0.
        labels: ``classify`` (default) trains the classification loss of the trainer, or of another method, as well;
            ``none`` leaves it out, and excludes methods that bring one.
    """

    distance: Distance = "l2"
    weight: Weight = 64.0
    labels: Labels = "classify"


class EmbeddingDistillation(Method):
    """Match the teacher's embedding: L2 or cosine, beside a classification loss or without labels.

    Terms: ``embedding``, the weighted distance.
    """

    Config = EmbeddingConfig
    requires = frozenset({Requirement.TEACHER_EMBEDDINGS})
    config: EmbeddingConfig

    def __init__(self, config: EmbeddingConfig, context: RunContext) -> None:
        super().__init__(config, context)
        self._distance: Tensor | None = None

    @classmethod
    def replaces_classifier(cls, config: Any) -> bool:
        """Whether the labels are left out."""
        return bool(config.labels == "none")

    @classmethod
    def needs_labels(cls, config: Any) -> bool:
        """No: where there are none, there is no classifier beside the distance."""
        return False

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The distance of the gathered batch, whether its rows have labels or not."""
        assert batch.teacher is not None
        distance = squared_distance(batch.projected, batch.teacher)
        self._distance = distance.detach()
        scale = self.config.weight if self.config.distance == "l2" else self.config.weight / 2
        return {"embedding": distance * scale}

    def observations(self) -> dict[str, Tensor]:
        """The mean cosine of student and teacher over the last gathered batch."""
        return {} if self._distance is None else {"embedding_cosine": 1 - self._distance / 2}
