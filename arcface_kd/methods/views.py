"""Refuse a run whose methods cannot work with the images that ``student.augment`` shows student and teacher."""

from collections.abc import Mapping
from typing import Any

from arcface_kd.config.kd import CLASS_MEANS, KDConfig
from arcface_kd.errors import ConfigError
from arcface_kd.methods.base import Method

_SAME = "student.augment.teacher=same"


def refuse_views(kd: KDConfig, types: Mapping[str, type[Method]], configs: Mapping[str, Any]) -> None:
    """Refuse methods (their types and options by name) that do not fit the ``kd*`` keys, by a ConfigError.

    These are: ``same`` with a cache, with class means or with a method that wants ``clean``; mixtures of faces that the
    teacher does not see, or a method that needs labels, which a mixture has none of.
    """
    options = kd.student
    view, mixing = options.augment__teacher, f"student.augment={','.join(options.augment)} mixes faces"
    for name, kind in types.items():
        if view not in kind.teacher_views:
            raise ConfigError(f"{name} wants its teacher to see clean images: leave {_SAME} and mixtures of faces out")
    if view == "same" and (kd.cache is not None or kd.classifier == CLASS_MEANS):
        what = f"kd_classifier={CLASS_MEANS}" if kd.classifier == CLASS_MEANS else f"kd_cache={kd.cache}"
        raise ConfigError(
            f"{what} is of clean images, and {_SAME} shows the teacher degraded ones: leave one of them out"
        )
    if not options.augmentation.mix:
        return
    needing = [name for name, kind in types.items() if kind.needs_labels(configs[name])]
    if needing or not types:
        raise ConfigError(
            f"{mixing}, a mixture has no label, and {needing[0] if needing else 'a run without a method'} learns "
            "nothing without: take student.augment=quality, or a method that compares embeddings"
        )
    if view != "same":
        clean = [name for name, kind in types.items() if "same" not in kind.teacher_views]
        remedy = f"leave {clean[0]} out" if clean else f"add {_SAME}"
        raise ConfigError(f"{mixing}, and no clean image shows both: {remedy}, or take student.augment=quality")
