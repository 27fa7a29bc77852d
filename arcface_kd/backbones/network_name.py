"""Names of networks with options, ``mbf:width=1,se=true``, and the name that a checkpoint carries of its network."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from arcface_kd.errors import ConfigError, suggestion

TIMM = "timm:"
_NAME = re.compile(r"(?P<name>(?:timm:)?[\w.]+)(?::(?P<options>[^:]+))?", re.ASCII)
_MBF: Mapping[str, type] = {"width": float, "se": bool}
_OPTIONS: Mapping[str, Mapping[str, type]] = {
    "mbf": _MBF,
    "mbf_large": _MBF,
    "ghostfacenet": {"version": int, "width": float, "stride": int},
    TIMM: {"rank": float},
}
_TRUTH = {"true": True, "false": False}
# Among a state dict's own notes on versions, which loading passes over, strict or not.
_ENTRY = "arcface_kd.network"


@dataclass(frozen=True)
class NetworkName:
    """What a name says."""

    name: str  # the network, such as ``mbf`` or ``timm:edgenext_small``
    options: Mapping[str, bool | int | float] = field(default_factory=dict)  # by name, converted


def parse_name(text: str) -> NetworkName:
    """Read ``NAME`` or ``NAME:OPTION=VALUE,...``; that there is such a network is not checked."""
    found = _NAME.fullmatch(text)
    if found is None:
        raise ConfigError(
            f"network {text!r}: wanted NAME or NAME:OPTION=VALUE,OPTION=VALUE, such as mbf:width=1,se=true"
        )
    name = found["name"]
    kinds = _OPTIONS.get(TIMM if name.startswith(TIMM) else name, {})
    options: dict[str, bool | int | float] = {}
    for pair in found["options"].split(",") if found["options"] else ():
        option, equals, value = pair.partition("=")
        if option not in kinds or option in options or not equals:
            raise ConfigError(
                f"network {text!r}: {pair!r} is no option of {name}{suggestion(option, kinds)}; its options: "
                f"{', '.join(kinds) or 'none'}, each once, as OPTION=VALUE"
            )
        options[option] = _convert(text, option, value, kinds[option])
    return NetworkName(name, options)


def _convert(text: str, option: str, value: str, kind: type) -> bool | int | float:
    try:
        converted: bool | int | float = _TRUTH[value.lower()] if kind is bool else kind(value)
        if math.isfinite(converted):
            return converted
    except (KeyError, ValueError):
        pass
    wanted = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
    raise ConfigError(f"network {text!r}: {option} is {value!r}, wanted {wanted}")


def name_checkpoints(network: nn.Module, name: str) -> None:
    """Have a network's ``state_dict`` carry its name; keys and values stay as they are."""
    network.register_state_dict_post_hook(partial(_note, name))


def _note(name: str, _: nn.Module, __: Mapping[str, Any], ___: str, notes: dict[str, Any]) -> None:
    notes[_ENTRY] = name


def carried_names(state: object) -> list[str]:
    """The names that a saved ``state_dict`` carries; a file may hold anything."""
    notes = getattr(state, "_metadata", None)
    entries = notes.values() if isinstance(notes, Mapping) else ()
    names = [entry.get(_ENTRY) for entry in entries if isinstance(entry, Mapping)]
    return [name for name in names if isinstance(name, str)]
