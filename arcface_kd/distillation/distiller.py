"""The teacher's signal in one run: embeddings of each batch, from the teacher or its cache."""

import copy
import logging
import time
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.hooks import RemovableHandle

from arcface_kd.config.kd import KDConfig
from arcface_kd.data.dataset import IMAGE_SIZE, FaceDataset
from arcface_kd.data.fingerprint import outline
from arcface_kd.data.loader import BatchViews, FaceLoader
from arcface_kd.distillation.feature_maps import FeatureMaps
from arcface_kd.distillation.method_set import MethodSet
from arcface_kd.distillation.run_cache import NO_VIEWS, flags_to_fill, look_up_or_fill, open_cache
from arcface_kd.distillation.teacher_classifier import classifier_of_run
from arcface_kd.distributed.class_shard import ClassShard
from arcface_kd.distributed.ranks import RankGroup
from arcface_kd.errors import ConfigError, TeacherError
from arcface_kd.methods.base import Requirement
from arcface_kd.methods.views import refuse_views
from arcface_kd.system.device import synchronize
from arcface_kd.teachers.base import Teacher, load_teacher
from arcface_kd.teachers.cache.embedding_cache import EmbeddingCache, fill_hint
from arcface_kd.teachers.cache.fill import load_run_teacher
from arcface_kd.teachers.collapse import warn_if_alike, warn_of_collapse
from arcface_kd.teachers.options import TeacherOptions

logger = logging.getLogger(__name__)

NO_CACHE = (
    "{} takes the teacher's embeddings from a cache by the records that a batch shows, and the loader does not say "
    "which these are: set dali=False; in a loop of your own, call use_cache with the loader"
)
# Rounding, and augmentations that overshoot a little, are not worth a line.
_LARGEST_PIXEL = 1.05
# The batch by whose time the teacher's cost is told: libraries have settled by then.
_TIMED = 3


class Distiller:
    """The teacher's signal in one run: shows each batch to the teacher, or looks it up in the cache, and hands it out.

    Attributes:
        methods: the run's methods.
        teacher: None where none is needed, or a full cache stands for it.
        cache: its embeddings, None until :meth:`use_cache` has opened it.
        student: the one that is watched.
        faces: the training records, where the loader has told them.
        maps: the feature maps, for methods that look at them.
        has_head: whether a head has taken a batch.
        cache_is_off: whether somebody has said that ``kd_cache`` has no effect with this run's loader.
        even_batches: whether the loader brings all ranks equally many rows.

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
        self.methods = methods = MethodSet(kd.methods, kd.options)
        refuse_views(kd, methods.types, methods.configs)
        methods.require(Requirement.TEACHER_CLASSIFIER, kd.classifier is not None)
        methods.require(Requirement.CACHED_EMBEDDINGS, kd.cache is not None, fill_hint("CACHE", flags_to_fill(kd)))
        if teacher is None and kd.teacher is not None and methods:
            teacher = load_run_teacher(kd)
        elif teacher is not None and not isinstance(teacher, Teacher):
            teacher = load_teacher(teacher, kd.options.get("teacher"))
        methods.require(Requirement.TEACHER_TAIL, teacher is not None)
        methods.require(Requirement.TEACHER_EMBEDDINGS, teacher is not None or methods.from_cache_alone)
        self.teacher = teacher
        self.student: nn.Module | None = None
        self.faces: FaceDataset | None = None
        self.cache: EmbeddingCache | None = None
        self.maps: FeatureMaps | None = None
        self.even_batches = self.cache_is_off = self._loader_looks_up = False
        self._views: BatchViews | None = None
        self._shown: BatchViews | None = None
        self._seen: Tensor | None = None
        self._untold = False
        self._batches = 0
        self.has_head = False

    def __deepcopy__(self, memo: dict[int, Any]) -> "Distiller":
        """One for copies of student and head; teacher, cache and data, which no step changes, are shared."""
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        for shared in (self.teacher, self.cache, self.faces, None if self.maps is None else self.maps.teacher):
            memo[id(shared)] = shared
        twin.__dict__ = copy.deepcopy(self.__dict__, memo)
        return twin

    def use_cache(self, loader: FaceLoader, ranks: RankGroup | None = None) -> None:
        """Keep the teacher's embeddings in the file that ``kd_cache`` names, and ask the teacher for missing ones only.

        The loader says which records a batch shows and which of them mirrored, and degrades them by
        ``student.augment``; its records are what the teacher's classifier is held against. Data that may show an image
        in other ways, by an augmentation of its own, switches the cache off with a warning: the teacher then runs each
        step. Methods that take the cache alone want it to be there, and the teacher is given up.

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
        self.even_batches = loader.even
        self.cache = open_cache(self.kd, self.methods, self.teacher, loader.faces, ranks)
        if self.methods.from_cache_alone:
            self.teacher = None
        self._loader_looks_up = loader.look_up(self.cache.look_up if self.cache is not None and self._listens else None)
        runs_on_clean = (
            self.student_options.teacher_sees_others
            and self._listens
            and self.teacher is not None
            and self.cache is None
        )
        loader.degrade(self.student_options.augmentation, keep_clean=runs_on_clean)
        if self.teacher is not None:
            warn_of_collapse(self.teacher, loader.faces, self.cache)

    # The name that loops of users' own know.
    read_through_cache = use_cache

    @property
    def teacher_embedding_size(self) -> int | None:
        """The teacher's dimension, whether it is there or its cache stands for it; None without either."""
        if self.teacher is not None:
            return self.teacher.embedding_size
        return self.cache.embedding_size if self.methods.from_cache_alone and self.cache is not None else None

    @property
    def sources(self) -> dict[str, str | None]:
        """Digests of the run's teacher and images, which must match on resume; None where there are none.

        The teacher's precision counts where the options name one: a run may go on on another device.
        """
        teacher = None
        if self.teacher is not None:
            is_named = TeacherOptions.names_precision(self.kd.options.get("teacher", {}))
            teacher = self.teacher.fingerprint if is_named else self.teacher.fingerprint_in_fp32
        if self.methods.from_cache_alone and self.cache is not None:
            teacher = str(self.cache.identity["teacher"])
        return {"teacher": teacher, "data": None if self.faces is None else outline(self.faces)}

    @property
    def compares_embeddings(self) -> bool:
        """Whether a method compares the student's embeddings with the teacher's, number by number."""
        return self.methods.compares_embeddings

    def refuse_dimension(self, embedding_size: int, teacher_embedding_size: int | None) -> None:
        """Refuse a teacher of another dimension than the student's if the two are compared unprojected."""
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
        there = self.teacher is not None or self.methods.from_cache_alone
        return there and Requirement.TEACHER_EMBEDDINGS in self.methods.needed

    def _next_views(self, views: BatchViews) -> None:
        self._views = self._shown = views

    def take_views(self, rows: int) -> BatchViews | None:
        """Which records the batch that the student has just seen shows; None where the loader does not say.

        Raises ConfigError where images are to be degraded, and the loader is not this package's.
        """
        self.has_head = True
        if self.student_options.augmentation:
            _require_our_loader(self, "student.augment")
        shown, self._shown = self._shown, None
        return shown if shown is not None and len(shown.index) == rows else None

    def watch(self, student: nn.Module) -> nn.Module:
        """Put the hook on a student: in training mode, what it is shown the teacher is shown first.

        The teacher comes first so that its activations are gone before the student's are kept for the backward pass.
        A student that was watched before, by this distiller or another, is watched by this one alone.

        Args:
            student: any module whose first argument is the batch of images.

        Returns:
            The same module.

        Raises:
            ConfigError: a student that a method cannot work with.
            TeacherError: a teacher without the feature map that a method looks at.
        """
        before = _watching.pop(student, None)
        for handle in () if before is None else before.handles:
            handle.remove()
        self.methods.prepare_student(student)
        handles = []
        if self._listens:
            handles.append(student.register_forward_pre_hook(_ShowToTeacher(self), with_kwargs=True))
        handles.append(student.register_forward_hook(_AwaitHead(self)))
        if self.methods.maps_wanted is not None and self.teacher is not None:
            self.maps = FeatureMaps(self.methods.title, self.methods.maps_wanted, self.teacher)
            size = self.teacher.preprocessing.size if self.faces is None else IMAGE_SIZE[0]
            handles.append(self.maps.watch(student, size))
        _watching[student] = _Watch(weakref.ref(self), handles)
        self.student = student
        return student

    def show(self, images: Tensor) -> None:
        """Keep what the teacher says of images (b, 3, H, W), as the student sees them, until the head asks for it."""
        if not self._listens:
            return
        self._batches += 1
        if first := self._batches == 1:
            _tell_range(images)
            if self.kd.cache is not None and not self.cache_is_off:
                _require_our_loader(self, f"kd_cache={self.kd.cache}")
        views, self._views = self._views, None
        # The head says that views are missing: activation checkpointing runs the student again without it.
        self._untold = views is None and (
            self.cache is not None or (self.student_options.teacher_sees_others and self.faces is not None)
        )
        self._seen = None if self._untold else self._teacher_embeddings(images, views)
        # Without a loader of ours this batch is all that is known of the faces.
        if first and self.faces is None and self.teacher is not None and self._seen is not None:
            warn_if_alike(self.teacher, self._seen)

    def _teacher_embeddings(self, images: Tensor, views: BatchViews | None) -> Tensor:
        """The teacher's unit embeddings of a batch, or of the images before they were degraded."""
        if self.cache is not None and views is not None:
            clean = self.faces if self.student_options.teacher_sees_others else None
            if not self._loader_looks_up:
                views = views._replace(embeddings=None)
            return look_up_or_fill(self.cache, self.teacher, images, views, clean)
        if self.teacher is None:
            raise TeacherError(NO_CACHE.format(self.methods.title))
        if views is not None and views.clean is not None:
            images = views.clean_images(images.device)
        timed = self._batches == _TIMED and self.student_options.augment__teacher == "same"
        began = _now(images) if timed else 0.0
        maps = self.maps if self.methods.compares_maps else None
        embeddings = normalize(self.teacher(images)) if maps is None else maps.embed(images)
        if timed:
            _tell_cost(_now(images) - began, len(images))
        return embeddings

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
        # Later steps may show more: activation checkpointing runs the student again in the backward pass.
        if self._batches > 1 and not self.has_head:
            logger.warning(
                "the student was run %d times in training mode before the head was called, which takes the teacher's "
                "embeddings of the last run: call it behind each run whose embeddings it is given",
                self._batches,
            )
        if seen is None and self._untold:
            raise RuntimeError(NO_VIEWS.format(rows))
        if seen is None or seen.shape[0] != rows:
            met = "no batch" if seen is None else f"a batch of {seen.shape[0]}"
            raise RuntimeError(
                f"the head was given {rows} embeddings but the teacher has seen {met}: call the watched student in "
                "training mode once before each call of the head"
            )
        return seen

    def teacher_classifier(self, shard: ClassShard) -> Tensor | None:
        """The teacher's classifier, checked against the records: (shard.size, Dt) fp32, any norms.

        None in a run whose methods do not need it.
        """
        if self.kd.classifier is None or Requirement.TEACHER_CLASSIFIER not in self.methods.needed:
            return None
        return classifier_of_run(self.kd.classifier, shard, self.teacher, self.cache, self.faces)


class _Watch(NamedTuple):
    distiller: weakref.ref[Distiller]
    handles: list[RemovableHandle]


# The last watch of each student. A copy of a student has its hooks, but is not in here until it is watched itself.
_watching: weakref.WeakKeyDictionary[nn.Module, _Watch] = weakref.WeakKeyDictionary()


def _tell_cost(seconds: float, images: int) -> None:
    logger.info(
        "student.augment.teacher=same: the teacher runs in each step, which takes it %.0f ms for %d images; "
        "student.augment.teacher=clean takes its embeddings from kd_cache",
        *(1000 * seconds, images),
    )


def _now(images: Tensor) -> float:
    """Seconds, after all that the images' device was given to do."""
    synchronize(images.device)
    return time.perf_counter()


def _tell_range(images: Tensor) -> None:
    """Warn of images that are not in [-1, 1], as those are which a loader forgot to normalise."""
    if not images.numel():
        return
    low, high = (float(value) for value in images.detach().aminmax())
    if max(-low, high) > _LARGEST_PIXEL:
        logger.warning(
            "the first batch holds values from %.4g to %.4g; teacher and student are shown RGB images in [-1, 1]: "
            "(pixel - 127.5) / 127.5",
            low,
            high,
        )


def _require_our_loader(distiller: Distiller, setting: str) -> None:
    if distiller.faces is None:
        raise ConfigError(
            f"{setting} has no effect: the images come from a loader that is not arcface_kd's and does not say what "
            f"records they are; use get_dataloader and use_cache, or leave {setting} out"
        )


def _require_head(distiller: Distiller) -> None:
    """Refuse a backward pass of a watched student whose embeddings no head of this run has seen."""
    if not distiller.has_head:
        raise ConfigError(
            f"{distiller.methods.title} has no effect: the trainer's loss comes from a head of its own, not from "
            "PartialFC_V2 as arcface_kd has put it in; name your head PartialFC_V2 in train_v2.py before "
            "arcface_kd.attach, or build a DistillationHead (docs/library.md)"
        )


class _StudentHook:
    """A hook of the student. It does nothing in a student that comes out of a file."""

    def __init__(self, distiller: Distiller) -> None:
        self._distiller: Distiller | None = distiller

    def __deepcopy__(self, memo: dict[int, Any]) -> "_StudentHook":
        twin = memo[id(self)] = object.__new__(type(self))
        twin._distiller = copy.deepcopy(self._distiller, memo)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return {"_distiller": None}

    def _told(self, student: nn.Module) -> Distiller | None:
        """The distiller, where this student is its own and trains."""
        watch = _watching.get(student)
        is_own = watch is None or watch.distiller() is self._distiller
        return self._distiller if is_own and student.training and torch.is_grad_enabled() else None


class _AwaitHead(_StudentHook):
    """Checks, in the first backward pass, that the gradients come from the run's head."""

    def __call__(self, student: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        distiller = self._told(student)
        if distiller is None or distiller.has_head:
            return
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(lambda gradient: _require_head(distiller))


class _ShowToTeacher(_StudentHook):
    """Shows the teacher what the student is shown."""

    def __call__(self, student: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if (distiller := self._told(student)) is not None:
            distiller.show(arguments[0] if arguments else next(iter(keywords.values())))
