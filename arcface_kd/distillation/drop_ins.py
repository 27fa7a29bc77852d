"""Objects with the signatures of arcface_torch's own model, loader and head."""

import functools
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from arcface_kd.backbones import NETWORKS, get_backbone
from arcface_kd.backbones.network_name import name_checkpoints
from arcface_kd.config.kd import KDConfig
from arcface_kd.data.dataset import RecordDataset, SyntheticDataset
from arcface_kd.data.loader import FaceLoader
from arcface_kd.data.loader import get_dataloader as open_loader
from arcface_kd.distillation.distiller import Distiller
from arcface_kd.distillation.head import DistillationHead
from arcface_kd.distillation.method_set import MethodSet
from arcface_kd.distillation.tensorboard_log import TensorBoardLog
from arcface_kd.distributed.ranks import RankGroup
from arcface_kd.errors import ConfigError
from arcface_kd.evaluation.report.cost import size_line
from arcface_kd.losses.margin import Margin
from arcface_kd.system.device import autocast_dtype, default_device
from arcface_kd.teachers.options import Preprocessing
from arcface_kd.teachers.student_init import prepare_images, start_from

logger = logging.getLogger(__name__)

_MARGIN_ATTRIBUTES: Mapping[str, tuple[str, ...]] = {
    "CombinedMarginLoss": ("s", "m1", "m2", "m3"),
    "ArcFace": ("s", "margin"),
    "CosFace": ("s", "m"),
}
# Lists that were cleaned by a little keep their paper's number.
_NUM_IMAGE_TOLERANCE = 0.05


def margin_of(margin_loss: object) -> Margin:
    """Read the margin out of arcface_torch's ``CombinedMarginLoss``, ``ArcFace`` or ``CosFace``.

    A plain object with ``s``, ``m1``, ``m2``, ``m3`` and ``interclass_filtering_threshold`` will do; a
    :class:`~arcface_kd.losses.margin.Margin` is returned as it is. A ConfigError names a margin loss of another kind,
    whose ``forward`` would not be called, a missing attribute or a value out of range.
    """
    if isinstance(margin_loss, Margin):
        return margin_loss
    kind = _host_margin(margin_loss)
    missing = [name for name in _MARGIN_ATTRIBUTES[kind] if not hasattr(margin_loss, name)]
    if missing:
        raise ConfigError(
            f"the margin loss {type(margin_loss).__name__} has no {', '.join(missing)}; a CombinedMarginLoss is wanted"
        )
    scale, *margins = (float(getattr(margin_loss, name)) for name in _MARGIN_ATTRIBUTES[kind])
    m1, m2, m3 = {"ArcFace": (1.0, margins[0], 0.0), "CosFace": (1.0, 0.0, margins[0])}.get(kind) or margins
    try:
        return Margin(scale, m1, m2, m3, float(getattr(margin_loss, "interclass_filtering_threshold", 0.0)))
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _host_margin(margin_loss: object) -> str:
    """Which of arcface_torch's margin losses computes in this one's ``forward``."""
    if not isinstance(margin_loss, nn.Module):
        return "CombinedMarginLoss"
    owner = next(each for each in type(margin_loss).__mro__ if "forward" in vars(each)).__name__
    if owner not in _MARGIN_ATTRIBUTES:
        raise ConfigError(
            f"the margin loss {type(margin_loss).__name__} has a forward of its own, which distillation would not "
            f"call: its margin is applied in the pass over the classes; wanted one of {', '.join(_MARGIN_ATTRIBUTES)}"
        )
    return owner


class DropIns(NamedTuple):
    """Objects with the signatures of the trainer's own, which share one run's :class:`Distiller`.

    Attributes:
        get_model: ``(name, **kwargs) -> nn.Module``, the student with the hook.
        get_dataloader: ``(root_dir, local_rank, batch_size, dali, dali_aug, seed, num_workers) -> loader``.
        PartialFC_V2: ``(margin_loss, embedding_size, num_classes, sample_rate, fp16) -> nn.Module``, the head.
        distiller: what they share.
    """

    get_model: Callable[..., nn.Module]
    get_dataloader: Callable[..., Any]
    PartialFC_V2: Callable[..., DistillationHead]
    distiller: Distiller


def _refuse_classes_of_nobody(config: Mapping[str, Any], loader: FaceLoader, methods: MethodSet) -> None:
    """Refuse images without any label in a run that counts on classes."""
    if loader.faces.found_classes:
        return
    methods.refuse_without_labels()
    if classes := config.get("num_classes"):
        raise ConfigError(
            f"num_classes is {classes}, and no image of {config.get('rec')} has a label: set num_classes=0"
        )


def _compare_with_data(config: Mapping[str, Any], loader: FaceLoader) -> None:
    """Say in one warning what the config states otherwise than the data has it: schedules and classes follow it."""
    if loader.sampler.rank != 0:
        return
    faces, told = loader.faces, []
    images, there = config.get("num_image"), len(faces)
    if images is not None and abs(images - there) > _NUM_IMAGE_TOLERANCE * there:
        effect = "stays too high to the end" if images > there else "has fallen to its end too early"
        told.append(
            f"num_image is {images}, but the data set holds {there} images: the learning rate {effect}; set "
            f"num_image={there}"
        )
    classes = config.get("num_classes")
    if classes is not None and not isinstance(faces, SyntheticDataset):
        found = faces.found_classes
        # Faces of nobody say nothing of classes.
        if found and classes != found:
            told.append(f"num_classes is {classes}, but the labels make {found} classes; set num_classes={found}")
        if isinstance(faces, RecordDataset) and faces.stated_classes not in (None, found):
            told.append(f"the file `property` states {faces.stated_classes} classes, but the labels make {found}")
    if told:
        logger.warning("%s", "; ".join(told))


def drop_ins(
    config: Callable[[], Mapping[str, Any]],
    *,
    distiller: Distiller | None = None,
    host_model: Callable[..., nn.Module] | None = None,
    host_loader: Callable[..., Any] | None = None,
    host_head: Callable[..., nn.Module] | None = None,
) -> DropIns:
    """Make the drop-ins of one run.

    Args:
        config: gives the run's merged config; asked when a drop-in is called, since the host completes it late.
        distiller: None reads the ``kd*`` keys of the config now and loads the teacher.
        host_model: the trainer's own ``get_model``, for all names that it knows; None takes this package's backbones.
        host_loader: the trainer's own ``get_dataloader``, which serves DALI and ``kd_loader=host``, and whose signature
            says what the arguments mean; None has neither.
        host_head: the trainer's own ``PartialFC_V2``, for its signature.

    Returns:
        The drop-ins.

    Raises:
        ConfigError: a bad ``kd*`` key.
        TeacherError: no teacher where one is needed.
    """
    shared = distiller if distiller is not None else Distiller(KDConfig.from_config(config()))
    makers = _Makers(config, shared, host_model, host_loader, host_head)
    return DropIns(
        _like(host_model or get_backbone, makers.get_model),
        _like(host_loader or open_loader, makers.get_dataloader),
        _like(host_head or _head_arguments, makers.partial_fc),
        shared,
    )


def _like(own: Callable[..., Any], drop_in: Callable[..., Any]) -> Callable[..., Any]:
    """The drop-in with the signature of what it takes the place of."""

    @functools.wraps(own, updated=())
    def call(*args: Any, **kwargs: Any) -> Any:
        return drop_in(*args, **kwargs)

    return call


# What the drop-ins take of the trainer's own arguments; the first ones every trainer has.
_LOADER = ("root_dir", "local_rank", "batch_size"), ("dali", "dali_aug", "seed", "num_workers")
_HEAD = ("margin_loss", "embedding_size", "num_classes"), ("sample_rate", "fp16")


def _head_arguments(
    margin_loss: object, embedding_size: int, num_classes: int, sample_rate: float = 1.0, fp16: bool = False
) -> None:
    """The signature of the newest ``PartialFC_V2``."""


def bind(
    own: Callable[..., Any] | None,
    newest: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    names: tuple[Sequence[str], Sequence[str]],
) -> dict[str, Any]:
    """What a trainer's call means, by the signature of the function that the trainer itself has for it.

    Trainers of other years and forks differ in their arguments. An ``own`` that is None, or only passes everything on,
    is taken to be like ``newest``, today's arcface_torch. ``names`` are the arguments that are needed, and those that
    are taken where the trainer has them. Defaults are included; a warning tells of arguments that have no effect.
    """
    needed, optional = names
    own = newest if own is None else own
    title = getattr(own, "__name__", str(own))
    try:
        signature = inspect.signature(own)
        if not any(name in signature.parameters for name in needed):
            # One that passes everything on says nothing of its arguments.
            signature = inspect.signature(newest)
        given = signature.bind(*args, **kwargs)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the trainer calls its {title} otherwise than it is defined: {error}") from error
    given.apply_defaults()
    found = {name: given.arguments[name] for name in (*needed, *optional) if name in given.arguments}
    missing = [name for name in needed if name not in found]
    if missing:
        raise ConfigError(
            f"the trainer's {title}{signature} has no {', '.join(missing)}: give it the arguments of arcface_torch's "
            "own, set kd_loader=host, by which get_dataloader stays the trainer's, or use the library in your loop "
            "(docs/library.md)"
        )
    ignored = [
        name
        for name, value in given.arguments.items()
        if name not in found and value not in (signature.parameters[name].default, (), {})
    ]
    if ignored:
        logger.warning("%s of the trainer's %s has no effect with --kd", ", ".join(ignored), title)
    return found


@dataclass(frozen=True)
class _Makers:
    """The drop-ins as bound methods; arguments as in :func:`drop_ins`."""

    config: Callable[[], Mapping[str, Any]]
    shared: Distiller
    host_model: Callable[..., nn.Module] | None
    host_loader: Callable[..., Any] | None
    host_head: Callable[..., nn.Module] | None

    def get_model(self, name: str, *args: Any, **kwargs: Any) -> nn.Module:
        """The student, watched; it starts from ``student.init`` where that is given."""
        if args:
            names = list(inspect.signature(self.host_model or get_backbone).parameters)[1:]
            kwargs.update(zip(names, args, strict=False))
        init, preprocessing = self.shared.kd.student.init, Preprocessing()
        if init is None:
            student = self._build(name, **kwargs)
        else:
            student, preprocessing = start_from(
                init,
                self.shared.kd.options.get("teacher"),
                lambda: self._build(name, **kwargs),
                kwargs.get("num_features", 512),
                name=name,
                fp16=bool(kwargs.get("fp16", False)),
            )
        logger.info("student %s: %s", name, size_line(student, preprocessing.size))
        # Behind the teacher's hook, which wants the images as the loader brings them.
        prepare_images(self.shared.watch(student), preprocessing)
        return student

    def _build(self, name: str, **kwargs: Any) -> nn.Module:
        """The trainer's own network, or this package's where the trainer has none of that name."""
        if self.host_model is None or ":" in name:
            return get_backbone(name, **kwargs)
        try:
            network = self.host_model(name, **kwargs)
        # For an unknown name arcface_torch raises the first, forks the others.
        except (ValueError, KeyError, NotImplementedError):
            if name not in NETWORKS:
                raise
            return get_backbone(name, **kwargs)
        name_checkpoints(network, name)
        return network

    def get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """This package's loader, or the trainer's own for DALI and ``kd_loader=host``."""
        config = self.config()
        if self.host_loader is not None and self.shared.faces is not None:
            # A trainer that validates; the first loader is that of training.
            logger.info("the trainer's own get_dataloader makes the loaders after the first")
            return self.host_loader(*args, **kwargs)
        by_host = self.shared.kd.loader == "host"
        # Whatever its arguments are, the trainer's own takes them.
        given = {} if by_host else bind(self.host_loader, open_loader, args, kwargs, _LOADER)
        if by_host or (given.get("dali") and self.host_loader is not None):
            if self.host_loader is None:
                raise ConfigError("kd_loader=host needs the host: run train_v2.py, or leave it out")
            if "rec_sets" in config:
                raise ConfigError(
                    f"the trainer's own loader reads one data set, but rec is {config['rec_sets']}: leave "
                    "kd_loader=host and dali out"
                )
            self._tell_what_is_off("DALI" if given.get("dali") else "the trainer's loader")
            return self.host_loader(*args, **kwargs)
        if self.host_loader is not None:
            logger.info(
                "images are read by arcface_kd, not by the trainer's dataset.py; kd_loader=host lets it read them"
            )
        # In the host, rec names the first of several sets.
        given["root_dir"] = config.get("rec_sets") or given["root_dir"]
        identities = config.get("rec_identities")
        num_classes, on_bad_record = config.get("num_classes"), self.shared.kd.on_bad_record
        loader = open_loader(**given, num_classes=num_classes, on_bad_record=on_bad_record, identities=identities)
        _refuse_classes_of_nobody(config, loader, self.shared.methods)
        _compare_with_data(config, loader)
        self.shared.use_cache(loader)
        return loader

    def _tell_what_is_off(self, reader: str) -> None:
        if self.shared.student_options.augmentation:
            raise ConfigError(
                f"student.augment={','.join(self.shared.student_options.augment)} is done by arcface_kd's loader, and "
                f"{reader} reads the images: set kd_loader=own and dali=False, or leave it out"
            )
        if self.shared.kd.cache is not None and not self.shared.methods.from_cache_alone:
            self.shared.cache_is_off = True
            logger.warning(
                "kd_cache is off: %s does not say which records a batch shows, nor how; the teacher runs each step",
                reader,
            )
        if self.shared.kd.on_bad_record == "skip":
            logger.warning("kd_on_bad_record=skip is off: %s decides itself what becomes of a bad record", reader)

    def _product_dtype(self, fp16: bool) -> torch.dtype | None:
        """The format of the head's products; the trainer asks for a narrow head, or, on a GPU, runs in fp16 itself."""
        device, products = default_device(), self.shared.kd.head.products
        if products is not None:
            return {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}[products]
        narrow = fp16 or (bool(self.config().get("fp16")) and device.type == "cuda")
        return autocast_dtype(device) if narrow else None

    def partial_fc(self, *args: Any, **kwargs: Any) -> DistillationHead:
        """The head; what the trainer does not pass comes from the config."""
        given = bind(self.host_head, _head_arguments, args, kwargs, _HEAD)
        settings, ranks = self.config(), RankGroup()
        images_a_step = int(settings["batch_size"]) * ranks.world_size
        steps_per_epoch = max(1, settings["num_image"] // images_a_step)
        epochs = settings.get("num_epoch")
        folder = Path(settings["output"])
        if (teacher := self.shared.teacher) is not None:
            # Here and not when it is loaded: by now the trainer has opened its log.
            logger.info("teacher: %s, %d-d, %s", teacher.description, teacher.embedding_size, teacher.preprocessing)
        return DistillationHead(
            self.shared,
            margin_of(given["margin_loss"]),
            given["embedding_size"],
            given["num_classes"],
            float(given.get("sample_rate", 1.0)),
            self._product_dtype(bool(given.get("fp16"))),
            seed=int(settings["seed"]),
            steps_per_epoch=steps_per_epoch,
            loss_is_scaled=bool(settings.get("fp16")) and default_device().type == "cuda",
            total_steps=None if epochs is None else max(1, steps_per_epoch * int(epochs)),
            ranks=ranks,
            log=TensorBoardLog(folder / "tensorboard", int(settings["frequent"]), ranks.rank == 0),
            run_folder=folder,
            # The compact trainer counts its schedule in images.
            images_a_step=None if self.host_head is None else images_a_step,
        )
