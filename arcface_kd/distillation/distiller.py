"""The teacher's signal in one run: embeddings of each batch, from the teacher or its cache."""

import copy
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from arcface_kd import registry
from arcface_kd.config.kd import CLASS_MEANS, KDConfig
from arcface_kd.config.options import build
from arcface_kd.data.dataset import IMAGE_SIZE, FaceDataset
from arcface_kd.data.fingerprint import fingerprint, outline, shows_two_views
from arcface_kd.data.loader import BatchViews, FaceLoader
from arcface_kd.distillation.feature_maps import FeatureMaps
from arcface_kd.distillation.method_set import replacing_classifier, wanted_maps
from arcface_kd.distillation.teacher_classifier import check_order, class_means, read_classifier
from arcface_kd.distributed.class_shard import ClassShard
from arcface_kd.distributed.ranks import RankGroup, on_first_rank_first
from arcface_kd.errors import ConfigError, TeacherError
from arcface_kd.methods.base import Method, Requirement
from arcface_kd.teachers.base import Teacher, load_teacher
from arcface_kd.teachers.cache.embedding_cache import EmbeddingCache, fill_hint, identity_in, identity_of

logger = logging.getLogger(__name__)

NO_CACHE = (
    "{} takes the teacher's embeddings from a cache by the records that a batch shows, and the loader does not say "
    "which these are: set dali=False; in a loop of your own, call use_cache with the loader"
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
        self.replacing = replacing_classifier(self.method_types, self.method_configs)
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
        self.even_batches = False
        self._views: BatchViews | None = None
        self._shown: BatchViews | None = None
        self._seen: Tensor | None = None
        self.maps_wanted = wanted_maps(self.method_types, self.method_configs)
        self.maps: FeatureMaps | None = None

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
        self.even_batches = loader.even
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

    # The name that loops of users' own know.
    read_through_cache = use_cache

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
                raise TeacherError(NO_CACHE.format("+".join(self.kd.methods)))
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
                    f"{fill_hint(self.cache.path)}"
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
