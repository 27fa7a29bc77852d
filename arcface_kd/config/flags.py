"""The ``--kd*`` flags of a trainer's command line: one for each key of :class:`~arcface_kd.config.kd.KDConfig`."""

import argparse
from collections.abc import Mapping
from typing import Any

from arcface_kd.config.kd import KDConfig, option_items
from arcface_kd.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--kd`` and its companions to a trainer's arguments.

    Args:
        parser: of the trainer's command line.
    """
    group = parser.add_argument_group("distillation")
    for key in KDConfig.keys().values():
        several: dict[str, Any] = {"nargs": "+", "action": "extend"} if key.many else {}
        if key.repeats:
            several = {"action": "append"}
        group.add_argument(key.flag, dest=key.name, metavar=key.metavar, choices=key.choices, help=key.help, **several)


def merge_arguments(config: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Write the flags that were given into a config, over the keys that it has."""
    for key in KDConfig.keys().values():
        if (value := getattr(arguments, key.name)) is None:
            continue
        if key.many:
            value = dict([*option_items(config.get(key.name)), *option_items(value)])
        config[key.name] = value[0] if key.repeats and len(value) == 1 else value


def flags_of(arguments: argparse.Namespace) -> list[str]:
    """The flags that were given, as words of a command line."""
    words: list[str] = []
    for key in KDConfig.keys().values():
        if (value := getattr(arguments, key.name)) is not None:
            for part in value if key.repeats else (value,):
                words += [key.flag, *(part if key.many else [part])]
    return words


def refuse_flags_without_method(
    config: Mapping[str, Any], arguments: argparse.Namespace, *, reads_records: bool = True
) -> None:
    """Refuse flags that have no effect, since a run that only seems to distil costs days.

    A method that is switched off by name (``--kd ""``) is no mistake, nor are the keys that a config keeps for it.
    ``reads_records`` says that this package reads the records without distillation too, and minds the flags that say
    how.
    """
    if config.get("kd") or arguments.kd is not None:
        return
    given = [
        key.flag
        for key in KDConfig.keys().values()
        if getattr(arguments, key.name) is not None and (key.distils or not reads_records)
    ]
    if given:
        raise ConfigError(
            f"{' and '.join(given)} without a method has no effect: add --kd METHOD, set kd in the config, or leave it "
            "out"
        )
