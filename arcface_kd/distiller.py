"""One run's wiring: the student's hook shows each batch to the teacher, the head turns both into the loss.

The trainer's loop stays as it is. It calls ``backbone(images)`` and ``head(embeddings, labels)``; between the two lies
a :class:`Distiller`, which remembers what the teacher said of the images.
"""

import copy
import logging
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.optim.optimizer import register_optimizer_step_pre_hook

from arcface_kd import registry
from arcface_kd.config import KDConfig, build
from arcface_kd.data.dataset import IMAGE_SIZE, FaceDataset
from arcface_kd.data.fingerprint import fingerprint, outline, shows_two_views
from arcface_kd.data.loader import BatchViews, FaceLoader
from arcface_kd.errors import CheckpointError, ConfigError, TeacherError
from arcface_kd.feature_maps import FeatureMaps
from arcface_kd.losses.margin import Margin
from arcface_kd.methods.base import Batch, MapsWanted, Method, Requirement, RunContext
from arcface_kd.methods.classifier import LearnedClassifier
from arcface_kd.number_watch import BatchRows, NumberWatch
from arcface_kd.resharding import bring_momentum, fit_head_state
from arcface_kd.run_settings import as_tensor, from_tensor, require_agreement, require_same_run
from arcface_kd.sharding import ClassShard, RankGroup, for_ddp, on_first_rank_first
from arcface_kd.step_log import StepLog
from arcface_kd.teacher_classifier import CLASS_MEANS, check_order, class_means, read_classifier
from arcface_kd.teachers.base import Teacher, load_teacher
from arcface_kd.teachers.embedding_cache import EmbeddingCache, how_to_fill, identity_in, identity_of

logger = logging.getLogger(__name__)

# Where torch puts what `get_extra_state` gives.
_SETTINGS = "_extra_state"

_NO_CACHE = (
    "{} takes the teacher's embeddings from a cache by the records that a batch shows, and the loader does not say "
    "which these are: set dali=False; in a loop of your own, call read_through_cache with the loader"
)


class Distiller:
    """What the student's hook and the head of one run share.

    Args:
        kd: the ``kd*`` keys.
        teacher: a teacher to use instead of loading ``kd.teacher``; any other network is made one by
            :func:`~arcface_kd.teachers.base.load_teacher`, with the ``teacher.`` options.

    Raises:
        ConfigError: an unknown method, or options that it does not have.
        TeacherError: a method needs a teacher and none was given, or it cannot be read.
    """

    def __init__(self, kd: KDConfig, teacher: Teacher | Callable[[Tensor], Tensor] | None = None) -> None:
        self.kd = kd
        self.student_options = kd.student
        self.method_types: dict[str, type[Method]] = {}
        self.method_configs: dict[str, Any] = {}
        for name in kd.methods:
            kind = registry.load(registry.METHODS, name)
            if not (isinstance(kind, type) and issubclass(kind, Method)):
                raise ConfigError(f"the entry point of method {name!r} is {kind!r}; it must be a subclass of Method")
            self.method_types[name] = kind
            self.method_configs[name] = build(kind.Config, kd.options.get(name, {}), name)
        alone = [name for name, kind in self.method_types.items() if not kind.combines]
        if alone and len(self.method_types) > 1:
            raise ConfigError(f"{alone[0]} does not combine with other methods: kd is {'+'.join(kd.methods)!r}")
        self.replacing = _replacing_classifier(self.method_types, self.method_configs)
        needed = frozenset().union(*(t.requirements(self.method_configs[n]) for n, t in self.method_types.items()))
        if Requirement.TEACHER_CLASSIFIER in needed and kd.classifier is None:
            raise TeacherError(f"{'+'.join(kd.methods)} needs {Requirement.TEACHER_CLASSIFIER.value}")
        self.from_cache_alone = Requirement.CACHED_EMBEDDINGS in needed
        if self.from_cache_alone and kd.cache is None:
            raise TeacherError(f"{'+'.join(kd.methods)} needs {Requirement.CACHED_EMBEDDINGS.value}")
        if teacher is None and kd.teacher is not None and self.method_types:
            teacher = load_teacher(kd.teacher, kd.options.get("teacher"))
        elif teacher is not None and not isinstance(teacher, Teacher):
            teacher = load_teacher(teacher, kd.options.get("teacher"))
        if teacher is None and Requirement.TEACHER_TAIL in needed:
            raise TeacherError(f"{'+'.join(kd.methods)} needs {Requirement.TEACHER_TAIL.value}")
        if teacher is None and Requirement.TEACHER_EMBEDDINGS in needed and not self.from_cache_alone:
            raise TeacherError(f"{'+'.join(kd.methods)} needs {Requirement.TEACHER_EMBEDDINGS.value}")
        self.needed = needed
        self.teacher = teacher
        self.student: nn.Module | None = None
        self.faces: FaceDataset | None = None
        self.cache: EmbeddingCache | None = None
        self._views: BatchViews | None = None
        self._shown: BatchViews | None = None
        self._seen: Tensor | None = None
        self.maps_wanted = _maps_wanted(self.method_types, self.method_configs)
        self.maps: FeatureMaps | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Distiller":
        """One for copies of student and head; teacher, cache and data, which no step changes, are shared."""
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        for shared in (self.teacher, self.cache, self.faces, None if self.maps is None else self.maps.teacher):
            memo[id(shared)] = shared
        twin.__dict__ = copy.deepcopy(self.__dict__, memo)
        return twin

    def read_through_cache(self, loader: FaceLoader, ranks: RankGroup | None = None) -> None:
        """Keep the teacher's embeddings in the file that ``kd_cache`` names, and ask the teacher for missing ones only.

        The loader says which records a batch shows and which of them mirrored; its records are what the teacher's
        classifier is held against. Data that may show an image in other ways, by an augmentation of its own, switches
        the cache off with a warning: the teacher then runs each step. Methods that take the cache alone want it to be
        there, and the teacher is given up.

        Args:
            loader: of the training records.
            ranks: the ranks of the run; None takes the default process group.

        Raises:
            TeacherError: the cache belongs to another teacher or other data, or is damaged; or there is none, and a
                method takes it alone.
            DataError: an image that cannot be read.
        """
        self.faces = loader.faces
        loader.on_batch = self._next_views
        if self.from_cache_alone:
            self._open_full_cache(loader)
            return
        embeds = Requirement.TEACHER_EMBEDDINGS in self.needed and not self._shows_maps
        if self.kd.cache is not None and self._shows_maps:
            logger.warning(
                "kd_cache spares nothing: %s compares feature maps, which no cache holds, and the teacher runs each "
                "step",
                "+".join(self.kd.methods),
            )
        reads = embeds or self.kd.classifier == CLASS_MEANS
        if self.kd.cache is None or self.teacher is None or not reads:
            return
        if not shows_two_views(loader.faces):
            logger.warning(
                "kd_cache is off: a %s may show an image in other ways than plain and mirrored: the teacher runs each "
                "step",
                type(loader.faces).__name__,
            )
            return
        identity = identity_of(self.teacher, fingerprint(loader.faces), len(loader.faces))
        self.cache = on_first_rank_first(lambda: EmbeddingCache(str(self.kd.cache), identity), ranks)

    def _open_full_cache(self, loader: FaceLoader) -> None:
        """Let the cache stand for the teacher, which is given up where one was given to compare with."""
        path, whose = str(self.kd.cache), "+".join(self.kd.methods)
        if not shows_two_views(loader.faces):
            raise TeacherError(
                f"{whose} takes the teacher's embeddings from a cache, and a {type(loader.faces).__name__} may show an "
                "image in other ways than plain and mirrored: train on records or on a folder"
            )
        data = fingerprint(loader.faces)
        if self.teacher is None:
            identity = identity_in(path, data, len(loader.faces))
        else:
            identity = identity_of(self.teacher, data, len(loader.faces))
        self.cache = EmbeddingCache(path, identity, create=False)
        self.teacher = None

    @property
    def teacher_embedding_size(self) -> int | None:
        """The teacher's dimension, whether it is there or its cache stands for it; None without either."""
        if self.teacher is not None:
            return self.teacher.embedding_size
        return self.cache.embedding_size if self.from_cache_alone and self.cache is not None else None

    @property
    def sources(self) -> dict[str, str | None]:
        """Digests of the run's teacher and images, None where there are none: what makes it this run and no other."""
        teacher = None if self.teacher is None else self.teacher.fingerprint
        if self.from_cache_alone and self.cache is not None:
            teacher = str(self.cache.identity["teacher"])
        return {"teacher": teacher, "data": None if self.faces is None else outline(self.faces)}

    @property
    def compares_embeddings(self) -> bool:
        """Whether a method holds the student's embeddings against the teacher's, number by number."""
        return any(kind.projects for kind in self.method_types.values())

    def refuse_dimension(self, embedding_size: int, teacher_embedding_size: int | None) -> None:
        """Refuse a teacher of another dimension than the student's where the run has no way to compare the two.

        Args:
            embedding_size: the student's dimension.
            teacher_embedding_size: the teacher's; None where there is none.

        Raises:
            ConfigError: they differ, a method compares embeddings, and the run asks for no projection.
        """
        if teacher_embedding_size in (None, embedding_size) or not self.compares_embeddings:
            return
        if self.student_options.projection == "none":
            raise ConfigError(
                f"the teacher has {teacher_embedding_size} dimensions and the student {embedding_size}: set "
                f"embedding_size={teacher_embedding_size}, or add --kd-option student.projection=linear"
            )

    @property
    def _listens(self) -> bool:
        """Whether each batch needs the teacher's embeddings."""
        there = self.teacher is not None or self.from_cache_alone
        return there and Requirement.TEACHER_EMBEDDINGS in self.needed

    @property
    def _shows_maps(self) -> bool:
        """Whether each batch needs the teacher's own feature maps."""
        return self.maps_wanted is not None and self.maps_wanted.teacher_maps

    def _next_views(self, views: BatchViews) -> None:
        self._views = self._shown = views

    def take_views(self, rows: int) -> BatchViews | None:
        """Which records the batch that the student has just seen shows; None where the loader does not say.

        Args:
            rows: number of the student's embeddings.
        """
        shown, self._shown = self._shown, None
        return shown if shown is not None and len(shown.index) == rows else None

    def watch(self, student: nn.Module) -> nn.Module:
        """Put the hook on a student: in training mode, what it is shown the teacher is shown first.

        The teacher comes first so that its activations are gone before the student's are kept for the backward pass.

        Args:
            student: any module whose first argument is the batch of images.

        Returns:
            The same module.

        Raises:
            ConfigError: a student that a method cannot work with.
            TeacherError: a teacher without the feature map that a method looks at.
        """
        for name, kind in self.method_types.items():
            kind.prepare_student(self.method_configs[name], student)
        if self._listens:
            student.register_forward_pre_hook(_ShowToTeacher(self))
        if self.maps_wanted is not None and self.teacher is not None:
            self.maps = FeatureMaps("+".join(self.kd.methods), self.maps_wanted, self.teacher)
            self.maps.watch(student, self.teacher.preprocessing.size if self.faces is None else IMAGE_SIZE[0])
        self.student = student
        return student

    def show(self, images: Tensor) -> None:
        """Keep what the teacher says of a batch until the head asks for it.

        Args:
            images: (b, 3, H, W) as the student sees them.
        """
        if self._listens:
            self._seen = self._embed(self.teacher, images)

    def _embed(self, teacher: Teacher | None, images: Tensor) -> Tensor:
        """The teacher's unit embeddings of a batch, from the cache where they are in it."""
        views, self._views = self._views, None
        if self.maps is not None and self._shows_maps:
            return self.maps.embed(images)
        if self.cache is None:
            if teacher is None:
                raise TeacherError(_NO_CACHE.format("+".join(self.kd.methods)))
            return normalize(teacher(images))
        if views is None or views.index.shape[0] != images.shape[0]:
            raise RuntimeError(
                f"kd_cache is set, but the loader did not say which records these {images.shape[0]} images are: use "
                "the drop-in loader, one batch a step"
            )
        rows, known = self.cache.look_up(views.index, views.flipped)
        if not known.all():
            missing = ~known
            index, flipped = views.index[missing], views.flipped[missing]
            if teacher is None:
                raise TeacherError(
                    f"the cache {self.cache.path} lacks embeddings of images {index[:5].tolist()}: "
                    f"{how_to_fill(self.cache.path)}"
                )
            self.cache.store(index, flipped, teacher(images[missing.to(images.device)]))
            # Read back: the step that fills a row and the one that finds it see the same rounded numbers.
            rows[missing], _ = self.cache.look_up(index, flipped)
        if images.device.type == "cuda":
            # A copy of what is not pinned waits until the device has done all that came before it.
            rows = rows.pin_memory()
        return rows.to(images.device, non_blocking=True)

    def take_teacher_embeddings(self, rows: int) -> Tensor | None:
        """The teacher's embeddings of the batch that the student has just seen; handed out once.

        Args:
            rows: number of the student's embeddings.

        Returns:
            (rows, Dt) unit vectors, or None in a run whose methods look at none.

        Raises:
            RuntimeError: the student was not run in training mode before the head, or on another batch.
        """
        if not self._listens:
            return None
        seen, self._seen = self._seen, None
        if seen is None or seen.shape[0] != rows:
            met = "no batch" if seen is None else f"a batch of {seen.shape[0]}"
            raise RuntimeError(
                f"the head was given {rows} embeddings but the teacher has seen {met}: call the watched student in "
                "training mode once before each call of the head"
            )
        return seen

    def teacher_classifier(self, shard: ClassShard) -> Tensor | None:
        """The teacher's classifier, checked against the records that the loader reads.

        Args:
            shard: the classes of this rank.

        Returns:
            (shard.size, Dt) fp32, any norms; None in a run whose methods do not need it.

        Raises:
            TeacherError: it cannot be read, or is one of other classes or another teacher.
            CheckpointError: its files do not belong together.
            DataError: records that cannot be read.
        """
        source, teacher, faces = self.kd.classifier, self.teacher, self.faces
        if source is None or Requirement.TEACHER_CLASSIFIER not in self.needed:
            return None
        if source == CLASS_MEANS:
            if self.cache is None or faces is None:
                raise TeacherError(
                    f"kd_classifier={CLASS_MEANS} takes the means of cached embeddings: give the teacher and a cache "
                    "that `arcface-kd cache` has filled, with --kd-teacher and --kd-cache"
                )
            return class_means(self.cache, faces, shard)
        classifier = read_classifier(source, shard)
        if teacher is None or faces is None:
            what = "teacher" if teacher is None else "records"
            logger.warning("the order of the classes of %s is not checked: the run has no %s of its own", source, what)
            return classifier
        if classifier.shape[1] != teacher.embedding_size:
            raise TeacherError(
                f"the teacher's classifier {source} has {classifier.shape[1]} dimensions, the teacher "
                f"{teacher.embedding_size}: it is another teacher's"
            )
        check_order(classifier, shard, faces, lambda index: self._embed_records(teacher, faces, index), source)
        return classifier

    def _embed_records(self, teacher: Teacher, faces: FaceDataset, index: Tensor) -> Tensor:
        """The teacher's embeddings (N, Dt) of some records, plain, from the cache where they are in it."""
        plain = torch.zeros(len(index), dtype=torch.bool)
        known = plain
        rows = torch.empty(len(index), teacher.embedding_size)
        if self.cache is not None:
            rows, known = self.cache.look_up(index, plain)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        unknown = (~known).nonzero().flatten()
        # Nothing at all would be one part, of no images.
        for places in unknown.split(32) if len(unknown) else ():
            images = torch.stack([faces[int(index[place])].image for place in places.tolist()])
            rows[places] = teacher(images.to(device).float() / 127.5 - 1).cpu()
        return rows


class _ShowToTeacher:
    """The student's hook. A student that comes out of a file is a plain network: nobody is there to show to."""

    def __init__(self, distiller: Distiller) -> None:
        self._distiller: Distiller | None = distiller

    def __call__(self, student: nn.Module, arguments: tuple[Any, ...]) -> None:
        if self._distiller is not None and student.training and torch.is_grad_enabled():
            self._distiller.show(arguments[0])

    def __deepcopy__(self, memo: dict[int, Any]) -> "_ShowToTeacher":
        twin = memo[id(self)] = object.__new__(type(self))
        twin._distiller = copy.deepcopy(self._distiller, memo)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return {"_distiller": None}


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
        log: StepLog | None = None,
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
            raise TeacherError(_NO_CACHE.format("+".join(distiller.kd.methods)))
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
        self._steps_done: int | None = None
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
        self.numbers = NumberWatch()
        self.register_state_dict_pre_hook(_settle_numbers)
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
        sizes = self.ranks.sizes(rows)
        embeddings = self._gather(local_embeddings, sizes)
        batch = Batch(
            embeddings=embeddings,
            projected=embeddings
            if self.projection is None
            else self._gather(self.projection(local_embeddings.to(self.projection.weight.dtype)), sizes),
            labels=self.ranks.gather(labels, sizes),
            teacher=None if teacher is None else self.ranks.gather(teacher, sizes),
            sizes=sizes,
            step=self._count_step(),
            student_map=student_map,
            teacher_map=teacher_map,
        )
        shown = BatchRows(
            batch.step + 1, sizes, self.ranks.rank, self._distiller.take_views(rows), self._distiller.faces
        )
        if self._scores_classes:
            self.numbers.labels(batch.labels, self._num_classes, shown)
        self.numbers.embeddings(batch.embeddings, batch.teacher, shown)
        terms = _by_name({name: method(batch) for name, method in self.methods.items()})
        self.numbers.terms(list(terms), list(terms.values()), shown)
        self.last_terms = {name: term.detach() for name, term in terms.items()}
        if self._log is not None and self._log.due(batch.step + 1):
            self._log.write(batch.step + 1, self._observations(terms, local_embeddings))
        if self._watches_gradients and local_embeddings.requires_grad:
            local_embeddings.register_hook(lambda gradient: self.numbers.embedding_gradient(gradient, shown))
        return torch.stack(list(terms.values())).sum()

    def _gather(self, rows: Tensor, sizes: list[int]) -> Tensor:
        return self.ranks.gather_with_gradient(for_ddp(rows, self.ranks.world_size), sizes)

    def _count_step(self) -> int:
        """Steps done before this one; the number is read from the device once, when a run begins or resumes."""
        if self._steps_done is None:
            self._steps_done = int(self.step)
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
        self._steps_done = None
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
            bring_momentum(list(self.parameters()), self.sharded_parameters(), self.shard, self.run_folder)
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
            self.numbers.weight_gradients(list(found), list(found.values()), self._steps_done or 0)

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
        return {name: float(value) for name, value in values.items()}


def _settle_numbers(head: nn.Module, prefix: str, keep_vars: bool) -> None:
    """Before a state is saved, so that none is that has met NaN or inf."""
    cast(DistillationHead, head).numbers.settle()


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


def _replacing_classifier(types: Mapping[str, type[Method]], configs: Mapping[str, Any]) -> str | None:
    """The one method whose terms take the place of the trainer's learned classifier, if there is one."""
    found = [name for name, kind in types.items() if kind.replaces_classifier(configs[name])]
    if len(found) <= 1:
        return found[0] if found else None
    if all(types[name].classifies for name in found):
        raise ConfigError(f"{' and '.join(found)} both bring a classification loss of their own; take one of them")
    by_option = [name for name in found if not types[name].classifies]
    raise ConfigError(
        f"{' and '.join(found)} both take the place of the trainer's classification, {' and '.join(by_option)} by the "
        f"options it was given: take one of them, or leave out these options"
    )


def _maps_wanted(types: Mapping[str, type[Method]], configs: Mapping[str, Any]) -> MapsWanted | None:
    """The feature maps that all methods of a run look at together, None where none does."""
    found = {name: wanted for name, kind in types.items() if (wanted := kind.maps_wanted(configs[name])) is not None}
    if not found:
        return None
    together = next(iter(found.values()))
    for wanted in found.values():
        if replace(wanted, teacher_maps=together.teacher_maps) != together:
            raise ConfigError(f"{' and '.join(found)} look at different feature maps: give them the same options")
    return replace(together, teacher_maps=any(wanted.teacher_maps for wanted in found.values()))


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


def margin_of(margin_loss: object) -> Margin:
    """Read the margin out of arcface_torch's ``CombinedMarginLoss`` (or any object with its attributes).

    Args:
        margin_loss: an object with ``s``, ``m1``, ``m2``, ``m3`` and ``interclass_filtering_threshold``; a
            :class:`~arcface_kd.losses.margin.Margin` is returned as it is.

    Returns:
        The margin.

    Raises:
        ConfigError: an attribute is missing or a value out of range.
    """
    if isinstance(margin_loss, Margin):
        return margin_loss
    names: Sequence[str] = ("s", "m1", "m2", "m3")
    missing = [name for name in names if not hasattr(margin_loss, name)]
    if missing:
        raise ConfigError(
            f"the margin loss {type(margin_loss).__name__} has no {', '.join(missing)}; a CombinedMarginLoss is wanted"
        )
    scale, m1, m2, m3 = (float(getattr(margin_loss, name)) for name in names)
    try:
        return Margin(scale, m1, m2, m3, float(getattr(margin_loss, "interclass_filtering_threshold", 0.0)))
    except ValueError as error:
        raise ConfigError(str(error)) from error
