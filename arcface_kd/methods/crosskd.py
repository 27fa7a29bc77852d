r"""CrossKD: the student's feature map through the teacher's frozen tail (Wang et al., CVPR 2024, arXiv 2306.11369).

    e_cross = tail_t( align_scale( adapter(map_s), map_t ) )
    embedding  w_e mean_i [ 1 - cos(e_cross, e_t) ]
    logits     w_l T^2 mean_i KL(p_t || p_cross),    p = softmax(s cos(e, W_t) / T), no margin on either side

with the teacher's embedding e_t and classifier W_t. The teacher is mimicked behind its own tail, so the student's own
embedding gets the loss of the labels and nothing else: the two signals meet in its feature map and never contradict
each other in its head. The tail stays in evaluation mode, the gradient passes through it, and nothing of it is left in
the trained student.

The paper is about detection heads. Chosen here, for embedding networks: the tail begins behind the last feature map
(``tap`` moves both taps towards the image), the adapter for unequal maps, the two distances and their weights.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from arcface_kd.config.options import Options, Range, Temperature, Weight
from arcface_kd.distributed.ranks import for_ddp
from arcface_kd.losses.class_weights import format_of_sums
from arcface_kd.losses.embedding_losses import squared_distance
from arcface_kd.losses.logit_distillation import logit_distillation, teacher_logits
from arcface_kd.losses.map_alignment import align_scale
from arcface_kd.methods.base import Batch, MapsWanted, Method, Requirement, RunContext
from arcface_kd.methods.class_centers import FrozenCenters
from arcface_kd.methods.class_sampling import step_classes

Mimic = Literal["embedding", "logits", "both"]
Statistics = Literal["rank", "all"]
AdapterKind = Literal["auto", "conv"]


@dataclass(frozen=True)
class CrossKDConfig(Options):
    """CrossKD's knobs.

    Attributes:
        mimic: what behind the tail is compared: the ``embedding`` (default), the ``logits`` of the teacher's
            classifier, or ``both``.
        embedding_weight: w_e, at least 0.
        logit_weight: w_l, at least 0.
        temperature: T of the logits, at least 1.
        align: with align_scale (default), or without it for the ablation.
        statistics: align_scale's are those of this ``rank``'s images (default, as published) or of ``all`` ranks'.
        adapter: ``auto`` (default) is a 1x1 convolution where student and teacher differ in channels and nothing where
            they do not; ``conv`` is one in any case. Maps of unequal size are pooled to the teacher's.
        tap: where both maps are taken: 0 (default) the last map, 1 the last one at twice its size, ... up to 3.
        student_map: path of the student's module that returns its map, in place of ``tap``.
        teacher_map: the same in the teacher, or the name of a tensor of its ONNX graph.
    """

    mimic: Mimic = "embedding"
    embedding_weight: Weight = 64.0
    logit_weight: Weight = 1.0
    temperature: Temperature = 4.0
    align: bool = True
    statistics: Statistics = "rank"
    adapter: AdapterKind = "auto"
    tap: Annotated[int, Range(0, 3)] = 0
    student_map: str | None = None
    teacher_map: str | None = None


class Adapter(nn.Module):
    """Gives the student's map (C, H, W) the shape of the teacher's: a 1x1 convolution and average pooling.

    The two commute, so the convolution is made at the smaller of the two sizes. ``auto`` leaves it out where the
    channels agree.
    """

    def __init__(
        self, student: tuple[int, int, int], teacher: tuple[int, int, int], kind: AdapterKind, seed: int
    ) -> None:
        super().__init__()
        self.size = teacher[1:]
        self.pools_first = student[1] * student[2] > teacher[1] * teacher[2]
        self.conv: nn.Conv2d | None = None
        if kind == "conv" or student[0] != teacher[0]:
            self.conv = nn.Conv2d(student[0], teacher[0], 1)
            with torch.no_grad():
                nn.init.orthogonal_(self.conv.weight, generator=torch.Generator().manual_seed(seed))
                nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]

    def forward(self, feature_map: Tensor) -> Tensor:
        """Turn (B, C, H, W) into (B, Ct, Ht, Wt)."""
        if self.pools_first:
            feature_map = self._pooled(feature_map)
        if self.conv is not None:
            feature_map = self.conv(feature_map.to(self.conv.weight.dtype))
        return self._pooled(feature_map)

    def _pooled(self, feature_map: Tensor) -> Tensor:
        return feature_map if feature_map.shape[2:] == self.size else adaptive_avg_pool2d(feature_map, self.size)


class CrossKD(Method):
    """The student's feature map through the teacher's frozen tail; its own embedding learns from the labels alone.

    Terms: ``cross_embedding`` and ``cross_logits``, as ``mimic`` says. The adapter is the head's: it is saved with its
        state, learned with its group of the optimiser, and no part of ``model.pt``.
    """

    Config = CrossKDConfig
    requires = frozenset({Requirement.TEACHER_EMBEDDINGS, Requirement.TEACHER_TAIL, Requirement.STUDENT_FEATURE_MAP})
    projects = False
    computes_part = True
    config: CrossKDConfig

    def __init__(self, config: CrossKDConfig, context: RunContext) -> None:
        super().__init__(config, context)
        # Without them the run was stopped before it came here, see `requires`.
        assert context.teacher_tail is not None
        assert context.teacher_map_shape is not None
        assert context.student_map_shape is not None
        self.adapter = Adapter(context.student_map_shape, context.teacher_map_shape, config.adapter, context.seed)
        for parameter in self.adapter.parameters():
            context.ranks.average_gradient(parameter)
        self.teacher_centers: FrozenCenters | None = None
        if config.mimic != "embedding":
            assert context.teacher_classifier is not None
            self.teacher_centers = FrozenCenters(context.teacher_classifier, context.shard, context.product_dtype)
        self._cosine: Tensor | None = None

    @classmethod
    def requirements(cls, config: Any) -> frozenset[Requirement]:
        """With logits, the teacher's classifier as well."""
        return cls.requires if config.mimic == "embedding" else cls.requires | {Requirement.TEACHER_CLASSIFIER}

    @classmethod
    def maps_wanted(cls, config: Any) -> MapsWanted:
        """The student's map, and the teacher's for its statistics."""
        return MapsWanted(config.student_map, config.teacher_map, config.tap, teacher_maps=config.align)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Compare what the teacher's tail makes of the student's map with what the teacher makes of the image."""
        assert batch.teacher is not None
        ranks = self.context.ranks
        cross = ranks.gather_with_gradient(for_ddp(self._cross_embeddings(batch), ranks.world_size), batch.sizes)
        terms = {}
        distance = squared_distance(cross, batch.teacher)
        self._cosine = 1 - distance.detach() / 2
        if self.config.mimic != "logits":
            # For unit vectors, half of it is 1 - cos, and nothing cancels where the two are near.
            terms["cross_embedding"] = ranks.computed_by_all(self.config.embedding_weight / 2 * distance)
        if self.config.mimic != "embedding":
            terms["cross_logits"] = self.config.logit_weight * self._divergence(cross, batch)
        return terms

    def _cross_embeddings(self, batch: Batch) -> Tensor:
        """(b, Dt) of this rank's images."""
        assert batch.student_map is not None
        assert self.context.teacher_tail is not None
        config, student_map = self.config, batch.student_map
        # Whatever the student computes in, and whatever region the head is called in: the tail has its own precision.
        with torch.autocast(student_map.device.type, enabled=False):
            feature_map: Tensor = self.adapter(student_map.to(format_of_sums(student_map)))
            if config.align:
                assert batch.teacher_map is not None
                together = self.context.ranks if config.statistics == "all" else None
                feature_map = align_scale(feature_map, batch.teacher_map, together)
            return self.context.teacher_tail(feature_map)

    def _divergence(self, cross: Tensor, batch: Batch) -> Tensor:
        """T^2 KL of the two embeddings' logits, both against this rank's rows of the teacher's classifier."""
        assert batch.teacher is not None
        assert self.teacher_centers is not None
        margin = self.context.margin
        weights = self.context.class_weights(self.teacher_centers, step_classes(self.context, batch))
        teacher = teacher_logits(
            batch.teacher.to(cross.dtype), batch.labels, weights, margin.scale, self.config.temperature
        )
        return logit_distillation(cross, batch.labels, weights, teacher, margin, row_m2=batch.row_m2).primary

    def observations(self) -> dict[str, Tensor]:
        """The mean cosine of cross and teacher embeddings over the last gathered batch."""
        return {} if self._cosine is None else {"cross_cosine": self._cosine}
