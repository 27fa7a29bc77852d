"""One run's wiring: the student's hook shows each batch to the teacher, the head turns both into the loss.

The trainer's loop stays as it is. It calls ``backbone(images)`` and ``head(embeddings, labels)``; between the two lies
a :class:`Distiller`, which remembers what the teacher said of the images.
"""

import logging
import weakref
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from arcface_kd.checkpoints.head_state import fit_head_state, reshard_momentum
from arcface_kd.checkpoints.run_settings import as_tensor, from_tensor, require_agreement, require_same_run
from arcface_kd.distillation.distiller import NO_CACHE, Distiller
from arcface_kd.distillation.monitor import BatchRows, NaNMonitor
from arcface_kd.distillation.tensorboard_log import TensorBoardLog
from arcface_kd.distributed.ranks import RankGroup, for_ddp
from arcface_kd.errors import CheckpointError, ConfigError, TeacherError
from arcface_kd.losses.margin import Margin
from arcface_kd.methods.base import Batch, Method, Requirement, RunContext
from arcface_kd.methods.learned_classifier import LearnedClassifier

logger = logging.getLogger(__name__)

# Where torch puts what `get_extra_state` gives.
_SETTINGS = "_extra_state"


class DistillationHead(nn.Module):
    """The drop-in for arcface_torch's ``PartialFC_V2``: (embeddings, labels) to a loss, by whatever method.

    Without methods it is a sharded margin softmax over a learned classifier, as the trainer's own head.

    Args:
        distiller: the run's wiring.
        margin: margin and logit scale.
        embedding_size: the student's dimension.
        num_classes: classes of the whole data set.
        sample_rate: PartialFC's share of classes a step, in (0, 1].
        product_dtype: number format of the matrix products, None for fp32.
        seed: of the run.
        steps_per_epoch: micro-steps of one epoch.
        total_steps: micro-steps of the whole run; None where nobody knows, which some methods refuse.
        loss_is_scaled: whether the trainer scales the loss and passes over steps whose gradients overflow; gradients
            are then not looked at for NaN and inf here.
        ranks: the ranks that share the classes; None takes the default process group.
        log: where loss terms, their gradient norms and the methods' observations go; None keeps no log.
        run_folder: the run's output folder, where a state of another number of ranks finds the other ranks' shards.

    Attributes:
        last_terms: the last step's loss terms by name, scalars without gradient.
        schedule_offset: added to the steps done for the methods' schedules, in a run that goes on with another number
            of images a step.

    Raises:
        ConfigError: a teacher of another dimension without a projection; fewer classes than ranks; ranks that were
            started with different teachers, images or options.
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
    ) -> None:
        super().__init__()
        self.run_folder = run_folder
        self.last_terms: dict[str, Tensor] = {}
        self._log = log
        self._distiller = distiller
        self.ranks = ranks or RankGroup()
        if num_classes < 1:
            raise ConfigError(f"num_classes is {num_classes}; it must be at least 1")
        if num_classes < self.ranks.world_size:
            raise ConfigError(
                f"{num_classes} classes cannot be split over {self.ranks.world_size} ranks; use fewer ranks"
            )
        if not 0 < sample_rate <= 1:
            raise ConfigError(f"sample_rate is {sample_rate}; it must be in (0, 1]")
        self.num_classes = num_classes
        self.embedding_size = embedding_size
        self.shard = shard = self.ranks.shard(num_classes)
        options = {
            f"{name}.{key}": value for name, own in distiller.method_configs.items() for key, value in vars(own).items()
        }
        self._settings = {**distiller.sources, **asdict(margin), "sample_rate": sample_rate, "seed": seed, **options}
        sizes = {"num_classes": num_classes, "embedding_size": embedding_size, "steps_per_epoch": steps_per_epoch}
        require_agreement({"kd": "+".join(distiller.kd.methods), **self._settings, **sizes}, self.ranks)
        if distiller.from_cache_alone and distiller.cache is None:
            raise TeacherError(NO_CACHE.format("+".join(distiller.kd.methods)))
        classifier = distiller.teacher_classifier(shard)
        teacher_embedding_size = distiller.teacher_embedding_size
        if teacher_embedding_size is None and classifier is not None:
            teacher_embedding_size = classifier.shape[1]
        distiller.refuse_dimension(embedding_size, teacher_embedding_size)
        self.projection = (
            _projection(embedding_size, teacher_embedding_size, seed, self.ranks)
            if distiller.compares_embeddings
            else None
        )
        self.register_buffer("class_range", torch.tensor([shard.start, shard.start + shard.size, num_classes]))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self._steps_done = 0
        self.schedule_offset = 0
        self._rows_of_each: int | None = None
        context = RunContext(
            num_classes=num_classes,
            embedding_size=embedding_size,
            margin=margin,
            ranks=self.ranks,
            teacher_embedding_size=teacher_embedding_size,
            teacher_classifier=classifier,
            sample_rate=sample_rate,
            seed=seed,
            steps_per_epoch=steps_per_epoch,
            product_dtype=product_dtype,
            total_steps=total_steps,
            cache=distiller.cache if distiller.from_cache_alone else None,
            student=distiller.student,
            **_map_context(distiller),
        )
        methods: dict[str, Method] = {}
        if not distiller.replacing:
            methods["classifier"] = LearnedClassifier(context)
        for name, kind in distiller.method_types.items():
            methods[name] = kind(distiller.method_configs[name], context)
        self.methods = nn.ModuleDict(methods)
        self._num_classes = num_classes
        self._scores_classes = any(method.classifies for method in methods.values())
        self.numbers = NaNMonitor()
        self.register_state_dict_pre_hook(_settle_numbers)
        self.register_load_state_dict_post_hook(_count_from_state)
        if distiller.student is not None:
            distiller.student.register_state_dict_pre_hook(_SettleFirst(self))
        self._watches_gradients = not loss_is_scaled
        if self._watches_gradients:
            _watch_optimizers(self)

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
        labels = local_labels.reshape(-1).long()
        if local_embeddings.ndim != 2 or local_embeddings.shape[1] != self.embedding_size:
            raise ValueError(
                f"the head was given embeddings {tuple(local_embeddings.shape)}; it takes (b, {self.embedding_size})"
            )
        rows = local_embeddings.shape[0]
        if labels.shape[0] != rows:
            raise ValueError(
                f"the head was given {rows} embeddings and {labels.shape[0]} labels; it takes one for each"
            )
        teacher = self._distiller.take_teacher_embeddings(rows)
        maps = self._distiller.maps
        student_map, teacher_map = (None, None) if maps is None else maps.take(rows)
        views = self._distiller.take_views(rows)
        sizes = self._sizes(rows, announced=views is not None)
        embeddings = self._gather(local_embeddings, sizes)
        done = self._count_step()
        batch = Batch(
            embeddings=embeddings,
            projected=embeddings
            if self.projection is None
            else self._gather(self.projection(local_embeddings.to(self.projection.weight.dtype)), sizes),
            labels=self.ranks.gather(labels, sizes),
            teacher=None if teacher is None else self.ranks.gather(teacher, sizes),
            sizes=sizes,
            step=done + self.schedule_offset,
            student_map=student_map,
            teacher_map=teacher_map,
        )
        shown = BatchRows(done + 1, sizes, self.ranks.rank, views, self._distiller.faces)
        classes = self._num_classes if self._scores_classes else None
        self.numbers.inputs(batch.labels, classes, batch.embeddings, batch.teacher, shown)
        terms = _by_name({name: method(batch) for name, method in self.methods.items()})
        self.numbers.terms(list(terms), list(terms.values()), shown)
        self.last_terms = {name: term.detach() for name, term in terms.items()}
        if self._log is not None and self._log.due(done + 1):
            self._log.write(done + 1, self._observations(terms, local_embeddings))
        if self._watches_gradients and local_embeddings.requires_grad:
            local_embeddings.register_hook(lambda gradient: self.numbers.embedding_gradient(gradient, shown))
        return torch.stack(list(terms.values())).sum()

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

    def _count_step(self) -> int:
        """Steps done before this one."""
        done, self._steps_done = self._steps_done, self._steps_done + 1
        self.step.fill_(self._steps_done)
        return done

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
        known = {**state_dict, _SETTINGS: as_tensor(self._settings)}
        fitted = fit_head_state(known, self.shard, self.sharded_entries(), self.run_folder)
        has, wants = set(fitted), set(self.state_dict())
        if strict and has != wants:
            raise CheckpointError(
                f"the checkpoint's head lacks {', '.join(sorted(wants - has)) or 'nothing'} and has "
                f"{', '.join(sorted(has - wants)) or 'nothing'} beside: go on with the kd* keys that the run began with"
            )
        # A run that this package began before it kept them does not say.
        if _SETTINGS in state_dict:
            require_same_run(from_tensor(state_dict[_SETTINGS]), self._settings)
        result = super().load_state_dict(fitted, strict, assign)
        if fitted is not known and self.run_folder is not None:
            reshard_momentum(list(self.parameters()), self.sharded_parameters(), self.shard, self.run_folder)
        return result

    def get_extra_state(self) -> Tensor:
        """What the run was begun with; part of the state, so that it goes on as the same run."""
        return as_tensor(self._settings)

    def set_extra_state(self, state: Any) -> None:
        """Nothing: the settings were compared before anything was loaded."""

    def look_at_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Look for NaN and inf in the gradients that an optimiser is about to apply to the student.

        Args:
            optimizer: any; one that has none of the student's weights is left alone.

        Raises:
            NumberError: there are some; the message names the weights.
        """
        student = self._distiller.student
        if student is None:
            return
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        found = {
            name: parameter.grad
            for name, parameter in student.named_parameters()
            if id(parameter) in held and parameter.grad is not None
        }
        if found:
            self.numbers.weight_gradients(list(found), list(found.values()), self._steps_done)

    def sharded_entries(self) -> tuple[str, ...]:
        """Names of the state's entries that have one row for each class of this rank."""
        return tuple(f"methods.{name}.{entry}" for name, m in self.methods.items() for entry in cast(Method, m).sharded)

    def sharded_parameters(self) -> list[nn.Parameter]:
        """The parameters among them."""
        parameters = dict(self.named_parameters())
        return [parameters[name] for name in self.sharded_entries() if name in parameters]

    def _observations(self, terms: Mapping[str, Tensor], local_embeddings: Tensor) -> dict[str, float]:
        """What a step's log holds, the same on every rank.

        That is the loss terms, the norm of each one's gradient in the embeddings of the whole batch, that norm's share
        in the sum of all terms' norms, and what the methods observed.
        """
        values = _by_name({name: cast(Method, method).observations() for name, method in self.methods.items()})
        values.update({name: term.detach() for name, term in terms.items()})
        if local_embeddings.requires_grad:
            norms = self.ranks.sum_(torch.stack([_squared_norm(term, local_embeddings) for term in terms.values()]))
            # The gradient that the backbone gets is `world_size` times that of the loss, see `for_ddp`.
            norms = norms.sqrt() / self.ranks.world_size
            shares = norms / norms.sum().clamp_min(torch.finfo(norms.dtype).tiny)
            for name, norm, share in zip(terms, norms, shares, strict=True):
                values[f"gradient_norm/{name}"], values[f"gradient_share/{name}"] = norm, share
        # One copy from the device for all of them.
        found = torch.stack([value.to(torch.float64).reshape(()) for value in values.values()])
        return dict(zip(values, found.tolist(), strict=True))


def _settle_numbers(head: nn.Module, prefix: str, keep_vars: bool) -> None:
    """Before a state is saved, so that none is that has met NaN or inf."""
    cast(DistillationHead, head).numbers.settle()


def _count_from_state(head: nn.Module, keys: Any) -> None:
    """Read the number of steps from the device when a state is loaded, and never in a step."""
    cast(DistillationHead, head)._steps_done = int(cast(DistillationHead, head).step)


class _SettleFirst:
    """The student's hook before its state is saved: the trainer may save that one and never the head's."""

    def __init__(self, head: DistillationHead) -> None:
        self._head: weakref.ref[DistillationHead] | None = weakref.ref(head)

    def __call__(self, student: nn.Module, prefix: str, keep_vars: bool) -> None:
        head = None if self._head is None else self._head()
        if head is not None:
            head.numbers.settle()

    def __deepcopy__(self, memo: dict[int, Any]) -> "_SettleFirst":
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {"_head": None}


def _watch_optimizers(head: DistillationHead) -> None:
    """Let the head look at the student's gradients before any optimiser takes them, for as long as there is the head.

    A trainer's optimiser is made after its head and never shown to it. One that a ``GradScaler`` holds back is not
    looked at, since its step does not come.
    """
    alive = weakref.ref(head)

    def look(optimizer: torch.optim.Optimizer, arguments: Any, keywords: Any) -> None:
        watching = alive()
        if watching is not None:
            watching.look_at_gradients(optimizer)

    weakref.finalize(head, register_optimizer_step_pre_hook(look).remove)


def _map_context(distiller: Distiller) -> dict[str, Any]:
    """What a run's methods are told of feature maps."""
    maps = distiller.maps
    if distiller.maps_wanted is None:
        return {}
    if maps is None or maps.student_shape is None:
        raise ConfigError(
            f"{'+'.join(distiller.kd.methods)} needs {Requirement.STUDENT_FEATURE_MAP.value}: no student is watched; "
            "call Distiller.watch with it before the head is made"
        )
    return {
        "teacher_tail": maps.teacher.tail,
        "teacher_map_shape": maps.teacher.map_shape,
        "student_map_shape": maps.student_shape,
    }


def _by_name(found: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """One mapping out of the methods'; a name that several of them use becomes ``METHOD/NAME`` for each."""
    uses = Counter(name for values in found.values() for name in values)
    return {
        name if uses[name] == 1 else f"{method}/{name}": value
        for method, values in found.items()
        for name, value in values.items()
    }


def _squared_norm(term: Tensor, embeddings: Tensor) -> Tensor:
    """The squared norm of a term's gradient in the embeddings, 0 where it does not depend on them."""
    gradient = None
    if term.requires_grad:
        (gradient,) = torch.autograd.grad(term, embeddings, retain_graph=True, allow_unused=True)
    return term.new_zeros(()) if gradient is None else gradient.to(term.dtype).square().sum()


def _projection(
    embedding_size: int, teacher_embedding_size: int | None, seed: int, ranks: RankGroup
) -> nn.Linear | None:
    """The matrix between student and teacher where their dimensions differ."""
    if teacher_embedding_size is None or teacher_embedding_size == embedding_size:
        return None
    projection = nn.Linear(embedding_size, teacher_embedding_size, bias=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        nn.init.orthogonal_(projection.weight, generator=generator)
    # DistributedDataParallel wraps the backbone only.
    ranks.average_gradient(projection.weight)
    return projection
