"""What a user may say about a teacher: how its input is prepared, and what it is."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal, get_args

from arcface_kd.errors import ConfigError, suggestion

Channels = Literal["rgb", "bgr"]
Precision = Literal["fp32", "bf16", "fp16"]
Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Preprocessing:
    """How a teacher wants its input: ``(x - mean) / std`` of pixel values 0..255, per channel.

    Attributes:
        channels: order of the input's channels.
        mean: subtracted, in 0..255, in the order of ``channels``.
        std: divided by, in 0..255, in the order of ``channels``.
        size: height and width of the input in pixels.
    """

    channels: Channels = "rgb"
    mean: Triple = (127.5, 127.5, 127.5)
    std: Triple = (127.5, 127.5, 127.5)
    size: int = 112

    def __str__(self) -> str:
        return f"{self.channels}, (x - {in_words(self.mean)}) / {in_words(self.std)}, {self.size}x{self.size}"

    def as_options(self) -> str:
        """The same as ``--kd-option`` takes it."""
        triples = {"mean": self.mean, "std": self.std}
        words = [f"teacher.channels={self.channels}"]
        for key, values in triples.items():
            told = values[:1] if len(set(values)) == 1 else values
            words.append(f"teacher.{key}=" + ",".join(f"{value:g}" for value in told))
        return " ".join(words)


def in_words(values: Triple) -> str:
    """Three numbers, or the one that all of them are.

    Args:
        values: one a channel.
    """
    if len(set(values)) == 1:
        return f"{values[0]:g}"
    return "(" + ", ".join(f"{value:g}" for value in values) + ")"


def _numbers(key: str, value: object) -> Triple:
    """One number or three, as numbers or as the text of a ``--kd-option``."""
    if isinstance(value, str):
        items: list[object] = list(re.split(r"[\s,]+", value.strip("[]() \t")))
    elif isinstance(value, Sequence):
        items = list(value)
    else:
        items = [value]
    try:
        if any(isinstance(item, bool) for item in items):
            raise TypeError
        numbers = [float(item) for item in items]  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f"teacher.{key}={value!r}: wanted a number or three of them, such as 127.5") from None
    if len(numbers) not in (1, 3) or not all(math.isfinite(number) for number in numbers):
        raise ConfigError(f"teacher.{key}={value!r}: wanted one finite number or three, got {len(numbers)}")
    first, second, third = numbers if len(numbers) == 3 else numbers * 3
    return first, second, third


def _deviation(key: str, value: object) -> Triple:
    numbers = _numbers(key, value)
    if min(numbers) <= 0:
        raise ConfigError(f"teacher.{key}={value!r}: a divisor has to be greater than 0")
    return numbers


def _whole(low: int, high: int) -> Callable[[str, object], int]:
    def parse(key: str, value: object) -> int:
        number = None
        if isinstance(value, str) and re.fullmatch(r"\s*\d{1,9}\s*", value):
            number = int(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            number = value
        if number is None or not low <= number <= high:
            raise ConfigError(f"teacher.{key}={value!r}: wanted a whole number from {low} to {high}")
        return number

    return parse


def _one_of(allowed: tuple[str, ...]) -> Callable[[str, object], str]:
    def parse(key: str, value: object) -> str:
        word = value.strip().lower() if isinstance(value, str) else value
        if word not in allowed:
            raise ConfigError(f"teacher.{key}={value!r}: wanted one of {', '.join(allowed)}")
        return str(word)

    return parse


def _word(key: str, value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"teacher.{key}={value!r}: wanted a name")
    return value.strip()


_PARSERS: dict[str, Callable[[str, object], object]] = {
    "channels": _one_of(get_args(Channels)),
    "mean": _numbers,
    "std": _deviation,
    "size": _whole(8, 2048),
    "precision": _one_of(get_args(Precision)),
    "network": _word,
    "embedding_size": _whole(1, 65536),
    "output": _word,
}


@dataclass(frozen=True)
class TeacherOptions:
    """The ``teacher.*`` options; None leaves the choice to the source, or to the field's custom.

    Numbers may come as text, since ``--kd-option teacher.mean=127`` brings them so.

    Attributes:
        channels: channel order of the teacher's input, ``rgb`` or ``bgr``.
        mean: one number or three in 0..255, subtracted from the pixel values, in the order of ``channels``.
        std: one number or three, greater than 0: the divisor after the subtraction.
        size: height and width of the teacher's input, 8..2048; images of another size are resized.
        precision: ``fp32``, or ``bf16`` / ``fp16`` for autocast.
        network: the architecture of a checkpoint (``r50``, ``mbf``, ...), where its tensors do not tell.
        embedding_size: the embedding's dimension; a teacher of another one is refused.
        output: the value of an ONNX graph that is the embedding, where it has several outputs.

    Raises:
        ConfigError: a value outside these ranges.
    """

    channels: str | None = None
    mean: float | str | Sequence[float] | None = None
    std: float | str | Sequence[float] | None = None
    size: int | str | None = None
    precision: str | None = None
    network: str | None = None
    embedding_size: int | str | None = None
    output: str | None = None

    def __post_init__(self) -> None:
        for key, parse in _PARSERS.items():
            value = getattr(self, key)
            if value is not None:
                object.__setattr__(self, key, parse(key, value))

    @classmethod
    def of(cls, options: "TeacherOptions | Mapping[str, object] | None") -> "TeacherOptions":
        """Options from whatever a caller has.

        Args:
            options: options, a mapping of their names without the prefix ``teacher.``, or nothing.

        Returns:
            Validated options.

        Raises:
            ConfigError: an unknown name (the message lists the known ones) or a value out of range.
        """
        if options is None:
            return cls()
        if isinstance(options, TeacherOptions):
            return options
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                raise ConfigError(
                    f"no teacher option named {name!r}; there are: {', '.join('teacher.' + key for key in known)}"
                    f"{suggestion(str(name), known, 'teacher.')}"
                )
        return cls(**dict(options))  # type: ignore[arg-type]

    def preprocessing(self, known: Preprocessing) -> Preprocessing:
        """The source's preprocessing with the user's words in place of it.

        Args:
            known: what the source says of itself.
        """
        chosen = {
            key: getattr(self, key) for key in ("channels", "mean", "std", "size") if getattr(self, key) is not None
        }
        return Preprocessing(**{**vars(known), **chosen})

    def refuse(self, key: str, reason: str) -> None:
        """Stop when an option is given that a source could only ignore.

        Args:
            key: the option's name.
            reason: why it means nothing there.

        Raises:
            ConfigError: the option is set.
        """
        value = getattr(self, key)
        if value is not None:
            raise ConfigError(f"teacher.{key}={value!r} does not apply: {reason}")
