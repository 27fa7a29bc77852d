"""The ``teacher.*`` options: how a teacher's input is prepared, and what it is."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from arcface_kd.config.options import Options, Range, build
from arcface_kd.errors import ConfigError

Channels = Literal["rgb", "bgr"]
Precision = Literal["fp32", "bf16", "fp16"]
Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Preprocessing:
    """How a teacher wants its input: ``(x - mean) / std`` of pixel values 0..255, per channel."""

    channels: Channels = "rgb"  # order of the input's channels
    mean: Triple = (127.5, 127.5, 127.5)  # subtracted, in 0..255, in the order of ``channels``
    std: Triple = (127.5, 127.5, 127.5)  # divided by, in 0..255, in the order of ``channels``
    size: int = 112  # height and width of the input in pixels

    def __str__(self) -> str:
        return f"{self.channels}, (x - {in_words(self.mean)}) / {in_words(self.std)}, {self.size}x{self.size}"

    def as_options(self) -> str:
        """The same as ``--kd-option`` takes it."""
        mean, std = (in_words(values).strip("()").replace(" ", "") for values in (self.mean, self.std))
        return f"teacher.channels={self.channels} teacher.mean={mean} teacher.std={std}"


def in_words(values: Triple) -> str:
    """Three numbers, or the one that all of them are."""
    if len(set(values)) == 1:
        return f"{values[0]:g}"
    return "(" + ", ".join(f"{value:g}" for value in values) + ")"


@dataclass(frozen=True)
class TeacherOptions(Options):
    """The ``teacher.*`` options, of which numbers may be text; None leaves the choice to the source.

    Attributes:
        channels: channel order of the teacher's input, ``rgb`` or ``bgr``.
        mean: one number or three in 0..255, subtracted from the pixel values, in the order of ``channels``.
        std: one number or three, at least 1, since they count in 0..255 as well: the divisor after the subtraction.
        size: height and width of the teacher's input, 8..2048; images of another size are resized.
        precision: ``fp32``, or ``bf16`` / ``fp16`` for autocast; by default fp16 beside a GPU for teachers from files.
        network: the architecture of a checkpoint (``r50``, ``mbf``, ...), where its tensors do not tell;
            ``python:MODULE:FUNCTION`` for one of the user's own.
        embedding_size: the embedding's dimension; a teacher of another one is refused.
        output: the value of an ONNX graph that is the embedding, where it has several outputs.

    Raises:
        ConfigError: a value outside these ranges.
    """

    channels: Channels | None = None
    mean: Triple | None = None
    std: Annotated[Triple, Range(1)] | None = None
    size: Annotated[int, Range(8, 2048)] | None = None
    precision: Precision | None = None
    network: str | None = None
    embedding_size: Annotated[int, Range(1, 65536)] | None = None
    output: str | None = None

    @staticmethod
    def names_precision(options: Mapping[str, object]) -> bool:
        """Whether options say a precision, be it of one of several teachers (``2.precision``)."""
        return any(name.endswith("precision") for name in options)

    @classmethod
    def of(cls, options: "TeacherOptions | Mapping[str, object] | None") -> "TeacherOptions":
        """Options from options, from a mapping of their names without the prefix ``teacher.``, or from nothing."""
        return options if isinstance(options, TeacherOptions) else build(cls, options or {}, "teacher")

    def preprocessing(self, known: Preprocessing) -> Preprocessing:
        """The source's preprocessing, overridden by the user's options."""
        chosen = {key: getattr(self, key) for key in vars(known) if getattr(self, key) is not None}
        return replace(known, **chosen)

    def refuse(self, key: str, reason: str) -> None:
        """Raise where an option is given that a source could only ignore."""
        value = getattr(self, key)
        if value is not None:
            raise ConfigError(f"teacher.{key}={value!r} does not apply: {reason}")
