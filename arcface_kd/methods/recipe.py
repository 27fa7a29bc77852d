"""Recipes: methods that are several ordinary runs, started one after the other by one command."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from arcface_kd import registry
from arcface_kd.config.kd import KDConfig
from arcface_kd.errors import ConfigError
from arcface_kd.methods.base import Requirement


@dataclass(frozen=True)
class Stage:
    """One run of a recipe."""

    recipe: str  # its name, as in ``kd``
    number: int  # from 1
    runs: int  # how many there are at most
    title: str  # what is trained, from where, in one line
    changes: Mapping[str, Any] = field(repr=False)  # the run's own keys, over those of the config

    def __str__(self) -> str:
        return f"{self.recipe}: run {self.number} of {self.runs}: {self.title}"


class Recipe(ABC):
    """A method of several runs, registered as methods are; each run is one of another method or of none."""

    Config: ClassVar[type[Any]]  # its options, as a method's
    requires: ClassVar[frozenset[Requirement]] = frozenset()  # what it cannot do without, for ``arcface-kd methods``
    runs: ClassVar[int]  # how many there are at most

    @classmethod
    @abstractmethod
    def next_run(cls, config: Mapping[str, Any]) -> Stage | None:
        """The run to start next, or to resume; None when all are done, which is read from their checkpoints.

        ``config`` is a merged arcface_torch config with ``output`` and the keys of a run.
        """


def recipe_of(config: Mapping[str, Any]) -> type[Recipe] | None:
    """The recipe that a config asks for; None where ``kd`` names methods of one run, or none."""
    names = KDConfig.from_config(config).methods
    for name in names:
        kind = registry.load(registry.METHODS, name)
        if isinstance(kind, type) and issubclass(kind, Recipe):
            if len(names) > 1:
                raise ConfigError(
                    f"kd is {config['kd']!r}; {name} is {kind.runs} runs and does not combine with other methods: its "
                    "options say what they distil with"
                )
            return kind
    return None


def all_done(config: Mapping[str, Any]) -> ConfigError:
    """The error of a recipe that has no run left."""
    where = config["output"]
    return ConfigError(f"all runs of {config['kd']} are done, see {where}; give another output to begin anew")
