"""Where the trainer and this package meet: the flag, the drop-ins and the line that puts them in place.

A patched trainer calls :func:`add_arguments` and, with ``--kd``, :func:`attach`. A copied config calls :func:`attach`
in its last line. The compact trainer asks for the :func:`drop_ins` directly.
"""

import argparse
import logging
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args

from torch import nn

from arcface_kd.backbones import get_backbone
from arcface_kd.config import KDConfig, reading_config
from arcface_kd.data.dataset import OnBadRecord
from arcface_kd.data.loader import get_dataloader as open_loader
from arcface_kd.device import narrow_format, training_device
from arcface_kd.distiller import DistillationHead, Distiller, margin_of
from arcface_kd.errors import ConfigError
from arcface_kd.sharding import RankGroup
from arcface_kd.shkd_stages import NAME as STAGED
from arcface_kd.shkd_stages import next_stage, wants_stages
from arcface_kd.step_log import StepLog
from arcface_kd.teachers.starting_point import prepare_images, start_from

logger = logging.getLogger(__name__)

# What the running trainer must know by these names for the drop-ins to take their place.
HOST_NAMES = ("get_model", "get_dataloader", "PartialFC_V2")


class DropIns(NamedTuple):
    """Objects with the signatures of the trainer's own, sharing one run's :class:`~arcface_kd.distiller.Distiller`.

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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--kd`` and its companions, and ``--on-bad-record``, to a trainer's arguments.

    Args:
        parser: of the trainer's command line.
    """
    group = parser.add_argument_group("distillation")
    group.add_argument("--kd", metavar="METHOD", help="distil with this method; several that combine are joined by +")
    group.add_argument("--kd-teacher", metavar="FILE", help="the teacher: a checkpoint, an ONNX file, ...")
    group.add_argument("--kd-cache", metavar="FILE", help="keep the teacher's embeddings here: it then runs once")
    group.add_argument(
        "--kd-classifier",
        metavar="FILE",
        help="the teacher's classifier: a file, the folder of the run that trained it, or class-means",
    )
    group.add_argument(
        "--kd-option",
        metavar="NAME=VALUE",
        nargs="+",
        action="extend",
        help="options such as teacher.channels=bgr or adadistill.alpha=plain",
    )
    group.add_argument(
        "--on-bad-record",
        dest="kd_on_bad_record",
        choices=get_args(OnBadRecord),
        help="a record that cannot be read ends the run (stop, default), or the next good one is shown in its place "
        "and the log tells which and how many (skip)",
    )


def merge_arguments(config: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Write the flags that were given into a config, over the keys that it has.

    Args:
        config: an arcface_torch config.
        arguments: parsed by a parser that :func:`add_arguments` extended.
    """
    for key in ("kd", "kd_teacher", "kd_cache", "kd_classifier", "kd_on_bad_record"):
        if getattr(arguments, key) is not None:
            config[key] = getattr(arguments, key)
    if arguments.kd_option:
        options = dict(KDConfig.option_items(config.get("kd_option")))
        options.update(KDConfig.option_items(arguments.kd_option))
        config["kd_option"] = options


def flags_of(arguments: argparse.Namespace) -> list[str]:
    """The flags that were given, as words of a command line.

    Args:
        arguments: parsed by a parser that :func:`add_arguments` extended.
    """
    words: list[str] = []
    for key in ("kd", "kd_teacher", "kd_cache", "kd_classifier", "kd_on_bad_record", "kd_option"):
        value = getattr(arguments, key)
        if value:
            flag = "--" + key.replace("_", "-").replace("kd-on-bad", "on-bad")
            words += [flag, *([value] if isinstance(value, str) else value)]
    return words


def refuse_flags_without_method(
    config: Mapping[str, Any], arguments: argparse.Namespace, *, reads_records: bool = True
) -> None:
    """Refuse flags that nobody would look at, since a run that only seems to distil costs days.

    A method that is switched off by name (``--kd ""``) is no mistake, nor are the keys that a config keeps for it.

    Args:
        config: with the flags merged in.
        arguments: parsed by a parser that :func:`add_arguments` extended.
        reads_records: whether this package reads the records without distillation too, and minds ``--on-bad-record``.

    Raises:
        ConfigError: a flag was given, and there is no method.
    """
    if config.get("kd") or arguments.kd is not None:
        return
    given = [word for word in flags_of(arguments) if word.startswith("--kd-")]
    if arguments.kd_on_bad_record is not None and not reads_records:
        given.append("--on-bad-record")
    if given:
        raise ConfigError(
            f"{' and '.join(given)} without a method: nothing would come of it; add --kd METHOD, set kd in the config, "
            "or leave it out"
        )


def drop_ins(
    config: Callable[[], Mapping[str, Any]],
    *,
    distiller: Distiller | None = None,
    host_model: Callable[..., nn.Module] | None = None,
    host_loader: Callable[..., Any] | None = None,
) -> DropIns:
    """Make the drop-ins of one run.

    Args:
        config: gives the run's merged config; asked when a drop-in is called, since the host completes it late.
        distiller: None reads the ``kd*`` keys of the config now and loads the teacher.
        host_model: the trainer's own ``get_model``; None takes this package's backbones.
        host_loader: the trainer's own ``get_dataloader``, which still serves DALI; None has no DALI.

    Returns:
        The drop-ins.

    Raises:
        ConfigError: a bad ``kd*`` key.
        TeacherError: no teacher where one is needed.
    """
    shared = distiller if distiller is not None else Distiller(KDConfig.from_config(config()))

    def get_model(name: str, **kwargs: Any) -> nn.Module:
        def build() -> nn.Module:
            return get_backbone(name, **kwargs) if host_model is None else host_model(name, **kwargs)

        init = shared.kd.student.init
        if init is None:
            return shared.watch(build())
        student, preprocessing = start_from(
            init,
            shared.kd.options.get("teacher"),
            build,
            kwargs.get("num_features", 512),
            fp16=bool(kwargs.get("fp16", False)),
        )
        # Behind the teacher's hook, which wants the images as the loader brings them.
        prepare_images(shared.watch(student), preprocessing)
        return student

    def get_dataloader(
        root_dir: str,
        local_rank: int,
        batch_size: int,
        dali: bool = False,
        dali_aug: bool = False,
        seed: int = 2048,
        num_workers: int = 2,
    ) -> Any:
        if dali and host_loader is not None:
            if shared.kd.cache is not None and not shared.from_cache_alone:
                logger.warning(
                    "kd_cache is off: DALI does not say which records a batch shows, nor how; the teacher runs each "
                    "step"
                )
            if shared.kd.on_bad_record == "skip":
                logger.warning("kd_on_bad_record=skip is off: DALI decides itself what becomes of a bad record")
            return host_loader(root_dir, local_rank, batch_size, dali, dali_aug, seed, num_workers)
        num_classes = config().get("num_classes")
        loader = open_loader(
            *(root_dir, local_rank, batch_size, dali, dali_aug, seed, num_workers),
            num_classes=num_classes,
            on_bad_record=shared.kd.on_bad_record,
        )
        shared.read_through_cache(loader)
        return loader

    def partial_fc(
        margin_loss: object,
        embedding_size: int,
        num_classes: int,
        sample_rate: float = 1.0,
        fp16: bool = False,
    ) -> DistillationHead:
        settings, ranks = config(), RankGroup()
        total_batch = settings["batch_size"] * ranks.world_size
        steps_per_epoch = max(1, settings["num_image"] // total_batch)
        epochs = settings.get("num_epoch")
        return DistillationHead(
            shared,
            margin_of(margin_loss),
            embedding_size,
            num_classes,
            float(sample_rate),
            narrow_format(training_device()) if fp16 else None,
            seed=int(settings["seed"]),
            steps_per_epoch=steps_per_epoch,
            loss_is_scaled=bool(settings.get("fp16")) and training_device().type == "cuda",
            total_steps=None if epochs is None else max(1, steps_per_epoch * int(epochs)),
            ranks=ranks,
            log=StepLog(Path(settings["output"]) / "tensorboard", int(settings["frequent"]), ranks.rank == 0),
            run_folder=Path(settings["output"]),
        )

    return DropIns(get_model, get_dataloader, partial_fc, shared)


def _live_config(config: Mapping[str, Any]) -> Callable[[], Mapping[str, Any]]:
    """The host's merged config whenever it is asked for.

    A copied config calls :func:`attach` while the host is still merging: the base gets the file's keys and the output
    folder only afterwards.
    """

    def current() -> Mapping[str, Any]:
        base = sys.modules.get("configs.base")
        merged = dict(getattr(base, "config", {}))
        merged.update({key: value for key, value in config.items() if value is not None})
        return merged

    return current


def _go_to_next_stage(config: dict[str, Any], caller: str) -> None:
    """Make the config of a method of several runs that of the next one."""
    settings = dict(_live_config(config)())
    if settings.get("output") is None:
        # The trainer will call it so, but has not yet.
        settings["output"] = str(Path("work_dirs") / caller.rpartition(".")[2])
    stage = next_stage(settings)
    if stage is None:
        raise ConfigError(
            f"all three runs of shkd are done, see {settings['output']}; give another output to begin anew"
        )
    config.update(stage.changes)
    if RankGroup().rank == 0:
        print(stage, flush=True)


def _require_names(host: types.ModuleType) -> None:
    """Refuse a trainer that lacks what the drop-ins replace."""
    missing = [name for name in HOST_NAMES if not hasattr(host, name)]
    if missing:
        raise ConfigError(
            f"{getattr(host, '__file__', host.__name__)} has no {', '.join(missing)}: the drop-ins replace these "
            "globals of arcface_torch's train_v2.py; run that trainer, or `arcface-kd train`"
        )


def attach(
    config: dict[str, Any],
    arguments: argparse.Namespace | None = None,
    trainer: types.ModuleType | None = None,
) -> DropIns | None:
    """Put the drop-ins into a running arcface_torch trainer.

    The trainer takes ``get_model``, ``get_dataloader`` and ``PartialFC_V2`` by ``from X import Y``, so they are plain
    globals of its module, and a config is read before any of them is used.

    Args:
        config: the trainer's config, or the part of it that a config file defines.
        arguments: the command line's, whose ``--kd*`` flags win over the config's keys.
        trainer: the running trainer's module; None takes ``__main__``.

    Returns:
        The drop-ins; None where there is nothing to do: ``kd`` is not set, a copied config has done it already and no
        flag changes it, or the compact trainer reads the config file and asks for the drop-ins itself.

    Raises:
        ConfigError: a bad ``kd*`` key, a flag that would have no effect, or a name that the trainer does not have (the
            message says which).
        TeacherError: no teacher where one is needed.
    """
    if reading_config():
        return None
    host = trainer if trainer is not None else sys.modules["__main__"]
    if arguments is not None and (copied := host.__dict__.get("_arcface_kd_copied")) is not None:
        given = [word for word in flags_of(arguments) if word.startswith("--")]
        if not given and arguments.kd is None:
            return None
        if given and copied == STAGED:
            raise ConfigError(
                f"{' and '.join(given)} would change a run of {STAGED} that the config's last line has begun: set the "
                "keys in the config"
            )
    if arguments is not None:
        merge_arguments(config, arguments)
        refuse_flags_without_method(config, arguments, reads_records=False)
    if config.get("kd"):
        _require_names(host)
        if arguments is None:
            host.__dict__["_arcface_kd_copied"] = config["kd"]
    if wants_stages(config):
        _go_to_next_stage(config, str(sys._getframe(1).f_globals.get("__name__", "")))
    if not config.get("kd"):
        KDConfig.from_config(config)
        # A flag has switched off what a copied config asks for.
        for name, value in host.__dict__.pop("_arcface_kd_replaced", {}).items():
            setattr(host, name, value)
        return None
    # A copied config on a trainer with the flag comes here twice: the second time must not wrap the first's drop-ins.
    own = host.__dict__.setdefault("_arcface_kd_replaced", {name: getattr(host, name) for name in HOST_NAMES})
    made = drop_ins(_live_config(config), host_model=own["get_model"], host_loader=own["get_dataloader"])
    for name in HOST_NAMES:
        setattr(host, name, getattr(made, name))
    return made
