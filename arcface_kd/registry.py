"""Methods and teacher sources, found through entry points.

Built-ins come through the same groups as third-party plug-ins. Entry points are loaded when their name is asked for,
not before.
"""

import logging
from importlib import metadata

from arcface_kd.errors import ConfigError, first_line, suggestion

logger = logging.getLogger(__name__)

METHODS = "arcface_kd.methods"
TEACHERS = "arcface_kd.teachers"


def _distribution(entry_point: metadata.EntryPoint) -> str:
    return entry_point.dist.name if entry_point.dist is not None else "an unnamed distribution"


def entry_points(group: str) -> dict[str, metadata.EntryPoint]:
    """The installed entry points of a group, by name, sorted.

    Two distributions that claim one name, and a package that is not installed, are a ConfigError.
    """
    found: dict[str, metadata.EntryPoint] = {}
    for entry_point in metadata.entry_points(group=group):
        known = found.get(entry_point.name)
        if known is not None and (known.value, _distribution(known)) != (entry_point.value, _distribution(entry_point)):
            raise ConfigError(
                f"two distributions claim the name {entry_point.name!r} in {group}: {_distribution(known)} and "
                f"{_distribution(entry_point)}; uninstall one of them"
            )
        found[entry_point.name] = entry_point
    if not found:
        raise ConfigError(
            f"no entry point in the group {group}: install the package with `pip install PATH/TO/arcface_kd`"
        )
    return dict(sorted(found.items()))


def load(group: str, name: str) -> object:
    """Load what is registered under a name; a ConfigError lists the names there are."""
    known = entry_points(group)
    if name not in known:
        kind = group.rpartition(".")[2].rstrip("s")
        raise ConfigError(f"no {kind} named {name!r}; there are: {', '.join(known)}{suggestion(name, known)}")
    try:
        return known[name].load()
    # A plug-in is anybody's code and may raise anything when it is imported.
    except Exception as error:
        raise ConfigError(
            f"{group} {name!r} of {_distribution(known[name])} cannot be loaded: {first_line(error)}"
        ) from error


def load_all(group: str) -> dict[str, object]:
    """Load whatever a group holds; a plug-in that cannot be imported is named in a warning and left out."""
    loaded = {}
    for name in entry_points(group):
        try:
            loaded[name] = load(group, name)
        except ConfigError as error:
            logger.warning("%s; the others are not affected", error)
    return loaded
