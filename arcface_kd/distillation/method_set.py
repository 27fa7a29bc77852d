"""The methods of one run and what they need."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from arcface_kd.errors import ConfigError
from arcface_kd.methods.base import MapsWanted, Method


def replacing_classifier(types: Mapping[str, type[Method]], configs: Mapping[str, Any]) -> str | None:
    """The one method whose terms take the place of the trainer's learned classifier, if there is one."""
    found = [name for name, kind in types.items() if kind.replaces_classifier(configs[name])]
    if len(found) <= 1:
        return found[0] if found else None
    if all(types[name].classifies for name in found):
        raise ConfigError(f"{' and '.join(found)} both bring a classification loss of their own; take one of them")
    by_option = [name for name in found if not types[name].classifies]
    raise ConfigError(
        f"{' and '.join(found)} both take the place of the trainer's classification, {' and '.join(by_option)} by the "
        f"options it was given: take one of them, or leave out these options"
    )


def wanted_maps(types: Mapping[str, type[Method]], configs: Mapping[str, Any]) -> MapsWanted | None:
    """The feature maps that all methods of a run look at together, None where none does."""
    found = {name: wanted for name, kind in types.items() if (wanted := kind.maps_wanted(configs[name])) is not None}
    if not found:
        return None
    together = next(iter(found.values()))
    for wanted in found.values():
        if replace(wanted, teacher_maps=together.teacher_maps) != together:
            raise ConfigError(f"{' and '.join(found)} look at different feature maps: give them the same options")
    return replace(together, teacher_maps=any(wanted.teacher_maps for wanted in found.values()))
