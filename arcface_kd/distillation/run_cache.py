"""The cache of the teacher's embeddings in one run: opened, left off with a warning, or refused."""

import dataclasses
import logging

from torch import Tensor

from arcface_kd.config.kd import CLASS_MEANS, KDConfig
from arcface_kd.data.dataset import FaceDataset
from arcface_kd.data.fingerprint import fingerprint, shows_two_views
from arcface_kd.data.loader import BatchViews, read_images
from arcface_kd.distillation.method_set import MethodSet
from arcface_kd.distributed.ranks import RankGroup, on_first_rank_first
from arcface_kd.errors import TeacherError
from arcface_kd.methods.base import Requirement
from arcface_kd.teachers.base import Teacher
from arcface_kd.teachers.cache.embedding_cache import EmbeddingCache, identity_in, identity_of

logger = logging.getLogger(__name__)

NO_VIEWS = (
    "kd_cache or student.augment is set, but the loader did not say which records these {} images are: use the drop-in "
    "loader, one batch a step"
)


def open_cache(
    kd: KDConfig, methods: MethodSet, teacher: Teacher | None, faces: FaceDataset, ranks: RankGroup | None
) -> EmbeddingCache | None:
    """Open the file that ``kd_cache`` names; all ranks call. None where it is not used; a warning says why."""
    if methods.from_cache_alone:
        return _full_cache(kd, methods, teacher, faces)
    if kd.cache is not None and methods.compares_maps:
        logger.warning(
            "kd_cache has no effect: %s compares feature maps, which no cache holds, and the teacher runs each step",
            methods.title,
        )
    embeds = Requirement.TEACHER_EMBEDDINGS in methods.needed and not methods.compares_maps
    if kd.cache is None or teacher is None or not (embeds or kd.classifier == CLASS_MEANS):
        return None
    if not shows_two_views(faces):
        logger.warning(
            "kd_cache is off: a %s may show an image in other ways than plain and mirrored: the teacher runs each step",
            type(faces).__name__,
        )
        return None
    identity = identity_of(teacher, fingerprint(faces), len(faces))
    return on_first_rank_first(lambda: EmbeddingCache(str(kd.cache), identity, flags=flags_to_fill(kd)), ranks)


def flags_to_fill(kd: KDConfig) -> list[str]:
    """The flags with which ``arcface-kd cache`` fills the cache of a run: all that the run has.

    A teacher and a cache that it does not name stand there as placeholders.
    """
    return dataclasses.replace(kd, teacher=kd.teacher or "FILE", cache=kd.cache or "CACHE", loader="own").flags()


def _full_cache(kd: KDConfig, methods: MethodSet, teacher: Teacher | None, faces: FaceDataset) -> EmbeddingCache:
    """The cache that stands for the teacher, compared with the teacher where one was given."""
    if not shows_two_views(faces):
        raise TeacherError(
            f"{methods.title} takes the teacher's embeddings from a cache, and a {type(faces).__name__} may show an "
            "image in other ways than plain and mirrored: train on records or on a folder"
        )
    data = fingerprint(faces)
    path, images, flags = str(kd.cache), len(faces), flags_to_fill(kd)
    identity = identity_in(path, data, images, flags) if teacher is None else identity_of(teacher, data, images)
    return EmbeddingCache(path, identity, create=False, flags=flags)


def look_up_or_fill(
    cache: EmbeddingCache, teacher: Teacher | None, images: Tensor, views: BatchViews, clean: FaceDataset | None = None
) -> Tensor:
    """The teacher's embeddings (b, Dt) of a batch; those that the cache lacks are made and stored.

    The loader has looked them up, unless ``views.embeddings`` is None.

    ``clean`` gives the records where the images are degraded, and None where they are as they were.
    """
    if views.index.shape[0] != images.shape[0]:
        raise RuntimeError(NO_VIEWS.format(images.shape[0]))
    rows = views.embeddings
    if rows is None:
        rows, _ = cache.look_up(views.index, views.flipped)
    known = ~rows[:, 0].isnan()
    if not known.all():
        missing = ~known
        index, flipped = views.index[missing], views.flipped[missing]
        if teacher is None:
            raise TeacherError(
                f"the cache {cache.path} lacks embeddings of images {index[:5].tolist()}: {cache.fill_hint}"
            )
        places = missing.nonzero().flatten()
        if images.device.type == "cuda":
            places = few_sizes(places, len(images)).pin_memory()
        if clean is None:
            shown = images[places.to(images.device, non_blocking=True)]
        else:
            shown = read_images(clean, views, places, images.device)
        cache.store(index, flipped, teacher(shown)[: len(index)])
        # Read back: the step that fills a row and the one that finds it see the same rounded numbers.
        rows[missing], _ = cache.look_up(index, flipped)
    if images.device.type == "cuda":
        # A copy of what is not pinned waits until the device has done all that came before it.
        rows = rows.pin_memory()
    return rows.to(images.device, non_blocking=True)


def few_sizes(places: Tensor, most: int) -> Tensor:
    """Repeat places (n,) of a batch until they are a power of two or the whole batch.

    A GPU's convolutions are tuned anew for each number of images.
    """
    size = min(1 << (len(places) - 1).bit_length(), most)
    return places.repeat(-(-size // len(places)))[:size]
