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
from typing import Any

from arcface_kd.config.arcface_torch import reading_config
from arcface_kd.config.flags import flags_of, merge_arguments, refuse_flags_without_method
from arcface_kd.config.kd import KDConfig
from arcface_kd.distillation.drop_ins import DropIns, drop_ins
from arcface_kd.distributed.ranks import RankGroup
from arcface_kd.errors import ConfigError
from arcface_kd.methods.shkd.stages import NAME as STAGED
from arcface_kd.methods.shkd.stages import next_stage, wants_stages

logger = logging.getLogger(__name__)

# What the running trainer must know by these names for the drop-ins to take their place.
HOST_NAMES = ("get_model", "get_dataloader", "PartialFC_V2")


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
