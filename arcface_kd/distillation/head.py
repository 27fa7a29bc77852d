"""The drop-in for the trainer's classification head: one loss from student embeddings and the teacher's signal.

The trainer's loop stays as it is. It calls ``backbone(images)`` and ``head(embeddings, labels)``; between the two lies
a :class:`~arcface_kd.distillation.distiller.Distiller`, which remembers what the teacher said of the images.
"""

import copy
import weakref
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from arcface_kd.checkpoints.head_state import (
    Momentum,
    fit_head_state,
    place_momentum,
    require_same_entries,
    reshard_momentum,
)
from arcface_kd.checkpoints.run_settings import (
    IMAGES_A_STEP,
    as_tensor,
    from_tensor,
    require_agreement,
    require_same_run,
)
from arcface_kd.checkpoints.shards import CLASS_CENTERS, SETTINGS
from arcface_kd.distillation.distiller import NO_CACHE, Distiller
from arcface_kd.distillation.frozen_step import FrozenStep, can_replay, replays
from arcface_kd.distillation.image_quality import ImageQuality
from arcface_kd.distillation.monitor import Monitor, SettleFirst
from arcface_kd.distillation.nan_monitor import BatchRows
from arcface_kd.distillation.partial_fc_names import PartialFCNames, class_centers
from arcface_kd.distillation.tensorboard_log import TensorBoardLog
from arcface_kd.distributed.ranks import RankGroup, for_ddp
from arcface_kd.errors import CheckpointError, ConfigError, TeacherError
from arcface_kd.losses.margin import AdaFaceMargin, Margin
from arcface_kd.methods.base import Batch, Method, Requirement, RunContext


class DistillationHead(PartialFCNames, nn.Module):
    """The drop-in for arcface_torch's ``PartialFC_V2``: (embeddings, labels) to a loss, by whatever method.

    Without methods it is a sharded margin softmax over a learned classifier, as the trainer's own head.

    Args:
        distiller: the teacher's signal and the methods.
        margin: margin and logit scale.
        embedding_size: the student's dimension.
        num_classes: classes of the whole data set; 0 trains without labels, by methods that need none.
        sample_rate: PartialFC's share of classes a step, in (0, 1].
        product_dtype: number format of the matrix products, None for fp32.
        seed: of the run.
        steps_per_epoch: micro-steps of one epoch.
        total_steps: micro-steps of the whole run; None where nobody knows, which some methods refuse.
        loss_is_scaled: whether the trainer scales the loss and passes over steps whose gradients overflow; gradients
            are then not looked at for NaN and inf here.
        ranks: the ranks that share the classes; None takes the default process group.
        log: where loss terms, their gradient norms and the methods' observations go; None keeps no log.
        images_a_step: gathered, where the trainer's schedule counts steps: a state of another number is refused. None
            where the schedule follows.
        run_folder: the run's output folder, where a state of another number of ranks finds the other ranks' shards.

    Attributes:
        monitor: watches the run's numbers.
        schedule_offset: added to the steps done for the methods' schedules, in a run that goes on with another number
            of images a step.

    Raises:
        ConfigError: a teacher of another dimension without a projection; fewer classes than ranks; no classes, and a
            method that needs some; ranks that were started with different teachers, images or options.
    """

    step: Tensor
    class_range: Tensor

    def __init__(
        self,
        distiller: Distiller,
        margin: Margin,
        embedding_size: int,
        num_classes: int,
        sample_rate: float = 1.0,
        product_dtype: torch.dtype | None = None,
        *,
        seed: int = 0,
        steps_per_epoch: int = 1,
        total_steps: int | None = None,
        loss_is_scaled: bool = False,
        ranks: RankGroup | None = None,
        log: TensorBoardLog | None = None,
        run_folder: Path | None = None,
        images_a_step: int | None = None,
    ) -> None:
        super().__init__()
        self.ranks = ranks = ranks or RankGroup()
        _check_sizes(num_classes, sample_rate, ranks)
        if not num_classes:
            distiller.methods.refuse_without_labels()
        self.num_classes, self.embedding_size, self.run_folder = num_classes, embedding_size, run_folder
        self.shard = ranks.shard(num_classes)
        self._distiller = distiller
        margin, self.quality = _with_quality(margin, distiller)
        own = {**asdict(margin), "margin": distiller.kd.head.margin, "sample_rate": sample_rate, "seed": seed}
        self._settings = {**distiller.sources, **own, **distiller.methods.settings, **distiller.student_options.views}
        sizes = {"num_classes": num_classes, "embedding_size": embedding_size, "steps_per_epoch": steps_per_epoch}
        require_agreement({**distiller.kd.shared(), **self._settings, **sizes}, ranks)
        self._settings[IMAGES_A_STEP] = images_a_step
        context = RunContext(
            num_classes=num_classes,
            embedding_size=embedding_size,
            margin=margin,
            ranks=ranks,
            sample_rate=sample_rate,
            seed=seed,
            steps_per_epoch=steps_per_epoch,
            product_dtype=product_dtype,
            total_steps=total_steps,
        )
        context = _with_teacher(context, distiller)
        distiller.refuse_dimension(embedding_size, context.teacher_embedding_size)
        self.projection = _projection(context) if distiller.methods.compares_embeddings else None
        self.register_buffer("class_range", torch.tensor(self.shard.range))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self._steps_done = self.schedule_offset = 0
        self._rows_of_each: int | None = None
        methods = distiller.methods.build(context)
        _sum_gradients(methods, ranks)
        self.methods = nn.ModuleDict(methods)
        self._frozen_steps = {name: FrozenStep(method) for name, method in methods.items() if can_replay(method)}
        self._scores_classes = any(method.classifies for method in methods.values())
        if self.quality is not None and not self._scores_classes:
            raise ConfigError(f"head.margin=adaface has no effect: {distiller.methods.title} does not classify")
        self.monitor = Monitor(ranks, log, watches_gradients=not loss_is_scaled)
        self._momentum: Momentum = {}
        _put_hooks(self, distiller.student)

    @property
    def last_terms(self) -> dict[str, Tensor]:
        """The last step's loss terms by name, scalars without gradient."""
        return self.monitor.last_terms

    def forward(self, local_embeddings: Tensor, local_labels: Tensor) -> Tensor:
        """The step's loss.

        Args:
            local_embeddings: (b, D) this rank's student embeddings; ranks may differ in b.
            local_labels: (b,) or (b, 1) labels of any integer or float type, as MXNet and DALI bring them; -1 for none.

        Returns:
            The sum of all loss terms, the same on every rank. Its gradient is scaled for ``DistributedDataParallel``.

        Raises:
            NumberError: NaN or inf in an embedding, a loss term or, in the backward pass, a gradient, or a label that
                is no class; from a GPU it comes in a later step than the one it names.
        """
        _check_batch(local_embeddings, local_labels, self.embedding_size)
        distiller, rows = self._distiller, len(local_embeddings)
        teacher = distiller.take_teacher_embeddings(rows)
        maps = (None, None) if distiller.maps is None else distiller.maps.take(rows)
        views = distiller.take_views(rows)
        sizes = self._sizes(rows, announced=views is not None)
        batch = self._gathered(local_embeddings, local_labels.reshape(-1).long(), teacher, maps, sizes)
        shown = BatchRows(self._steps_done, sizes, self.ranks.rank, views, distiller.faces)
        self.monitor.inputs(batch, self.num_classes if self._scores_classes else None, shown)
        terms = self._terms(batch)
        self.monitor.terms(terms, local_embeddings, shown, lambda: _observations(self.methods))
        return torch.stack(list(terms.values())).sum()

    def _gathered(
        self,
        local_embeddings: Tensor,
        labels: Tensor,
        teacher: Tensor | None,
        maps: tuple[Tensor | None, Tensor | None],
        sizes: list[int],
    ) -> Batch:
        """The batch of all ranks."""
        embeddings = projected = self._gather(local_embeddings, sizes)
        if self.projection is not None:
            projected = self._gather(self.projection(local_embeddings.to(self.projection.weight.dtype)), sizes)
        labels = self.ranks.gather(labels, sizes)
        quality, row_m2 = (None, None) if self.quality is None else self.quality(embeddings, labels)
        done, self._steps_done = self._steps_done, self._steps_done + 1
        self.step.fill_(self._steps_done)
        return Batch(
            embeddings=embeddings,
            projected=projected,
            labels=labels,
            teacher=None if teacher is None else self.ranks.gather(teacher, sizes),
            sizes=sizes,
            step=done + self.schedule_offset,
            student_map=maps[0],
            teacher_map=maps[1],
            observed=self.monitor.observes(self._steps_done),
            row_m2=row_m2,
            quality=quality,
        )

    def _terms(self, batch: Batch) -> dict[str, Tensor]:
        """All methods' loss terms; those that every rank computes in full share their gradient out."""
        found: dict[str, dict[str, Tensor]] = {}
        for name, module in self.methods.items():
            method = cast(Method, module)
            step = self._frozen_steps.get(name)
            terms = method(batch) if step is None or not replays(batch) else step(batch)
            if not method.computes_part:
                terms = {key: self.ranks.computed_by_all(term) for key, term in terms.items()}
            found[name] = terms
        return _by_name(found)

    def _sizes(self, rows: int, *, announced: bool) -> list[int]:
        """Rows of each rank; where the loader brings all ranks equally many, exchanged when their number changes.

        The exchange makes the host wait for the other ranks.
        """
        if not (announced and self._distiller.even_batches):
            return self.ranks.sizes(rows)
        if rows != self._rows_of_each:
            sizes = self.ranks.sizes(rows)
            if min(sizes) != max(sizes):
                # batch_size differs from rank to rank.
                self._distiller.even_batches = False
                return sizes
            self._rows_of_each = rows
        return [rows] * self.ranks.world_size

    def _gather(self, rows: Tensor, sizes: list[int]) -> Tensor:
        return self.ranks.gather_with_gradient(for_ddp(rows, self.ranks.world_size), sizes)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state of this run, saved on this rank or, on another number of ranks, on any.

        In the latter case the classes' momentum comes along: it takes its place in the optimiser's state, which the
        trainer loads after this one, when the optimiser first steps. The head's parameters must be its last ones.

        Args:
            state_dict: a rank's state. Where it holds other classes than this rank's, these are read from the
                checkpoints in ``run_folder``.
            strict: refuse a state of other methods.
            assign: as in torch.

        Returns:
            As in torch.

        Raises:
            CheckpointError: a state of other methods, of another teacher, other images, another seed or other options,
                or checkpoints that are missing or do not belong together.
        """
        known = {**state_dict, SETTINGS: self.get_extra_state()}
        fitted = fit_head_state(known, self.shard, self.sharded_entries(), self.run_folder)
        if strict:
            require_same_entries(fitted, self.state_dict())
        # A run that this package began before it kept them does not say.
        if SETTINGS in state_dict:
            require_same_run(from_tensor(state_dict[SETTINGS]), self._settings)
        result = super().load_state_dict(fitted, strict, assign)
        if fitted is not known and self.run_folder is not None:
            parameters, sharded = list(self.parameters()), self.sharded_parameters()
            self._momentum = reshard_momentum(parameters, sharded, self.shard, self.run_folder)
        return result

    def get_extra_state(self) -> Tensor:
        """The run's settings, which must match on resume, and which entry holds its class centers."""
        return as_tensor({**self._settings, CLASS_CENTERS: class_centers(self.methods)})

    def set_extra_state(self, state: Any) -> None:
        """Nothing: the settings were compared before anything was loaded."""

    def sharded_entries(self) -> tuple[str, ...]:
        """Names of the state's entries that have one row for each class of this rank."""
        return tuple(f"methods.{name}.{entry}" for name, m in self.methods.items() for entry in cast(Method, m).sharded)

    def sharded_parameters(self) -> list[nn.Parameter]:
        """The parameters among them."""
        parameters = dict(self.named_parameters())
        return [parameters[name] for name in self.sharded_entries() if name in parameters]

    def look_at_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Look for NaN and inf in the gradients that an optimiser is about to apply."""
        self.monitor.weight_gradients(self._distiller.student, optimizer, self._steps_done)

    def __deepcopy__(self, memo: dict[int, Any]) -> "DistillationHead":
        twin = memo[id(self)] = object.__new__(type(self))
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def __getstate__(self) -> dict[str, Any]:
        raise CheckpointError(
            "a head cannot be saved as a whole, with the run's teacher, cache and ranks: save head.state_dict(), and "
            "load that into a head that was made the same way"
        )


def _with_quality(margin: Margin, distiller: Distiller) -> tuple[Margin, ImageQuality | None]:
    """The run's margin, and what it is adapted to where it is AdaFace's."""
    if distiller.kd.head.margin != "adaface":
        return margin, None
    adaptive = AdaFaceMargin(margin.scale, filter_threshold=margin.filter_threshold)
    return adaptive, ImageQuality(adaptive)


def _check_sizes(num_classes: int, sample_rate: float, ranks: RankGroup) -> None:
    if num_classes < 0:
        raise ConfigError(f"num_classes is {num_classes}; it must be at least 0")
    if 0 < num_classes < ranks.world_size:
        raise ConfigError(f"{num_classes} classes cannot be split over {ranks.world_size} ranks; use fewer ranks")
    if not 0 < sample_rate <= 1:
        raise ConfigError(f"sample_rate is {sample_rate}; it must be in (0, 1]")


def _check_batch(embeddings: object, labels: Tensor, embedding_size: int) -> None:
    if not isinstance(embeddings, Tensor):
        raise ConfigError(
            f"the head was given a {type(embeddings).__name__}; it takes one tensor (b, {embedding_size}): where the "
            "student returns several things, pass the embeddings"
        )
    if embeddings.ndim != 2 or embeddings.shape[1] != embedding_size:
        raise ConfigError(f"the head was given embeddings {tuple(embeddings.shape)}; it takes (b, {embedding_size})")
    if labels.numel() != len(embeddings):
        raise ConfigError(
            f"the head was given {len(embeddings)} embeddings and {labels.numel()} labels; it takes one for each"
        )


def _with_teacher(context: RunContext, distiller: Distiller) -> RunContext:
    """Add what the methods are told of teacher and student."""
    methods = distiller.methods
    if methods.from_cache_alone and distiller.cache is None:
        raise TeacherError(NO_CACHE.format(methods.title))
    classifier = distiller.teacher_classifier(context.shard)
    teacher_embedding_size = distiller.teacher_embedding_size
    if teacher_embedding_size is None and classifier is not None:
        teacher_embedding_size = classifier.shape[1]
    return replace(
        context,
        teacher_embedding_size=teacher_embedding_size,
        teacher_classifier=classifier,
        cache=distiller.cache if methods.from_cache_alone else None,
        student=distiller.student,
        **_map_context(distiller),
    )


def _map_context(distiller: Distiller) -> dict[str, Any]:
    """What a run's methods are told of feature maps."""
    maps = distiller.maps
    if distiller.methods.maps_wanted is None:
        return {}
    if maps is None or maps.student_shape is None:
        raise ConfigError(
            f"{distiller.methods.title} needs {Requirement.STUDENT_FEATURE_MAP.value}: no student is watched; "
            "call Distiller.watch with it before the head is made"
        )
    return {
        "teacher_tail": maps.teacher.tail,
        "teacher_map_shape": maps.teacher.map_shape,
        "student_map_shape": maps.student_shape,
    }


def _projection(context: RunContext) -> nn.Linear | None:
    """The matrix between student and teacher where their dimensions differ."""
    if context.teacher_embedding_size in (None, context.embedding_size):
        return None
    projection = nn.Linear(context.embedding_size, context.teacher_embedding_size, bias=False)
    with torch.no_grad():
        nn.init.orthogonal_(projection.weight, generator=torch.Generator().manual_seed(context.seed))
    # DistributedDataParallel wraps the backbone only.
    context.ranks.average_gradient(projection.weight)
    return projection


def _sum_gradients(methods: Mapping[str, Method], ranks: RankGroup) -> None:
    """Sum the gradients of the parameters of methods that every rank computes in full; the terms share theirs out."""
    for method in methods.values():
        for parameter in () if method.computes_part else method.parameters():
            ranks.sum_gradient(parameter)


def _put_hooks(head: DistillationHead, student: nn.Module | None) -> None:
    head.register_state_dict_pre_hook(_settle_first)  # type: ignore[no-untyped-call]
    head.register_load_state_dict_post_hook(_count_from_state)  # type: ignore[no-untyped-call]
    if student is not None:
        student.register_state_dict_pre_hook(SettleFirst(head.monitor))
    _before_optimizer_steps(head)


def _settle_first(head: nn.Module, prefix: str, keep_vars: bool) -> None:
    """Settle before a state is saved, so that no state with NaN or inf is."""
    cast(DistillationHead, head).monitor.settle()


def _count_from_state(head: nn.Module, keys: Any) -> None:
    """Read the number of steps from the device when a state is loaded, and never in a step."""
    cast(DistillationHead, head)._steps_done = int(cast(DistillationHead, head).step)


def _before_optimizer_steps(head: DistillationHead) -> None:
    """Place the classes' momentum, and look at gradients, before any optimiser steps, while the head is there.

    The hook is of all optimisers: a trainer makes its own after the head, loads its state after the head's, and shows
    it to nobody. One that a ``GradScaler`` holds back does not step.
    """
    alive = weakref.ref(head)

    def look(optimizer: torch.optim.Optimizer, arguments: Any, keywords: Any) -> None:
        if (watching := alive()) is not None:
            place_momentum(optimizer, watching._momentum)
            watching.look_at_gradients(optimizer)

    weakref.finalize(head, register_optimizer_step_pre_hook(look).remove)


def _observations(methods: nn.ModuleDict) -> dict[str, Tensor]:
    return _by_name({name: cast(Method, method).observations() for name, method in methods.items()})


def _by_name(found: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """One mapping out of the methods'; a name that several of them use becomes ``METHOD/NAME`` for each."""
    uses = Counter(name for values in found.values() for name in values)
    return {
        name if uses[name] == 1 else f"{method}/{name}": value
        for method, values in found.items()
        for name, value in values.items()
    }
