"""Where the trainer and this package meet: the flag, the drop-ins and the line that puts them in place.

A patched trainer calls :func:`add_arguments` and, with ``--kd``, :func:`attach`. A copied config calls :func:`attach`
in its last line. The compact trainer asks for the :func:`drop_ins` directly.
"""

import argparse
import inspect
import logging
import re
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from arcface_kd.config.arcface_torch import reading_config
from arcface_kd.config.flags import flags_of, merge_arguments, refuse_flags_without_method
from arcface_kd.config.kd import KDConfig
from arcface_kd.data.formats.image_folder import tree_of
from arcface_kd.data.joined import verification_folder
from arcface_kd.distillation.drop_ins import DropIns, drop_ins
from arcface_kd.distributed.ranks import RankGroup
from arcface_kd.errors import ConfigError
from arcface_kd.methods.recipe import Recipe, all_done, recipe_of

logger = logging.getLogger(__name__)

# What the running trainer must know by these names for the drop-ins to take their place.
HOST_NAMES = ("get_model", "get_dataloader", "PartialFC_V2")
# Where the trainer's module keeps the recipe that a copied config has begun a run of; None for a method of one run.
_COPIED = "_arcface_kd_copied"
# Keys of the compact trainer alone, with the values at which they ask for nothing.
_COMPACT_ONLY = {"lr_decay": "linear", "ema": 0}


def _live_config(config: Mapping[str, Any]) -> Callable[[], Mapping[str, Any]]:
    """The host's merged config whenever it is asked for.

    A copied config calls :func:`attach` while the host is still merging: the base gets the file's keys and the output
    folder only afterwards.
    """

    def base() -> Mapping[str, Any]:
        found: Mapping[str, Any] = getattr(sys.modules.get("configs.base"), "config", {})
        return found

    before = base().get("output")

    def current() -> Mapping[str, Any]:
        merged = {**base(), **config}
        if merged.get("output") is None:
            # What the base has of its own is overridden by the file's None; the host then fills in the file's name.
            completed = base().get("output")
            merged["output"] = str(Path("work_dirs") / _name_of(config)) if completed in (None, before) else completed
        return merged

    return current


def _name_of(config: Mapping[str, Any]) -> str:
    """The file that defines a config, without folder and suffix; the host imports it as ``configs.NAME``."""
    modules = [(name, module) for name, module in sys.modules.items() if name.startswith("configs.")]
    return next((name.rpartition(".")[2] for name, module in modules if vars(module).get("config") is config), "run")


def _go_to_next_run(config: dict[str, Any], recipe: type[Recipe]) -> None:
    """Turn the config of a recipe into that of its next run."""
    settings = _live_config(config)()
    stage = recipe.next_run(settings)
    if stage is None:
        raise all_done(settings)
    config.update(stage.changes)
    if RankGroup().rank == 0:
        print(stage, flush=True)


def _acts(config: Mapping[str, Any]) -> bool:
    """Whether the drop-ins do anything: a method, or degraded images or a margin for the student alone."""
    kd = KDConfig.from_config(config)
    return bool(kd.methods or kd.student.augmentation or kd.head.margin)


def _keep_sets(config: dict[str, Any], acts: bool) -> None:
    """Give the trainer the folder of the first data set, in which it looks for verification sets."""
    rec = config.get("rec_sets") or config.get("rec", "")
    if isinstance(rec, str) and tree_of(rec) is None and config.get("rec_identities") is None:
        return
    if not acts:
        raise ConfigError(
            f"rec is {rec}: arcface_torch alone reads one labelled data set and no rec_identities; set kd, or run "
            "`arcface-kd train`"
        )
    config.update(rec=verification_folder(rec), rec_sets=rec)


def _warn_of_compact_keys(config: Mapping[str, Any]) -> None:
    """Warn of keys that arcface_torch's loop does not look at."""
    given = [f"{key}={config[key]}" for key, nothing in _COMPACT_ONLY.items() if config.get(key, nothing) != nothing]
    if given and RankGroup().rank == 0:
        logger.warning(
            "%s is for `arcface-kd train` alone: arcface_torch does not look at such a key", " and ".join(given)
        )


def _running_trainer() -> types.ModuleType:
    """The program itself where it is a trainer; else the module that somebody has imported one as."""
    program = sys.modules["__main__"]
    for module in (program, *list(sys.modules.values())):
        names = getattr(module, "__dict__", {})
        if all(name in names for name in HOST_NAMES):
            return module
    return program


def _require_current_stack(host: types.ModuleType) -> None:
    """Refuse a trainer that this torch would stop at its schedule, after all records and networks are loaded."""
    # The latter is that of trainers before 2023-04.
    schedule = vars(host).get("PolynomialLRWarmup") or vars(host).get("PolyScheduler")
    known = inspect.signature(torch.optim.lr_scheduler.LRScheduler).parameters
    if schedule is None or "verbose" in known:
        return
    try:
        # A patched one still takes the argument, and hands it on no more; a comment may keep the line as it was.
        source = re.sub(r"#.*", "", inspect.getsource(schedule))
        passes = re.search(r"\.__init__\([^)]*(\bverbose=|, False)", source)
    except (OSError, TypeError):
        return
    if passes:
        raise ConfigError(
            f"this trainer is older than torch {torch.__version__}: its {schedule.__name__} passes `verbose`, which is "
            "gone; run `arcface-kd patch DIR current_stack` once on its folder, or take it out of lr_scheduler.py"
        )


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
        trainer: the running trainer's module; None takes ``__main__``, or the module that was imported as a trainer.

    Returns:
        The drop-ins; None where there is nothing to do: neither ``kd`` nor ``student.augment`` or ``head.margin`` is
        set, a copied config has done it already and no flag changes it, or the compact trainer reads the config file
        and asks for the drop-ins itself.

    Raises:
        ConfigError: a bad ``kd*`` key, a flag that would have no effect, a config without the key ``kd``, a trainer
            that this torch would stop, or a name that the trainer does not have (the message says which).
        TeacherError: no teacher where one is needed.
    """
    if reading_config():
        return None
    host = trainer if trainer is not None else _running_trainer()
    if arguments is not None and not hasattr(arguments, "kd"):
        raise ConfigError(
            "attach(config, arguments) was given arguments without --kd: call arcface_kd.add_arguments(parser) before "
            "parse_args(), or attach(config) alone, which takes the config's keys"
        )
    if arguments is None and "kd" not in config:
        KDConfig.from_config(config)
        raise ConfigError(
            "attach(config) was called before config.kd is set, and nothing would be distilled: make it the config's "
            "last line, or set config.kd = None to train without"
        )
    if arguments is not None and _COPIED in host.__dict__:
        given = [word for word in flags_of(arguments) if word.startswith("--")]
        if not given:
            return None
        if host.__dict__[_COPIED] is not None:
            raise ConfigError(
                f"{' and '.join(given)} would change a run that the config's last line has begun: set the keys in the "
                "config"
            )
    if arguments is not None:
        merge_arguments(config, arguments)
        refuse_flags_without_method(config, arguments, reads_records=False)
    recipe = recipe_of(config)
    if _acts(config):
        _require_names(host)
        _require_current_stack(host)
        if arguments is None:
            host.__dict__[_COPIED] = recipe
    if recipe is not None:
        _go_to_next_run(config, recipe)
    # The next run of several may be one without a method.
    acts = _acts(config)
    _keep_sets(config, acts)
    _warn_of_compact_keys(config)
    if not acts:
        # A flag has switched off what a copied config asks for.
        for name, value in host.__dict__.pop("_arcface_kd_replaced", {}).items():
            setattr(host, name, value)
        return None
    # A copied config on a trainer with the flag comes here twice: the second time must not wrap the first's drop-ins.
    own = host.__dict__.setdefault("_arcface_kd_replaced", {name: getattr(host, name) for name in HOST_NAMES})
    made = drop_ins(
        _live_config(config),
        host_model=own["get_model"],
        host_loader=own["get_dataloader"],
        host_head=own["PartialFC_V2"],
    )
    for name in HOST_NAMES:
        setattr(host, name, getattr(made, name))
    return made
