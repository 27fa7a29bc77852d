"""Build option dataclasses from text and numbers."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, get_args, get_origin

from arcface_kd.errors import ConfigError, suggestion

T = TypeVar("T")


def convert(text: object, kind: Any, name: str) -> Any:
    """Read a value that may come from the command line as the type of the field it is for.

    Args:
        text: the value, often a string.
        kind: ``bool``, ``int``, ``float``, ``str``, a ``Literal`` of strings or a union of these with ``None``.
        name: of the option, for the message.

    Returns:
        The value.

    Raises:
        ConfigError: it cannot be read as ``kind``.
    """
    if get_origin(kind) in (typing.Union, types.UnionType):
        if text is None or (isinstance(text, str) and text.lower() == "none"):
            return None
        kind = next(part for part in get_args(kind) if part is not type(None))
    if get_origin(kind) is Literal:
        if text not in get_args(kind):
            raise ConfigError(f"{name} is {text!r}; it must be one of {', '.join(map(str, get_args(kind)))}")
        return text
    if kind is bool:
        known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if isinstance(text, bool):
            return text
        if str(text).lower() in known:
            return known[str(text).lower()]
        raise ConfigError(f"{name} is {text!r}; it must be true or false")
    lossy = isinstance(text, float) and kind is int and not text.is_integer()
    if lossy or (isinstance(text, bool) and kind in (int, float)):
        raise ConfigError(f"{name} is {text!r}; it must be {kind.__name__}")
    try:
        return kind(text)
    except (TypeError, ValueError):
        raise ConfigError(f"{name} is {text!r}; it must be {kind.__name__}") from None


def build(kind: type[T], values: Mapping[str, object], prefix: str) -> T:
    """Make a dataclass of knobs from option values, refusing what it does not know.

    Args:
        kind: the dataclass; ``ValueError`` from its ``__post_init__`` becomes a ConfigError.
        values: option names without prefix, and their values.
        prefix: the options' prefix (``adadistill``, ``student``), for messages.

    Returns:
        The dataclass.

    Raises:
        ConfigError: an unknown option, a value of the wrong type or out of range.
    """
    kinds = typing.get_type_hints(kind)
    known = [field.name for field in dataclasses.fields(typing.cast(Any, kind))]
    for name in values:
        if name not in known:
            has = f"it has {', '.join(f'{prefix}.{k}' for k in known)}" if known else f"{prefix} has no options"
            raise ConfigError(f"unknown option {prefix}.{name}; {has}{suggestion(name, known)}")
    converted = {name: convert(value, kinds[name], f"{prefix}.{name}") for name, value in values.items()}
    try:
        return kind(**converted)
    except ValueError as error:
        raise ConfigError(f"{prefix}: {error}") from error
