"""Methods and teacher sources, found through entry points.

Built-ins come through the same groups as a stranger's, so that nothing the package ships is easier to reach than what
others add. Entry points are loaded when their name is asked for, not before.
"""

from importlib import metadata

from arcface_kd.errors import ConfigError, suggestion

METHODS = "arcface_kd.methods"
TEACHERS = "arcface_kd.teachers"


def _distribution(entry_point: metadata.EntryPoint) -> str:
    return entry_point.dist.name if entry_point.dist is not None else "an unnamed distribution"


def entry_points(group: str) -> dict[str, metadata.EntryPoint]:
    """The installed entry points of a group, by name, sorted.

    Args:
        group: ``arcface_kd.methods`` or ``arcface_kd.teachers``.

    Returns:
        One entry point for each name.

    Raises:
        ConfigError: two distributions claim one name, or the package itself is not installed.
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
        raise ConfigError(f"no entry point in the group {group}: install the package with `pip install arcface_kd`")
    return dict(sorted(found.items()))


def load(group: str, name: str) -> object:
    """Load what is registered under a name.

    Args:
        group: the entry-point group.
        name: the registered name.

    Returns:
        The class or object that the entry point names.

    Raises:
        ConfigError: no such name (the message lists those there are), or its module cannot be imported.
    """
    known = entry_points(group)
    if name not in known:
        kind = group.rpartition(".")[2].rstrip("s")
        raise ConfigError(f"no {kind} named {name!r}; there are: {', '.join(known)}{suggestion(name, known)}")
    try:
        return known[name].load()
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{group} {name!r} of {_distribution(known[name])} cannot be loaded: {error}") from error
