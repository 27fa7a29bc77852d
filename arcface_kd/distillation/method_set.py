"""The methods of one run: their classes, options, and what they need together."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from arcface_kd import registry
from arcface_kd.config.options import build
from arcface_kd.errors import ConfigError, TeacherError
from arcface_kd.methods.base import MapsWanted, Method, Requirement, RunContext
from arcface_kd.methods.learned_classifier import LearnedClassifier
from arcface_kd.methods.recipe import Recipe


class MethodSet:
    """The methods that one run trains with, by their registered names, resolved and checked.

    Attributes:
        title: their names, as ``kd`` has them: ``adadistill+embedding``.
        types: their classes by name.
        configs: their options by name.
        needed: what one of them cannot do without.
        replacing: name of the one whose terms take the place of the trainer's learned classifier; None if none does.
        maps_wanted: the feature maps that they look at; None if none does.

    Raises:
        ConfigError: an unknown method, options that it does not have, or methods that cannot be combined.
    """

    def __init__(self, names: tuple[str, ...], options: Mapping[str, Mapping[str, Any]]) -> None:
        self.title = "+".join(names)
        self.types: dict[str, type[Method]] = {name: _load(name) for name in names}
        self.configs = {name: build(kind.Config, options.get(name, {}), name) for name, kind in self.types.items()}
        alone = [name for name, kind in self.types.items() if not kind.combines]
        if alone and len(names) > 1:
            raise ConfigError(f"{alone[0]} does not combine with other methods: kd is {self.title!r}")
        self.replacing = _replacing_classifier(self.types, self.configs)
        needs = {name: kind.requirements(self.configs[name]) for name, kind in self.types.items()}
        self.needed: frozenset[Requirement] = frozenset().union(*needs.values())
        self.maps_wanted = _wanted_maps(self.types, self.configs)
        cached, cut = (
            [name for name, needed in needs.items() if requirement in needed]
            for requirement in (Requirement.CACHED_EMBEDDINGS, Requirement.TEACHER_TAIL)
        )
        if cached and cut:
            raise ConfigError(
                f"{cached[0]} takes the teacher from its cache alone, and {cut[0]} runs a part of it: leave one out"
            )

    def __bool__(self) -> bool:
        return bool(self.types)

    @property
    def from_cache_alone(self) -> bool:
        """Whether the teacher's embeddings come from a full cache and from nowhere else."""
        return Requirement.CACHED_EMBEDDINGS in self.needed

    @property
    def compares_embeddings(self) -> bool:
        """Whether a method compares the student's embeddings with the teacher's, number by number."""
        return any(kind.projects for kind in self.types.values())

    @property
    def compares_maps(self) -> bool:
        """Whether each batch needs the teacher's own feature maps."""
        return self.maps_wanted is not None and self.maps_wanted.teacher_maps

    @property
    def settings(self) -> dict[str, Any]:
        """All options of all methods, as ``method.option``."""
        return {f"{name}.{key}": value for name, config in self.configs.items() for key, value in vars(config).items()}

    def require(self, requirement: Requirement, there: bool, hint: str = "") -> None:
        """Refuse a run that lacks something its methods need; ``hint`` adds what to do."""
        if requirement in self.needed and not there:
            raise TeacherError(f"{self.title} needs {requirement.value}" + (f": {hint}" if hint else ""))

    def refuse_without_labels(self) -> None:
        """Refuse images without labels where a method needs some, or there is no method at all."""
        needing = [name for name, kind in self.types.items() if kind.needs_labels(self.configs[name])]
        if needing or not self.types:
            raise ConfigError(
                f"{' and '.join(needing) or 'a run without --kd'} needs labels, and no image has one: take bank "
                "of images, embedding or rkd, or several of them joined by +"
            )

    def prepare_student(self, student: nn.Module) -> None:
        """Make a student ready for all methods, once, before any trainer has wrapped it."""
        for name, kind in self.types.items():
            kind.prepare_student(self.configs[name], student)

    def build(self, context: RunContext) -> dict[str, Method]:
        """Make the methods, and the learned classifier where there are classes and none takes its place."""
        made: dict[str, Method] = {}
        if context.num_classes and not self.replacing:
            made["classifier"] = LearnedClassifier(context)
        made.update({name: kind(self.configs[name], context) for name, kind in self.types.items()})
        return made


def _load(name: str) -> type[Method]:
    kind = registry.load(registry.METHODS, name)
    if isinstance(kind, type) and issubclass(kind, Recipe):
        raise ConfigError(f"{name} is {kind.runs} runs, and this is one: start them with `arcface-kd recipe`")
    if not (isinstance(kind, type) and issubclass(kind, Method)):
        raise ConfigError(f"the entry point of method {name!r} is {kind!r}; it must be a subclass of Method")
    return kind


def _replacing_classifier(types: Mapping[str, type[Method]], configs: Mapping[str, Any]) -> str | None:
    found = [name for name, kind in types.items() if kind.replaces_classifier(configs[name])]
    classifying = [name for name in found if types[name].classifies]
    if not classifying or len(found) == 1:
        return found[0] if found else None
    if len(classifying) > 1:
        raise ConfigError(
            f"{' and '.join(classifying)} both bring a classification loss of their own; take one of them"
        )
    without = [name for name in found if name not in classifying]
    raise ConfigError(
        f"{classifying[0]} brings a classification loss and {' and '.join(without)} leave the labels out: add "
        + " and ".join(f"--kd-option {name}.labels=classify" for name in without)
        + ", or take one of them"
    )


def _wanted_maps(types: Mapping[str, type[Method]], configs: Mapping[str, Any]) -> MapsWanted | None:
    found = {name: wanted for name, kind in types.items() if (wanted := kind.maps_wanted(configs[name])) is not None}
    if not found:
        return None
    together = next(iter(found.values()))
    for wanted in found.values():
        if replace(wanted, teacher_maps=together.teacher_maps) != together:
            raise ConfigError(f"{' and '.join(found)} look at different feature maps: give them the same options")
    return replace(together, teacher_maps=any(wanted.teacher_maps for wanted in found.values()))
