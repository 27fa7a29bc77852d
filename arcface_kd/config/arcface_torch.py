"""Configuration: arcface_torch's config files read as they are, and the ``kd*`` keys with their ranges."""

import contextlib
import contextvars
import runpy
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from easydict import EasyDict

from arcface_kd.config.kd import KDConfig
from arcface_kd.config.options import convert
from arcface_kd.errors import ConfigError, suggestion

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
    """The file of a config given by path, by path without ``.py`` or by its bare name in ``configs/``."""
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
    "rec_identities": str,
    "num_classes": int,
    "num_image": int,
    "num_epoch": int,
    "warmup_epoch": int,
    "val_targets": list,
    "output": str,
    # The compact trainer's alone.
    "lr_decay": str,
    "ema": float,
    **{key.name: list if key.many else str for key in KDConfig.keys().values()},
}


def _override(config: Mapping[str, Any], key: str, value: object) -> object:
    known = list({**BASE, **RUN_KEYS})
    if key not in known:
        raise ConfigError(f"unknown key {key!r}{suggestion(key, known)}; keys are {', '.join(known)}")
    kind = RUN_KEYS.get(key) or type(BASE[key])
    if not isinstance(value, str):
        return value
    if kind in (list, tuple) or (key == "rec" and value.startswith("[")):
        parts = [part.strip() for part in value.strip("()[] ").split(",") if part.strip()]
        return tuple(convert(part, float, key) for part in parts) if kind is tuple else parts
    if key in ("sample_rate", "interclass_filtering_threshold"):
        kind = float
    return convert(value, kind, key)
