"""Configuration: arcface_torch's config files read as they are, and the ``kd*`` keys with their ranges."""

import contextlib
import contextvars
import dataclasses
import runpy
import sys
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

from easydict import EasyDict

from arcface_kd.data.dataset import OnBadRecord
from arcface_kd.errors import ConfigError
from arcface_kd.near_names import suggestion

T = TypeVar("T")

Projection = Literal["none", "linear"]

# What the host's configs/base.py sets; a config file that stands beside a base.py of its own takes that one.
BASE: dict[str, Any] = {
    "margin_list": (1.0, 0.5, 0.0),
    "network": "r50",
    "resume": False,
    "save_all_states": False,
    "output": None,
    "embedding_size": 512,
    "sample_rate": 1,
    "interclass_filtering_threshold": 0,
    "fp16": False,
    "batch_size": 128,
    "optimizer": "sgd",
    "lr": 0.1,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "verbose": 2000,
    "frequent": 10,
    "dali": False,
    "dali_aug": False,
    "gradient_acc": 1,
    "seed": 2048,
    "num_workers": 2,
}

_reading = contextvars.ContextVar("arcface_kd_reading", default=False)


def reading_config() -> bool:
    """Whether a config file is being read by :func:`load_config`, so that its last line has nothing to attach to."""
    return _reading.get()


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
            :mod:`arcface_kd.teacher_classifier`.
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


def _run(path: Path) -> EasyDict:
    """Run a config file (it is Python) and take its ``config``."""
    token = _reading.set(True)
    try:
        with _importable(path):
            names = runpy.run_path(str(path))
    except Exception as error:
        raise ConfigError(f"{path} cannot be read as a config: {type(error).__name__}: {error}") from error
    finally:
        _reading.reset(token)
    config = names.get("config")
    if not isinstance(config, dict):
        raise ConfigError(f"{path} does not define `config`, an EasyDict, as arcface_torch's config files do")
    return EasyDict(config)


@contextlib.contextmanager
def _importable(path: Path) -> Iterator[None]:
    """Let a config import its neighbours as ``configs.NAME``, as it can inside the host.

    What was imported for it is forgotten, since the next config may have other neighbours of the same names and may
    have changed what it got from these.
    """
    root = str(path.resolve().parent.parent)
    before = set(sys.modules)
    sys.path.insert(0, root)
    try:
        yield
    finally:
        sys.path.remove(root)
        for name in set(sys.modules) - before:
            if name.partition(".")[0] == path.resolve().parent.name:
                del sys.modules[name]


def find_config(name: str) -> Path:
    """The file of a config given by path, by path without ``.py`` or by its bare name in ``configs/``.

    Raises:
        ConfigError: there is none; the message lists where it was looked for.
    """
    tried = []
    for candidate in (name, str(Path("configs") / name)):
        for path in (Path(candidate), Path(candidate + ".py")):
            if path.is_file():
                return path
            tried.append(str(path))
    raise ConfigError(f"no config {name!r}; looked for {', '.join(dict.fromkeys(tried))}")


def load_config(name: str, overrides: Mapping[str, object] | None = None) -> EasyDict:
    """Read a config file of arcface_torch with the semantics of its ``get_config``.

    The base comes first (``base.py`` beside the file, else the host's values, which :data:`BASE` holds), then the file,
    then the overrides. A missing ``output`` becomes ``work_dirs/NAME``.

    Args:
        name: path or name of the file. A config is Python and is run: take it from people you trust.
        overrides: values by key, strings are read as the type that the key has.

    Returns:
        The merged config.

    Raises:
        ConfigError: no such file, a file that fails, an override of a key that nobody knows.
    """
    path = find_config(name)
    base = path.with_name("base.py")
    config = EasyDict(BASE)
    if base.is_file() and path.name != "base.py":
        config.update(_run(base))
    config.update(_run(path))
    for key, value in (overrides or {}).items():
        config[key] = _override(config, key, value)
    if config.output is None:
        config.output = str(Path("work_dirs") / path.stem)
    return config


# Keys that a config file sets and the base does not, with their types.
RUN_KEYS: dict[str, Any] = {
    "rec": str,
    "num_classes": int,
    "num_image": int,
    "num_epoch": int,
    "warmup_epoch": int,
    "val_targets": list,
    "output": str,
    "kd": str,
    "kd_teacher": str,
    "kd_cache": str,
    "kd_classifier": str,
    "kd_option": list,
    "kd_on_bad_record": str,
}


def _override(config: Mapping[str, Any], key: str, value: object) -> object:
    known = list({**BASE, **RUN_KEYS})
    if key not in known:
        raise ConfigError(f"unknown key {key!r}{suggestion(key, known)}; keys are {', '.join(known)}")
    kind = RUN_KEYS.get(key) or type(BASE[key])
    if not isinstance(value, str):
        return value
    if kind in (list, tuple):
        parts = [part.strip() for part in value.strip("()[] ").split(",") if part.strip()]
        return tuple(convert(part, float, key) for part in parts) if kind is tuple else parts
    if key in ("sample_rate", "interclass_filtering_threshold"):
        kind = float
    return convert(value, kind, key)
