"""The ``kd*`` keys of a config: each is one field of :class:`KDConfig`, which says all that there is to know of it."""

import dataclasses
import functools
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from arcface_kd.config.augmentation import Augmentation
from arcface_kd.config.options import Options, build, convert, kinds_of
from arcface_kd.errors import ConfigError, OnBadRecord, suggestion

CLASS_MEANS = "class-means"
# What options may start with, beside the names of the run's methods.
PREFIXES = ("teacher", "student", "head")

Projection = Literal["none", "linear"]
TeacherView = Literal["clean", "same"]
Loader = Literal["own", "host"]
How = Literal["concat", "mean", "pca"]
"""How several teachers are made one."""
K = TypeVar("K", bound="KDConfig")


@dataclasses.dataclass(frozen=True)
class StudentOptions(Options):
    """Options under ``student.``.

    Attributes:
        projection: ``linear`` puts a trainable matrix between the student's embedding and everything that compares it
            with a teacher of another dimension; it stays out of ``model.pt``. ``none`` (default) refuses such a
            teacher.
        init: a file that the trained network starts from: a checkpoint of it, or an ONNX file, which takes the place of
            ``network``; the ``teacher.*`` options say how it wants its images. None starts from scratch.
        augment: how its images are degraded: ``flip`` (default) only mirrors them; ``quality``, ``strong``, or several
            ``NAME:PROBABILITY``, see :class:`~arcface_kd.config.augmentation.Augmentation`.
        augment__teacher: what the teacher sees of them: ``clean`` (default), the image as it was; ``same``, what the
            student sees.
    """

    projection: Projection = "none"
    init: str | None = None
    augment: tuple[str, ...] = ("flip",)
    augment__teacher: TeacherView = "clean"

    @functools.cached_property
    def augmentation(self) -> Augmentation:
        """``augment``, read."""
        return Augmentation.read(self.augment)

    @property
    def teacher_sees_others(self) -> bool:
        """Whether the teacher is shown other images than the student."""
        return bool(self.augmentation) and self.augment__teacher == "clean"

    @property
    def views(self) -> dict[str, str]:
        """What student and teacher are shown, in one way of writing."""
        return {"student.augment": str(self.augmentation), "student.augment.teacher": self.augment__teacher}

    def __post_init__(self) -> None:
        super().__post_init__()
        # A bad one is found here.
        _ = self.augmentation


@dataclasses.dataclass(frozen=True)
class HeadOptions(Options):
    """Options under ``head.``.

    Attributes:
        products: number format of the factors of the head's matrix products; results and sums are fp32. None (default)
            takes fp16 in a run with ``fp16`` on a GPU, and fp32 elsewhere.
        margin: ``adaface`` takes AdaFace's margin, by the quality of each image, in place of the trainer's margin list;
            logit scale and interclass filter stay. None (default) takes the list.
    """

    products: Literal["fp32", "fp16", "bf16"] | None = None
    margin: Literal["adaface"] | None = None


def option_items(value: object) -> list[tuple[str, object]]:
    """Dotted option names and values out of a mapping, or out of strings ``name=value``."""
    if value is None:
        return []
    if isinstance(value, Mapping):
        return [(str(name), item) for name, item in value.items()]
    if isinstance(value, str):
        value = value.split()
    items: list[tuple[str, object]] = []
    for part in typing.cast(Sequence[object], value):
        name, equals, text = str(part).partition("=")
        if not equals:
            raise ConfigError(f"option {part!r} has no value; write it as {name}=VALUE")
        items.append((name, text))
    return items


def _read_methods(value: object) -> tuple[str, ...]:
    return tuple(name.strip() for name in str(value or "").split("+") if name.strip())


def _read_options(value: object) -> dict[str, dict[str, object]]:
    options: dict[str, dict[str, object]] = {}
    for name, item in option_items(value):
        prefix, _, rest = name.partition(".")
        options.setdefault(prefix, {})[rest] = item
    return options


def _write_options(options: Mapping[str, Mapping[str, object]]) -> list[str]:
    return [
        f"{prefix}.{name}=" + (",".join(map(str, value)) if isinstance(value, list | tuple) else str(value))
        for prefix, values in options.items()
        for name, value in values.items()
    ]


@dataclasses.dataclass(frozen=True)
class Key:
    """How users write a field of :class:`KDConfig`, and what its value means for a run; stands in its annotation."""

    help: str  # one line for the command line
    name: str = ""  # the config's key; empty makes it ``kd_FIELD``
    flag: str = ""  # of the command line; empty makes it ``--kd-FIELD``
    metavar: str | None = None  # what stands behind the flag in the help; None leaves it to argparse
    # The words that it may be, which follow from a ``Literal``; None for anything.
    choices: tuple[str, ...] | None = None
    many: bool = False  # whether the flag takes several words, and those of the command line join the config's
    repeats: bool = False  # whether the flag may be given several times, which makes a list of it
    file: bool = False  # whether it names a file, which may lie elsewhere on another machine of the same run
    distils: bool = True  # whether it means nothing without a method
    decides: bool = True  # whether another value makes another run, which cannot go on from the first one's checkpoints
    # From the config's or the flag's value to the field's; None reads it by the field's annotation.
    read: Callable[[object], Any] | None = None
    write: Callable[[Any], Sequence[str]] = lambda value: [str(value)]  # the field's value as the words behind the flag


@dataclasses.dataclass(frozen=True)
class KDConfig:
    """The ``kd*`` keys of a config.

    A new key is a new field: flag, config key, merging, the words for a child run, agreement between ranks and the
    table of the documentation follow from its annotation.

    Attributes:
        methods: names joined by ``+`` in ``kd``, in order; empty when distillation is off.
        teacher: ``kd_teacher``: a file or another source that :func:`arcface_kd.teachers.base.load_teacher` knows; or
            several, whose embeddings are put side by side.
        cache: ``kd_cache``: a file for the teacher's embeddings, made and filled as the run goes; None asks the teacher
            for every batch.
        options: ``kd_option``: values by ``prefix`` and name; prefixes are :data:`PREFIXES` and the methods.
        classifier: ``kd_classifier``: a file or folder with the teacher's classifier, or ``class-means``, see
            :mod:`arcface_kd.distillation.teacher_classifier`.
        on_bad_record: ``kd_on_bad_record``: what the loader does with a record that cannot be read, see
            :class:`arcface_kd.data.dataset.FaceDataset`; with or without distillation.
        loader: ``kd_loader``: ``own`` reads the records by this package's loader, which a cache needs; ``host`` by the
            trainer's own ``dataset.py``.

    Raises:
        ConfigError: a value of the wrong type, a method named twice, options that are not sorted by prefix or have one
            that nobody looks at.
    """

    methods: Annotated[
        tuple[str, ...],
        Key(
            "distil with this method; several that combine are joined by +",
            name="kd",
            flag="--kd",
            metavar="METHOD",
            read=_read_methods,
            write=lambda methods: ["+".join(methods)],
        ),
    ] = ()
    teacher: Annotated[
        str | tuple[str, ...] | None,
        Key(
            "the teacher: a checkpoint, an ONNX file, ...; given several times, all of them as one",
            metavar="FILE",
            repeats=True,
            file=True,
        ),
    ] = None
    cache: Annotated[
        str | None,
        Key("keep the teacher's embeddings here: it then runs once", metavar="FILE", file=True, decides=False),
    ] = None
    options: Annotated[
        Mapping[str, Mapping[str, object]],
        Key(
            "options such as teacher.channels=bgr or adadistill.alpha=plain",
            name="kd_option",
            flag="--kd-option",
            metavar="NAME=VALUE",
            many=True,
            read=_read_options,
            write=_write_options,
        ),
    ] = dataclasses.field(default_factory=dict)
    classifier: Annotated[
        str | None,
        Key(
            "the teacher's classifier: a file, the folder of the run that trained it, or class-means",
            metavar="FILE",
            file=True,
        ),
    ] = None
    on_bad_record: Annotated[
        OnBadRecord,
        Key(
            "a record that cannot be read ends the run (stop, default), or the next good one is shown in its place and "
            "the log tells which and how many (skip)",
            flag="--on-bad-record",
            distils=False,
            decides=False,
        ),
    ] = "stop"
    loader: Annotated[
        Loader,
        Key("who reads the images: this package (own, default; a cache needs it) or the trainer's dataset.py (host)"),
    ] = "own"

    def __post_init__(self) -> None:
        if isinstance(self.methods, str):
            raise ConfigError(f"methods is {self.methods!r}; it must be a tuple of names, such as ({self.methods!r},)")
        if len(set(self.methods)) < len(self.methods):
            raise ConfigError(f"kd is {'+'.join(self.methods)!r}; it names a method twice")
        for field, key in self.keys().items():
            if key.read is None:
                object.__setattr__(self, field, convert(getattr(self, field), kinds_of(type(self))[field], field))
        if self.loader == "host" and self.cache is not None:
            raise ConfigError(
                "kd_loader is host, and kd_cache needs to know which records a batch shows: leave one of them out"
            )
        allowed = (*PREFIXES, *self.methods)
        for prefix, values in self.options.items():
            if not isinstance(values, Mapping):
                raise ConfigError(
                    f"options has {prefix!r}: {values!r}; it must have a mapping for each prefix, such as "
                    '{"teacher": {"channels": "bgr"}}'
                )
            if prefix not in allowed or "" in values:
                name = f"{prefix}.{next(iter(values), '')}".rstrip(".")
                raise ConfigError(
                    f"unknown option {name!r}; options start with {', '.join(f'{each}.' for each in allowed)}"
                    f"{suggestion(prefix, allowed)}"
                )

    @classmethod
    def keys(cls) -> dict[str, Key]:
        """The keys by the names of their fields, in order."""
        found = {}
        for field, annotation in kinds_of(cls).items():
            kind, key = get_args(annotation)
            found[field] = dataclasses.replace(
                key,
                name=key.name or f"kd_{field}",
                flag=key.flag or f"--kd-{field.replace('_', '-')}",
                choices=get_args(kind) if get_origin(kind) is Literal else None,
            )
        return found

    @classmethod
    def from_config(cls: type[K], config: Mapping[str, Any]) -> K:
        """Read the ``kd*`` keys of an arcface_torch config.

        Args:
            config: with ``kd`` ("adadistill", "a+b" or None), ``kd_option`` (a mapping of dotted names, or strings
                ``name=value``) and the other keys; one that is None or empty is not set.

        Returns:
            The checked keys.

        Raises:
            ConfigError: an unknown ``kd*`` key, an option without prefix or for a method that is not in ``kd``.
        """
        keys, kinds = cls.keys(), kinds_of(cls)
        known = [key.name for key in keys.values()]
        for name in config:
            if name.startswith("kd") and name not in known:
                raise ConfigError(f"unknown key {name!r}; there are {', '.join(known)}{suggestion(name, known)}")
        values = {}
        for field, key in keys.items():
            if (value := config.get(key.name)) not in (None, ""):
                values[field] = key.read(value) if key.read else convert(value, kinds[field], key.name)
        return cls(**values)

    def flags(self) -> list[str]:
        """The words of a command line that give the same keys; those at their defaults are left out."""
        default = type(self)()
        words: list[str] = []
        for field, key in self.keys().items():
            if (value := getattr(self, field)) != getattr(default, field):
                for part in value if key.repeats and isinstance(value, tuple) else (value,):
                    words += [key.flag, *key.write(part)]
        return words

    def shared(self) -> dict[str, Any]:
        """What must be the same on all ranks, by key or dotted option; of files, whether they are there."""
        found: dict[str, Any] = {}
        for field, key in self.keys().items():
            value = getattr(self, field)
            found[key.name] = value is not None if key.file else value
        options = found.pop("kd_option")
        return found | {f"{prefix}.{name}": value for prefix, own in options.items() for name, value in own.items()}

    @property
    def student(self) -> StudentOptions:
        """The options under ``student.``."""
        return build(StudentOptions, self.options.get("student", {}), "student")

    @property
    def head(self) -> HeadOptions:
        """The options under ``head.``."""
        return build(HeadOptions, self.options.get("head", {}), "head")
