"""Registering commands, and arguments that several of them take."""

import argparse
import sys
from collections.abc import Callable, Mapping
from typing import Any

from arcface_kd.errors import ConfigError

Command = Callable[[argparse.Namespace], None]


class _AnyOrder(argparse.ArgumentParser):
    """Takes positional words before, between and behind flags, also where some may be left out."""

    _mixing = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._mixing or self._subparsers is not None:
            return super().parse_known_args(args, namespace)
        self._mixing = True  # the standard library's own way comes back here
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._mixing = False


class CommandLine(argparse.ArgumentParser):
    """Takes commands of two words of which the first is one by itself: ``cache CONFIG`` and ``cache merge``."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse has it, the first two words as one where they are a command."""
        words = list(sys.argv[1:] if args is None else args)
        commands = [name for action in self._actions if action.dest == "command" for name in action.choices or ()]
        if " ".join(words[:2]) in commands:
            words[:2] = [" ".join(words[:2])]
        return super().parse_known_args(words, namespace)


class Commands:
    """The commands below a parser.

    Args:
        parser: of the level above.
        dest: where the parsed arguments keep the command's name.
    """

    def __init__(self, parser: argparse.ArgumentParser, dest: str = "command") -> None:
        self._parsers = parser.add_subparsers(dest=dest, metavar="COMMAND", required=True, parser_class=_AnyOrder)

    def add(self, name: str, run: Command, summary: str, example: str) -> argparse.ArgumentParser:
        """Add a command; the parser for its arguments is returned."""
        parser = self._parser(name, summary, example)
        parser.set_defaults(run=run)
        return parser

    def group(self, name: str, summary: str, example: str) -> "Commands":
        """Add a word that has commands of its own."""
        return Commands(self._parser(name, summary, example), f"{name}_command")

    def _parser(self, name: str, summary: str, example: str) -> argparse.ArgumentParser:
        return self._parsers.add_parser(
            name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", epilog=f"example: {example}"
        )


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add ``config`` and ``--set``, see :func:`settings_of`."""
    parser.add_argument("config", help="an arcface_torch config, by path or by name in configs/; it is run as Python")
    parser.add_argument(
        "--set", metavar="KEY=VALUE", nargs="+", action="extend", default=[], help="values over those of the config"
    )


def add_teacher_options(parser: argparse.ArgumentParser, what: str) -> None:
    """Add ``--kd-option`` to a command that takes the teacher's options and no others."""
    parser.add_argument("--kd-option", metavar="NAME=VALUE", nargs="+", action="extend", help=what)


def settings_of(arguments: argparse.Namespace) -> dict[str, object]:
    """What ``--set`` says, by key."""
    settings: dict[str, object] = {}
    for pair in arguments.set:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"--set {pair!r} has no value; write --set {key}=VALUE")
        settings[key] = value
    return settings


def teacher_options_of(arguments: argparse.Namespace) -> Mapping[str, object] | None:
    """The ``teacher.*`` options; any other, which would have no effect, is refused."""
    from arcface_kd.config.kd import KDConfig

    options = KDConfig.from_config({"kd_option": arguments.kd_option}).options
    foreign = [f"{prefix}.{name}" for prefix, values in options.items() if prefix != "teacher" for name in values]
    if foreign:
        raise ConfigError(f"option {foreign[0]} has no meaning here; options start with teacher.")
    return options.get("teacher")
