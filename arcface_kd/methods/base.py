"""What a distillation method declares, receives and returns."""

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from arcface_kd.config.kd import TeacherView
from arcface_kd.distributed.class_shard import ClassShard
from arcface_kd.distributed.ranks import RankGroup
from arcface_kd.losses.class_weights import ClassWeights, StepClasses
from arcface_kd.losses.margin import Margin
from arcface_kd.methods.class_centers import FrozenCenters
from arcface_kd.teachers.cache.embedding_cache import EmbeddingCache


class Requirement(enum.Enum):
    """Something of the teacher that a method cannot do without; the value says how to get it."""

    TEACHER_EMBEDDINGS = "a teacher that embeds the training images: give one with --kd-teacher FILE"
    TEACHER_CLASSIFIER = (
        "the teacher's classifier: give its file, or the folder of the run that trained it, with --kd-classifier; "
        "where nobody has kept it, --kd-classifier class-means and a filled --kd-cache"
    )
    CACHED_EMBEDDINGS = (
        "the teacher's embeddings of all training images, and nothing else of it: give a full cache with --kd-cache"
    )
    TEACHER_TAIL = (
        "the teacher's tail, what turns its feature map into the embedding: give a teacher with --kd-teacher FILE (a "
        "checkpoint, an ONNX file, a module); where its map is not found, name the module or the ONNX tensor"
    )
    STUDENT_FEATURE_MAP = "the student's feature map: where it is not found, name the module that returns it"


@dataclass(frozen=True)
class MapsWanted:
    """Which feature maps a method looks at.

    Attributes:
        student_map: path of the student's module that returns the map; None finds it.
        teacher_map: the same in the teacher, or a tensor of its ONNX graph; None finds it.
        tap: which map is found: 0 is the last one, 1 the last at a larger size, and so on.
        teacher_maps: whether the teacher's own map of each batch is wanted, which no cache holds, or its tail alone.
    """

    student_map: str | None = None
    teacher_map: str | None = None
    tap: int = 0
    teacher_maps: bool = True


@dataclass(frozen=True)
class RunContext:
    """What a run tells its methods once, before the first step.

    Attributes:
        num_classes: classes of the whole data set; 0 where no image has a label.
        embedding_size: the student's dimension D.
        teacher_embedding_size: the teacher's dimension Dt, None without a teacher.
        teacher_classifier: (C_local, Dt) fp32 on the CPU, any norms: this rank's rows of the teacher's classifier, for
            methods that require it; None elsewhere.
        margin: margin and logit scale of the trainer's own margin list.
        sample_rate: PartialFC's share of classes a step, in (0, 1].
        seed: of the run.
        steps_per_epoch: optimiser micro-steps of one epoch, at least 1.
        total_steps: micro-steps of the whole run, at least 1; None where nobody knows.
        cache: the teacher's embeddings of the run's images, for methods that require them; None elsewhere.
        student: the watched student, for methods that prepare it; None where none is watched.
        product_dtype: number format of the head's matrix products, None for fp32.
        ranks: the ranks that share the classes.
        teacher_tail: from feature maps (b, Ct, Ht, Wt) to the teacher's embeddings (b, Dt), not normalised, frozen and
            with gradient in the maps; for methods that require it, None elsewhere.
        teacher_map_shape: (Ct, Ht, Wt) of the teacher's map.
        student_map_shape: (C, H, W) of the student's map, for methods that require it.
    """

    num_classes: int
    embedding_size: int
    margin: Margin
    ranks: RankGroup
    teacher_embedding_size: int | None = None
    sample_rate: float = 1.0
    seed: int = 0
    steps_per_epoch: int = 1
    product_dtype: torch.dtype | None = None
    teacher_classifier: Tensor | None = field(default=None, repr=False, compare=False)
    total_steps: int | None = None
    cache: EmbeddingCache | None = field(default=None, repr=False, compare=False)
    student: nn.Module | None = field(default=None, repr=False, compare=False)
    teacher_tail: Callable[[Tensor], Tensor] | None = field(default=None, repr=False, compare=False)
    teacher_map_shape: tuple[int, int, int] | None = None
    student_map_shape: tuple[int, int, int] | None = None

    @property
    def shard(self) -> ClassShard:
        """The classes that this rank holds."""
        return self.ranks.shard(self.num_classes)

    def class_weights(self, centers: Tensor | FrozenCenters, classes: StepClasses | None = None) -> ClassWeights:
        """One step's class centers of this rank, as the losses take them.

        Args:
            centers: (C_local, D) for the classes of :attr:`shard`, or frozen ones.
            classes: that take part in the step, see :func:`~arcface_kd.methods.class_sampling.step_classes`; None for
                all.
        """
        weight, inverse_norms, units = (
            (centers.weight, centers.inverse_norms, centers.units)
            if isinstance(centers, FrozenCenters)
            else (centers, None, None)
        )
        return ClassWeights(
            weight,
            inverse_norms,
            self.shard.start,
            None if classes is None else classes.index,
            self.ranks,
            self.product_dtype,
            targets=None if classes is None else classes.targets,
            units=units,
            num_classes=self.num_classes,
        )


@dataclass(frozen=True)
class Batch:
    """One step as a method sees it: the gathered batch, the same on every rank.

    Attributes:
        embeddings: (B, D) student embeddings of all ranks, not normalised. Their gradients are summed over ranks, see
            :class:`Method`.
        projected: (B, Dt) the same in the teacher's dimension: behind the student's projection where the dimensions
            differ, the embeddings themselves elsewhere and where no method of the run looks at it.
        labels: (B,) int64; -1 where a row has none.
        teacher: (B, Dt) teacher embeddings, unit vectors without gradient; None without a teacher.
        sizes: rows of each rank, in order.
        step: micro-steps done before this one.
        student_map: (b, C, H, W) the student's feature map of this rank's own rows, with gradient; for methods that
            require it, None elsewhere.
        teacher_map: (b, Ct, Ht, Wt) the teacher's of the same images, without gradient.
        observed: whether the method's observations are asked for after this step; they may cost something.
        row_m2: (B,) the angular margin of each row where ``context.margin`` is AdaFace's, for the margin softmax of a
            method that classifies; None under any other margin.
        quality: (B,) what it follows from: AdaFace's quality of each row, not clipped.
    """

    embeddings: Tensor
    projected: Tensor
    labels: Tensor
    teacher: Tensor | None
    sizes: list[int]
    step: int
    student_map: Tensor | None = None
    teacher_map: Tensor | None = None
    observed: bool = True
    row_m2: Tensor | None = None
    quality: Tensor | None = None


class Method(nn.Module):
    """A distillation method: state, if it has any, and the loss terms of a step.

    A subclass names its knobs in ``Config`` (frozen :class:`~arcface_kd.config.options.Options` whose defaults are the
    published ones and whose annotations state the ranges), what it cannot do without in ``requires``, in ``classifies``
    whether its terms take the place of the trainer's learned classifier, in ``projects`` whether they look at
    ``Batch.projected``, in ``needs_labels`` whether it refuses images without labels, in ``combines`` whether it may
    stand beside others, and in ``sharded`` which entries of its ``state_dict`` have one row for each class of this rank
    (the first of a method that classifies: its class centers).

    Where the student's images are degraded, ``teacher_views`` names what its teacher may be shown: ``clean``, the
    images as they were, which are other views than the student's; ``same``, the student's.

    Every rank sees the whole gathered batch, computes the same terms from it and returns them; the head shares their
    gradients out among the ranks, and sums those of the method's parameters, which start alike on all ranks (from
    ``context.seed``). A term stays connected to the embeddings on every rank, also where its sum is empty: the backward
    pass is a collective.

    Two kinds of methods do more:

    - One whose classes are split over ranks differentiates its own classes only, as
      :func:`~arcface_kd.losses.margin_softmax.sharded_margin_softmax` does. It sets ``computes_part = True``; gradients
      are then its own affair, and what all ranks compute in full it passes through ``context.ranks.computed_by_all``.
    - An expensive loss, such as a sum over triples, is shared out: each rank takes the rows of
      ``context.ranks.own_slice(batch.sizes)`` and returns ``context.ranks.computed_in_parts(part)``. What the summands
      have in common (a mean over the batch) each rank computes in full and differentiates through.

    Args:
        config: the knobs.
        context: the run.
    """

    Config: ClassVar[type[Any]]
    requires: ClassVar[frozenset[Requirement]] = frozenset()
    classifies: ClassVar[bool] = False
    projects: ClassVar[bool] = True
    combines: ClassVar[bool] = True
    computes_part: ClassVar[bool] = False
    teacher_views: ClassVar[frozenset[TeacherView]] = frozenset({"clean", "same"})
    sharded: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: Any, context: RunContext) -> None:
        super().__init__()
        self.config = config
        self.context = context

    @classmethod
    def replaces_classifier(cls, config: Any) -> bool:
        """Whether, with these knobs, its terms take the place of the trainer's learned classifier.

        Methods that do exclude each other, and a run with one has no learned classifier of its own. A subclass may
        decide by a knob.
        """
        return cls.classifies

    @classmethod
    def needs_labels(cls, config: Any) -> bool:
        """Whether it refuses images without labels; where not, ``context.num_classes`` may be 0."""
        return True

    @classmethod
    def requirements(cls, config: Any) -> frozenset[Requirement]:
        """What it cannot do without, with these knobs: ``requires``, unless a subclass decides by a knob."""
        return cls.requires

    @classmethod
    def maps_wanted(cls, config: Any) -> MapsWanted | None:
        """Which feature maps it looks at, for methods that require the teacher's tail and the student's map."""
        return None

    @classmethod
    def prepare_student(cls, config: Any, student: nn.Module) -> None:
        """Make a student ready for the method, once, before any trainer has wrapped it.

        It must keep the keys and shapes of its ``state_dict``.
        """
        return

    @property
    def same_each_step(self) -> bool:
        """Whether a GPU may record a step that is not observed and replay it; a subclass says it for itself.

        Then the method ``computes_part``, has one loss term and no parameters, and looks at the batch's ``projected``,
        ``labels``, ``teacher`` and ``row_m2`` alone; which operations it asks for depends on their shapes and on
        nothing else.
        """
        return False

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The step's loss terms by name; their sum is trained on.

        Args:
            batch: the gathered batch.

        Returns:
            Scalars, the same on every rank.
        """
        raise TypeError(f"{type(self).__name__} must define forward(batch)")

    def observations(self) -> dict[str, Tensor]:
        """Values of the last step worth a curve (an alpha's quantiles, a drift): small tensors without gradient."""
        return {}
