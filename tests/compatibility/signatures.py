"""How the public names can be called: the parameters of every function, class and public method."""

import inspect
from typing import Any

from torch import nn

import arcface_kd

Signature = list[tuple[str, int, bool]]


def public_signatures() -> dict[str, Signature | None]:
    """Each parameter's name, kind (as :mod:`inspect` numbers them) and whether it has a default, by dotted name.

    Attributes that cannot be called have None.
    """
    found: dict[str, Signature | None] = {}
    for name in arcface_kd.__all__:
        value = getattr(arcface_kd, name)
        found[name] = signature_of(value)
        if inspect.isclass(value):
            own = [each for each in dir(value) if not each.startswith("_") and not hasattr(nn.Module, each)]
            fields = getattr(value, "__dataclass_fields__", ())
            found |= {f"{name}.{each}": signature_of(getattr(value, each, None)) for each in {*own, *fields}}
    return found


def signature_of(value: Any) -> Signature | None:
    """The parameters of something that can be called, None of anything else."""
    try:
        parameters = inspect.signature(value).parameters.values()
    except (TypeError, ValueError):
        return None
    return [(each.name, int(each.kind), each.default is not each.empty) for each in parameters]


def fits(old: Signature | None, new: Signature | None) -> bool:
    """Whether every call of the old signature is one of the new."""
    if old is None or new is None:
        return old is None
    by_name = {name: (kind, default) for name, kind, default in new}
    by_keyword = int(inspect.Parameter.KEYWORD_ONLY)
    places = [name for name, kind, _ in new if kind < by_keyword]
    for place, (name, kind, default) in enumerate(old):
        if name not in by_name or by_name[name][1] < default:
            return False
        if kind < by_keyword and (place >= len(places) or places[place] != name):
            return False
    known = {name for name, _, _ in old}
    variable = (int(inspect.Parameter.VAR_POSITIONAL), int(inspect.Parameter.VAR_KEYWORD))
    return all(name in known or default or kind in variable for name, kind, default in new)
