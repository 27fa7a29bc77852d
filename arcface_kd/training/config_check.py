"""Check a merged config before the compact trainer runs it."""

from collections.abc import Mapping
from typing import Any, get_args

from arcface_kd.config.arcface_torch import BASE, RUN_KEYS
from arcface_kd.errors import ConfigError, suggestion
from arcface_kd.losses.margin import Margin
from arcface_kd.training.schedule import Decay

LOGIT_SCALE = 64.0  # the host's, which no key of its configs changes
_AT_LEAST_ONE = ("num_image", "num_epoch", "batch_size", "embedding_size", "gradient_acc", "frequent", "verbose")
# What seeds are multiplied by, to make one of each step and rank, must leave them in 64 bits.
_LARGEST_SEED = 2**31 - 1
# Keys that only the host's own surroundings can honour.
_HOST_ONLY = ("dali", "dali_aug", "using_wandb")
_IGNORED_WITHOUT_WANDB = (
    *("wandb_key", "suffix_run_name", "wandb_entity", "wandb_project", "wandb_log_all", "wandb_resume", "notes"),
    "save_artifacts",
)


def check_keys(config: Mapping[str, Any]) -> None:
    """Refuse a config that cannot be honoured to the letter."""
    known = [*BASE, *RUN_KEYS, *_HOST_ONLY, *_IGNORED_WITHOUT_WANDB]
    for key in config:
        if key not in known and not key.startswith("kd"):
            raise ConfigError(f"the compact trainer does not know the key {key!r}{suggestion(key, known)}")
    for key in _HOST_ONLY:
        if config.get(key):
            raise ConfigError(f"{key}={config[key]!r} needs the host: run train_v2.py, or set {key}=False")
    wanted = ("rec", "num_classes", "num_image", "num_epoch", "warmup_epoch", "val_targets")
    missing = [key for key in wanted if config.get(key) is None]
    if missing:
        raise ConfigError(f"the config sets no {', '.join(missing)}; a run needs {', '.join(wanted)}")
    for key in _AT_LEAST_ONE:
        if not (isinstance(config[key], int) and config[key] >= 1):
            raise ConfigError(f"{key} is {config[key]!r}; it must be a whole number, at least 1")
    for key in ("num_classes", "warmup_epoch"):
        if not (isinstance(config[key], int) and config[key] >= 0):
            raise ConfigError(f"{key} is {config[key]!r}; it must be a whole number, at least 0")
    if not (isinstance(config["seed"], int) and 0 <= config["seed"] <= _LARGEST_SEED):
        raise ConfigError(f"seed is {config['seed']!r}; it must be a whole number from 0 to {_LARGEST_SEED}")
    for key in ("lr", "momentum", "weight_decay"):
        if not (isinstance(config[key], int | float) and 0 <= config[key] < float("inf")):
            raise ConfigError(f"{key} is {config[key]!r}; it must be a finite number, at least 0")
    if not isinstance(config["val_targets"], list | tuple):
        raise ConfigError(f"val_targets is {config['val_targets']!r}; it must be a list of names, such as ['lfw']")
    if not str(config["output"] or ""):
        raise ConfigError(f"output is {config['output']!r}; it must name a folder for the run's files")
    if config["optimizer"] not in ("sgd", "adamw"):
        raise ConfigError(f"optimizer is {config['optimizer']!r}; it must be sgd or adamw")
    if config.get("lr_decay", "linear") not in get_args(Decay):
        raise ConfigError(f"lr_decay is {config['lr_decay']!r}; it must be {' or '.join(get_args(Decay))}")
    ema, sample_rate = config.get("ema", 0), config["sample_rate"]
    if not (isinstance(ema, int | float) and 0 <= ema < 1):
        raise ConfigError(f"ema is {ema!r}; it must be in [0, 1), such as 0.999, or 0 for none")
    if not (isinstance(sample_rate, int | float) and 0 < sample_rate <= 1):
        raise ConfigError(f"sample_rate is {config['sample_rate']!r}; it must be in (0, 1]")
    margin_of_config(config)


def margin_of_config(config: Mapping[str, Any]) -> Margin:
    """The margin that ``margin_list`` and ``interclass_filtering_threshold`` ask for."""
    try:
        m1, m2, m3 = config["margin_list"]
    except (TypeError, ValueError) as error:
        raise ConfigError(f"margin_list is {config['margin_list']!r}; it must be m1, m2 and m3: {error}") from error
    try:
        return Margin(LOGIT_SCALE, m1, m2, m3, config["interclass_filtering_threshold"])
    except (TypeError, ValueError) as error:
        raise ConfigError(f"margin_list or interclass_filtering_threshold: {error}") from error
