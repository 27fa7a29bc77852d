"""The ``--kd*`` flags of a trainer's command line."""

import argparse
from collections.abc import Mapping
from typing import Any, get_args

from arcface_kd.config.kd import KDConfig
from arcface_kd.errors import ConfigError, OnBadRecord


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
