"""The trainer's own classification: a learned classifier under margin softmax, sharded as PartialFC does."""

from torch import Tensor, nn

from arcface_kd.config.options import Options
from arcface_kd.losses.margin_softmax import sharded_margin_softmax
from arcface_kd.methods.base import Batch, Method, RunContext
from arcface_kd.methods.class_centers import initial_centers
from arcface_kd.methods.class_sampling import step_classes


class LearnedClassifier(Method):
    """Margin softmax over class centers that the optimiser learns (An et al., CVPR 2022, arXiv 2203.15565).

    Terms: ``ce``, the margin softmax. It stands beside every method that does not bring a classification of its own,
        and alone when distillation is off.
    """

    # No knobs: margin, sample rate and filter are the trainer's own keys.
    Config = Options
    classifies = True
    computes_part = True
    sharded = ("weight",)

    def __init__(self, context: RunContext) -> None:
        super().__init__(Options(), context)
        self.shard = context.ranks.shard(context.num_classes)
        self.weight = nn.Parameter(initial_centers(self.shard, context.embedding_size, context.seed))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Score the student against the learned class centers."""
        weights = self.context.class_weights(self.weight, step_classes(self.context, batch))
        loss = sharded_margin_softmax(batch.embeddings, batch.labels, weights, self.context.margin, row_m2=batch.row_m2)
        return {"ce": loss}
