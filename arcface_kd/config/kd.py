"""The ``kd*`` keys of a config."""

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from arcface_kd.config.options import build, convert
from arcface_kd.errors import ConfigError, OnBadRecord, suggestion

Projection = Literal["none", "linear"]


@dataclasses.dataclass(frozen=True)
class StudentOptions:
    """Options under ``student.``.

    Attributes:
        projection: ``linear`` puts a trainable matrix between the student's embedding and everything that compares it
            with a teacher of another dimension; it stays out of ``model.pt``. ``none`` (default) refuses such a
            teacher.
        init: a file that the trained network starts from: a checkpoint of it, or an ONNX file, which takes the place of
            ``network``; the ``teacher.*`` options say how it wants its images. None starts from scratch.
    """

    projection: Projection = "none"
    init: str | None = None


@dataclasses.dataclass(frozen=True)
class KDConfig:
    """The ``kd*`` keys of a config.

    Attributes:
        methods: names joined by ``+`` in ``kd``, in order; empty when distillation is off.
        teacher: ``kd_teacher``: a file or another source that :func:`arcface_kd.teachers.base.load_teacher` knows.
        cache: ``kd_cache``: a file for the teacher's embeddings, made and filled as the run goes; None asks the teacher
            for every batch.
        classifier: ``kd_classifier``: a file or folder with the teacher's classifier, or ``class-means``, see
            :mod:`arcface_kd.distillation.teacher_classifier`.
        options: ``kd_option``: values by ``prefix`` and name; prefixes are ``teacher``, ``student`` and the methods.
        on_bad_record: ``kd_on_bad_record``: what the loader does with a record that cannot be read, see
            :class:`arcface_kd.data.dataset.FaceDataset`; with or without distillation.

    Raises:
        ConfigError: options that are not sorted by prefix, or with a prefix that nobody looks at.
    """

    methods: tuple[str, ...] = ()
    teacher: str | None = None
    cache: str | None = None
    options: Mapping[str, Mapping[str, object]] = dataclasses.field(default_factory=dict)
    classifier: str | None = None
    on_bad_record: OnBadRecord = "stop"

    def __post_init__(self) -> None:
        if isinstance(self.methods, str):
            raise ConfigError(f"methods is {self.methods!r}; it must be a tuple of names, such as ({self.methods!r},)")
        for prefix, values in self.options.items():
            if not isinstance(values, Mapping):
                raise ConfigError(
                    f"options has {prefix!r}: {values!r}; it must have a mapping for each prefix, such as "
                    '{"teacher": {"channels": "bgr"}}'
                )
            if prefix not in (known := ("teacher", "student", *self.methods)):
                raise ConfigError(
                    f"options has the prefix {prefix!r}; there are {', '.join(known)}{suggestion(prefix, known)}"
                )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "KDConfig":
        """Read the ``kd*`` keys of an arcface_torch config.

        Args:
            config: with ``kd`` ("adadistill", "a+b" or None), ``kd_teacher``, ``kd_cache``, ``kd_classifier``,
                ``kd_option`` (a mapping of dotted names, or strings ``name=value``) and ``kd_on_bad_record`` (``stop``
                or ``skip``).

        Returns:
            The checked keys.

        Raises:
            ConfigError: an unknown ``kd*`` key, an option without prefix or for a method that is not in ``kd``.
        """
        known = ("kd", "kd_teacher", "kd_cache", "kd_classifier", "kd_option", "kd_on_bad_record")
        for key in config:
            if key.startswith("kd") and key not in known:
                raise ConfigError(f"unknown key {key!r}; there are {', '.join(known)}{suggestion(key, known)}")
        methods = tuple(name.strip() for name in str(config.get("kd") or "").split("+") if name.strip())
        if len(set(methods)) < len(methods):
            raise ConfigError(f"kd is {config['kd']!r}; it names a method twice")
        options: dict[str, dict[str, object]] = {}
        for name, value in cls.option_items(config.get("kd_option")):
            prefix, dot, rest = name.partition(".")
            allowed = ("teacher", "student", *methods)
            if not dot or prefix not in allowed:
                raise ConfigError(
                    f"unknown option {name!r}; options start with {', '.join(f'{a}.' for a in allowed)}"
                    f"{suggestion(prefix, allowed)}"
                )
            options.setdefault(prefix, {})[rest] = value
        files = {name: config.get(f"kd_{name}") for name in ("teacher", "cache", "classifier")}
        on_bad_record = convert(config.get("kd_on_bad_record") or "stop", OnBadRecord, "kd_on_bad_record")
        return cls(
            methods,
            options=options,
            on_bad_record=on_bad_record,
            **{name: None if f is None else str(f) for name, f in files.items()},
        )

    @staticmethod
    def option_items(value: object) -> list[tuple[str, object]]:
        """Dotted option names and values out of a mapping, or out of strings ``name=value``.

        Raises:
            ConfigError: a string without ``=``.
        """
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

    @property
    def student(self) -> StudentOptions:
        """The options under ``student.``."""
        return build(StudentOptions, self.options.get("student", {}), "student")


CLASS_MEANS = "class-means"
