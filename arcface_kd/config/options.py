"""Option dataclasses: values from text or Python, checked against the fields' annotations and ranges."""

import contextlib
import dataclasses
import math
import os
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from arcface_kd.errors import ConfigError, suggestion

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Range:
    """Where a number may lie, stated beside its field: ``Annotated[float, Range(0, 1)]``.

    Of a tuple, each number is meant.
    """

    low: float  # lower bound
    high: float = math.inf  # upper bound; infinite where there is none, which no value is
    # Which bounds belong to it, as in mathematics: ``[]``, ``[)``, ``(]`` or ``()``.
    ends: Literal["[]", "[)", "(]", "()"] = "[]"

    def __contains__(self, number: float) -> bool:
        above = number >= self.low if self.ends[0] == "[" else number > self.low
        below = number <= self.high if self.ends[1] == "]" else number < self.high
        return above and below

    def __str__(self) -> str:
        if self.high < math.inf:
            return f"in {self.ends[0]}{self.low:g}, {self.high:g}{self.ends[1]}"
        return f"at least {self.low:g}" if self.ends[0] == "[" else f"greater than {self.low:g}"


Weight = Annotated[float, Range(0)]
Positive = Annotated[float, Range(0, ends="(]")]
Share = Annotated[float, Range(0, 1, "(]")]
Temperature = Annotated[float, Range(1)]
Count = Annotated[int, Range(1)]


@dataclasses.dataclass(frozen=True)
class Options:
    """Base of option dataclasses: fields are read by :func:`convert` as what their annotations say.

    A subclass whose fields depend on each other checks that in a ``__post_init__`` of its own, after this one's. A dot
    in an option's name is two underscores in its field's.

    Raises:
        ConfigError: a value of the wrong type or out of range.
    """

    def __post_init__(self) -> None:
        for name, kind in kinds_of(type(self)).items():
            object.__setattr__(self, name, convert(getattr(self, name), kind, _option(name)))


def kinds_of(options: type[Any]) -> dict[str, Any]:
    """The annotations of a dataclass' fields, by name, with their ranges."""
    hints = typing.get_type_hints(options, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(options)}


def _option(field: str) -> str:
    return field.replace("__", ".")


def build(kind: type[T], values: Mapping[str, object], prefix: str) -> T:
    """Make a dataclass of options from values that may be text; ``prefix`` names them in messages.

    A ``ValueError`` of its ``__post_init__`` becomes a ConfigError.
    """
    kinds = {_option(field): each for field, each in kinds_of(kind).items()}
    for name in values:
        if name not in kinds:
            has = f"there are {', '.join(f'{prefix}.{known}' for known in kinds)}" if kinds else "it has none"
            raise ConfigError(f"unknown option {prefix}.{name}; {has}{suggestion(name, kinds, f'{prefix}.')}")
    converted = {
        name.replace(".", "__"): convert(value, kinds[name], f"{prefix}.{name}") for name, value in values.items()
    }
    try:
        return kind(**converted)
    except ValueError as error:
        raise ConfigError(f"{prefix}: {error}") from error


def convert(value: object, kind: Any, name: str) -> Any:
    """Read a value, which may be the text of a command line, as the type of the field it is for.

    Types are ``bool``, ``int``, ``float``, ``str``, a ``Literal`` of words, a tuple of numbers (one number stands for
    all of them), one of these ``Annotated`` with a :class:`Range`, or a union of them and ``None``.
    """
    try:
        return _read(value, kind)
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f"{name} is {value!r}; it must be {_described(kind)}") from None


def _read(value: Any, kind: Any) -> Any:
    """The value as this type; any ValueError, TypeError or OverflowError says that it is none."""
    if get_origin(kind) in (typing.Union, types.UnionType):
        if value is None or (isinstance(value, str) and value.strip().lower() in ("", "none")):
            return None
        return _first_of(value, [part for part in get_args(kind) if part is not type(None)])
    if get_origin(kind) is Annotated:
        own, *notes = get_args(kind)
        read = _read(value, own)
        numbers = read if isinstance(read, tuple) else (read,)
        inside = all(number in note for note in notes if isinstance(note, Range) for number in numbers)
        return read if inside else _refuse()
    if get_origin(kind) is Literal:
        return _word(value, get_args(kind))
    if get_origin(kind) is tuple:
        return _several(value, get_args(kind))
    if kind is bool:
        return _word(value, (True, False), yes=True, no=False, **{"1": True, "0": False})
    if kind in (int, float):
        return _number(value, kind)
    if kind is Any:
        return value
    if kind is str and not isinstance(value, str | int | float | os.PathLike):
        raise ValueError
    return _refuse() if value is None else kind(value)


def _first_of(value: Any, kinds: Sequence[Any]) -> Any:
    for kind in kinds[:-1]:
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            return _read(value, kind)
    return _read(value, kinds[-1])


def _word(value: Any, words: Sequence[Any], **other: Any) -> Any:
    known = {**{str(word).lower(): word for word in words}, **other}
    return known[word] if (word := str(value).strip().lower()) in known else _refuse()


def _number(value: Any, kind: type) -> Any:
    if isinstance(value, bool) or (kind is int and isinstance(value, float) and not value.is_integer()):
        raise ValueError
    number = kind(value)
    return number if math.isfinite(number) else _refuse()


def _several(value: Any, kinds: Sequence[Any]) -> tuple[Any, ...]:
    if isinstance(value, str):
        value = re.split(r"[\s,]+", value.strip("[]() \t"))
    items = list(value) if isinstance(value, Sequence) else [value]
    if kinds[-1] is Ellipsis:
        kinds = [kinds[0]] * len(items)
    elif len(items) == 1:
        items *= len(kinds)
    return tuple(_read(item, kind) for item, kind in zip(items, kinds, strict=True))


def _refuse() -> typing.NoReturn:
    raise ValueError


def _described(kind: Any) -> str:
    """What a value must be, in words."""
    if get_origin(kind) in (typing.Union, types.UnionType):
        return " or ".join("none" if part is type(None) else _described(part) for part in get_args(kind))
    if get_origin(kind) is Annotated:
        own, *notes = get_args(kind)
        return ", ".join([_described(own), *(str(note) for note in notes if isinstance(note, Range))])
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    if get_origin(kind) is tuple:
        kinds = get_args(kind)
        number = _described(kinds[0])
        return f"{number}, or several" if kinds[-1] is Ellipsis else f"{number}, or {len(kinds)} of them"
    words = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text"}
    return words.get(kind) or f"a {getattr(kind, '__name__', kind)}"
