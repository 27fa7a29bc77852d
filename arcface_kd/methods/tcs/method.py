r"""TCS, the tailored coordinate system: distilling from cached embeddings alone (Zhou, Zhu, Wu, AAAI 2025, 2412.09388).

The teacher embeds the training images once. The principal components of its embeddings are a coordinate system, with
the mean mu as origin and orthonormal axes V. The student's embedding is a vector of coordinates c_s in that system, is
classified there, and the system is tailored to the task: axes that the classification does not need are dropped. There
is no teacher in training. With the mask m of the axes that are left,

    loss = margin softmax of (m * c_s) over a learned classifier  +  mimic * mean_i || m * (c_s - (f_t - mu) V) ||^2

where c_s = (f_s - mu) V for the student's place f_s = mu + V c_s in the teacher's space. Every so often, the axes of
least importance are dropped: an axis's importance is the sum over steps of | d margin softmax / d m_j * m_j |.

Published, without code: principal components of one forward pass as the system; the student trained in it, then
classified; a mask whose importance is accumulated from gradients and whose least useful entries are dropped step by
step; everything linear, folded into the last layer. Of the same group: the mimic term, weight 1 : 1 with a cross
entropy, V holding about 60 % of the variance.

Chosen here, for faces:

- Teacher embeddings are unit vectors, from the cache, both views of each image.
- The linear part is folded from the first step on and not at the end, see :mod:`.coordinate_system`, so that
  ``model.pt`` is a plain backbone at every epoch.
- Axes that are not there or were dropped are zeros in the embedding, whose size stays as configured. So cosines are
  those of the coordinates, and the first numbers are those that count most.
- The mimic weight: a sum over axes of unit vectors needs 64, the logit scale, to be heard beside margin softmax.
- Each step's importance is divided by its sum, so that neither the falling loss nor a loss scale for fp16 lets some
  steps count more than others. It begins anew after each round of dropping.
- When axes are dropped, and how many.
"""

import logging
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from arcface_kd.config.kd import TeacherView
from arcface_kd.config.options import Count, Options, Range, Share, Weight
from arcface_kd.errors import CheckpointError, ConfigError
from arcface_kd.methods.base import Batch, Method, Requirement, RunContext
from arcface_kd.methods.learned_classifier import LearnedClassifier
from arcface_kd.methods.tcs.coordinate_system import Basis, choose_axes, embedding_norm, set_scale
from arcface_kd.teachers.cache.principal_components import components_of_cache

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TCSConfig(Options):
    """TCS's knobs. In brackets, whether a default was published or chosen here.

    Attributes:
        variance: the system's axes are the first principal components that hold more than this share of the teacher's
            variance, in (0, 1]; at most as many as the student's embedding has numbers. [chosen; 0.6 was published for
            the mimic term on ImageNet]
        dimension: so many axes instead, at least 1; None (default) goes by ``variance``. [chosen]
        basis: ``pca`` (default) or ``random``, orthonormal directions drawn by the run's seed, to compare with.
            [published, both]
        mimic: weight of the mimic term, at least 0; 0 leaves it out. [chosen; 1 was published on ImageNet]
        drop: share of the axes that is dropped in the end, in [0, 1); 0 keeps all. [chosen]
        rounds: in so many rounds, evenly spaced, at least 1. [chosen]
        drop_begin: share of the run after which importance begins to be accumulated, in [0, 1). [chosen]
        drop_end: share of the run at which the last round is done, above ``drop_begin``, at most 1. [chosen]

    Raises:
        ConfigError: ``drop_begin`` is not below ``drop_end``.
    """

    variance: Share = 0.95
    dimension: Count | None = None
    basis: Basis = "pca"
    mimic: Weight = 64.0
    drop: Annotated[float, Range(0, 1, "[)")] = 0.25
    rounds: Count = 5
    drop_begin: Annotated[float, Range(0, 1, "[)")] = 0.2
    drop_end: Share = 0.7

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.drop_begin >= self.drop_end:
            raise ConfigError(f"drop_begin is {self.drop_begin}; it must be below {self.drop_end}, which is drop_end")

    def kept(self, axes: int, progress: float) -> int:
        """Axes of k that are left when a share of the run is done."""
        into = (progress - self.drop_begin) / (self.drop_end - self.drop_begin)
        # A share that should be a whole number of rounds may have been rounded to a little less.
        done = min(max(int(into * self.rounds + 1e-9), 0), self.rounds)
        return max(1, axes - round(axes * self.drop * done / self.rounds))

    def watches(self, progress: float) -> bool:
        """Whether importance is accumulated at some point of a run."""
        return self.drop > 0 and self.drop_begin <= progress < self.drop_end


class TCS(Method):
    """The student in a coordinate system of the teacher's embeddings, tailored to the task; from the cache alone.

    Terms: ``ce``, the margin softmax; ``mimic``, the weighted distance of student and teacher in the system.

    Buffers:
        mean, axes: the coordinate system.
        scale: (D,), the teacher's standard deviation along each axis, 0 for outputs without an axis.
        mask: (D,), 1 for the axes that are left, 0 for those that were dropped and for outputs without an axis.
        importance: (D,), accumulated since the last round.
    """

    Config = TCSConfig
    requires = frozenset({Requirement.TEACHER_EMBEDDINGS, Requirement.CACHED_EMBEDDINGS})
    classifies = True
    projects = False
    combines = False
    computes_part = True
    teacher_views: ClassVar[frozenset[TeacherView]] = frozenset({"clean"})
    sharded = ("classifier.weight",)
    config: TCSConfig
    mean: Tensor
    axes: Tensor
    scale: Tensor
    mask: Tensor
    importance: Tensor

    @classmethod
    def prepare_student(cls, config: Any, student: nn.Module) -> None:
        """Take the student's last batch norm, which is to hold the coordinate system, out of training.

        Before the student is wrapped by ``DistributedDataParallel``, which notes what is trained.
        """
        embedding_norm(student).requires_grad_(False)

    def __init__(self, config: TCSConfig, context: RunContext) -> None:
        super().__init__(config, context)
        if context.student is None:
            raise ConfigError("tcs works on the student's last layer: let the distiller watch the student first")
        if config.drop and context.total_steps is None:
            raise ConfigError(
                "tcs drops axes as the run goes and was not told how long it is: give total_steps to the head, or "
                "tcs.drop=0"
            )
        # In a tuple, since the student's layer is not a part of the head.
        self._norm = (embedding_norm(context.student),)
        size = context.embedding_size
        if self._norm[0].num_features != size:
            raise ConfigError(f"the student has {self._norm[0].num_features} outputs, the head embedding_size={size}")
        # Without a full cache the run was stopped before it came here, see `requires`.
        assert context.cache is not None
        system = choose_axes(
            components_of_cache(context.cache, context.ranks),
            size,
            basis=config.basis,
            variance=config.variance,
            dimension=config.dimension,
            seed=context.seed,
        )
        logger.info("tcs: %d axes hold %.1f %% of the teacher's variance", len(system.axes), 100 * system.explained)
        self.register_buffer("mean", system.mean)
        self.register_buffer("axes", system.axes)
        scale = system.deviations.new_zeros(size)
        scale[: len(system.axes)] = system.deviations
        self.register_buffer("scale", scale)
        self.register_buffer("mask", (scale > 0).to(scale.dtype))
        self.register_buffer("importance", torch.zeros_like(scale))
        self.classifier = LearnedClassifier(context)
        self.clear_dropped_axes()
        set_scale(self._norm[0], self.scale)
        self._begun = False
        # Known without asking the device, until a state is loaded.
        self._kept: int | None = len(self.axes)
        self._distance: Tensor | None = None
        self.register_load_state_dict_post_hook(lambda module, _: module.follow_mask())  # type: ignore[no-untyped-call]
        self.register_state_dict_pre_hook(lambda module, *_: module.clear_dropped_axes())  # type: ignore[no-untyped-call]

    def follow_mask(self) -> None:
        """Look at the mask anew, after it was written from outside, and let the student follow it."""
        self._kept, self._begun = None, False

    @torch.no_grad()
    def clear_dropped_axes(self) -> None:
        """Zero the class centers along dropped axes, where momentum still moves them for a while."""
        self.classifier.weight.mul_(self.mask)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Drop axes where it is time to; classify the student's coordinates and hold them against the teacher's."""
        if not self._begun:
            # A student may have been given pretrained weights since the head was made, and with them another scale.
            set_scale(self._norm[0], self.scale * self.mask)
            self._begun = True
        progress = batch.step / (self.context.total_steps or 1)
        self._drop_down_to(self.config.kept(len(self.axes), progress) if self.config.drop else len(self.axes))
        mask = self.mask
        if self.config.watches(progress) and torch.is_grad_enabled():
            mask = self.mask.clone().requires_grad_()
            mask.register_hook(self._accumulate)
        terms = self.classifier(replace(batch, embeddings=batch.embeddings * mask))
        if self.config.mimic:
            distance = self._distance_to_teacher(batch)
            self._distance = distance.detach()
            terms["mimic"] = self.context.ranks.computed_by_all(distance * self.config.mimic)
        return cast("dict[str, Tensor]", terms)

    def _distance_to_teacher(self, batch: Batch) -> Tensor:
        """Mean squared distance of student and teacher along the axes that are left."""
        assert batch.teacher is not None
        count = len(self.axes)
        target = (batch.teacher.to(self.mean.dtype) - self.mean) @ self.axes.T
        difference = (batch.embeddings[:, :count] - target) * self.mask[:count]
        return difference.square().sum() / max(1, len(difference))

    @torch.no_grad()
    def _accumulate(self, gradient: Tensor) -> None:
        """Add a step's importance, given this rank's classes' part of the gradient in the mask."""
        score = (self.context.ranks.sum_(gradient.clone()) * self.mask).abs()
        total = score.sum()
        # A step that fp16 has overflown says nothing.
        self.importance += torch.where(total.isfinite() & (total > 0), score / total, torch.zeros_like(score))

    @torch.no_grad()
    def _drop_down_to(self, wanted: int) -> None:
        """Drop the axes of least importance, those of less variance first where it is the same."""
        if self._kept is None:
            self._kept = int(self.mask.sum())
        if wanted < self._kept:
            left = self.mask.nonzero().flatten().flip(0)
            dropped = left[self.importance[left].argsort(stable=True)[: self._kept - wanted]]
            self.mask[dropped] = 0
            self.importance.zero_()
            set_scale(self._norm[0], self.scale * self.mask)
            self._kept = wanted
        if self._kept < len(self.axes):
            self.clear_dropped_axes()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        axes = state_dict.get(f"{prefix}axes")
        if axes is not None and axes.shape != self.axes.shape:
            raise CheckpointError(
                f"the checkpoint's coordinate system has {len(axes)} axes of {axes.shape[1]} dimensions, this run's "
                f"{len(self.axes)} of {self.axes.shape[1]}: go on with the tcs.* options and the cache that the run "
                "began with"
            )
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def observations(self) -> dict[str, Tensor]:
        """The number of axes that are left, and the mean squared distance of student and teacher along them."""
        values = {"axes": self.mask.sum()}
        return values if self._distance is None else {**values, "mimic_distance": self._distance}
