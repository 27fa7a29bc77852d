"""Every method's options: the values at the edge of their ranges, and those just outside."""

from typing import Any

import pytest

from arcface_kd import registry
from arcface_kd.config.options import build
from arcface_kd.errors import ConfigError

INSIDE: list[tuple[str, dict[str, object]]] = [
    ("arcdistill", {"margin": 0}),
    ("arcdistill", {"margin": 1.57}),
    ("bank", {"rows": 1, "temperature": 1e-4, "weight": 0, "mined": 1, "nearest": "1"}),
    ("cosdistill", {"margin": 1.99}),
    ("crosskd", {"tap": "3", "temperature": 1, "logit_weight": 0}),
    ("ekd", {"momentum": 1, "hardest": 1}),
    ("gkd", {"mass": 1, "ramp_epochs": 0, "primary_weight": 0}),
    ("margindistillation", {"smallest": 0.5, "largest": 0.5}),
    ("rkd", {"distance_weight": 0}),
    ("tcs", {"variance": 1, "drop": 0, "drop_begin": 0, "drop_end": 1}),
    ("thkd", {"a": 0, "weight": 0}),
]
OUTSIDE: list[tuple[str, dict[str, object]]] = [
    ("adadistill", {"alpha": "heavy"}),
    ("adadistill", {"repeated": "first"}),
    ("arcdistill", {"margin": 1.6}),
    ("arcdistill", {"margin": -0.1}),
    ("bank", {"rows": 0}),
    ("bank", {"of": "views"}),
    ("bank", {"temperature": 0}),
    ("bank", {"weight": -1}),
    ("bank", {"mined": "inf"}),
    ("bank", {"nearest": 0}),
    ("bank", {"labels": "some"}),
    ("cosdistill", {"margin": 2.0}),
    ("crosskd", {"mimic": "features"}),
    ("crosskd", {"statistics": "some"}),
    ("crosskd", {"adapter": "none"}),
    ("crosskd", {"embedding_weight": "-1"}),
    ("crosskd", {"logit_weight": "inf"}),
    ("crosskd", {"temperature": "0.5"}),
    ("crosskd", {"tap": "4"}),
    ("crosskd", {"tap": "last"}),
    ("ekd", {"positive_weight": -1}),
    ("ekd", {"negative_weight": "nan"}),
    ("ekd", {"hardest": 0}),
    ("ekd", {"temperature": 0}),
    ("ekd", {"momentum": 0}),
    ("ekd", {"momentum": 1.1}),
    ("embedding", {"distance": "l1"}),
    ("embedding", {"labels": "some"}),
    ("embedding", {"weight": -1.0}),
    ("embedding", {"weight": "inf"}),
    ("gkd", {"group": "topk"}),
    ("gkd", {"mass": 0}),
    ("gkd", {"mass": 2}),
    ("gkd", {"step": 0}),
    ("gkd", {"size": 0}),
    ("gkd", {"ranked_by": "both"}),
    ("gkd", {"logits": "soft"}),
    ("gkd", {"temperature": 0}),
    ("gkd", {"primary_weight": -1}),
    ("gkd", {"binary_weight": -1}),
    ("gkd", {"secondary_weight": -1}),
    ("gkd", {"ramp_epochs": -1}),
    ("kd", {"temperature": 0.5}),
    ("kd", {"temperature": "inf"}),
    ("kd", {"weight": -1}),
    ("kd", {"logits": "soft"}),
    ("margindistillation", {"largest": 1.6}),
    ("margindistillation", {"smallest": -0.1}),
    ("margindistillation", {"smallest": "nan"}),
    ("rkd", {"distance_weight": -1}),
    ("rkd", {"angle_weight": "inf"}),
    ("shkd", {"teacher_epochs": 0}),
    ("shkd", {"teacher_lr": 0}),
    ("shkd", {"teacher_batch_size": 1.5}),
    ("tcs", {"variance": 0}),
    ("tcs", {"variance": 1.1}),
    ("tcs", {"dimension": 0}),
    ("tcs", {"basis": "ica"}),
    ("tcs", {"mimic": -1}),
    ("tcs", {"drop": 1}),
    ("tcs", {"rounds": 0}),
    ("tcs", {"drop_begin": 1}),
    ("tcs", {"drop_end": 1.5}),
    ("thkd", {"form": "both"}),
    ("thkd", {"a": 1.5}),
    ("thkd", {"weight": -1}),
    ("thkd", {"kd_weight": -1}),
    ("thkd", {"teacher_head_weight": -1}),
    ("thkd", {"temperature": 0.1}),
    ("thkd", {"logits": "soft"}),
]
# Options that do not fit each other.
TOGETHER: list[tuple[str, dict[str, object], str]] = [
    ("margindistillation", {"largest": 0.1}, "smallest"),
    ("rkd", {"distance_weight": 0, "angle_weight": 0}, "distance_weight"),
    ("shkd", {"distil": "shkd"}, "distil"),
    ("tcs", {"drop_begin": 0.8}, "drop_begin"),
    ("tcs", {"drop_begin": 0.7}, "drop_begin"),
]


def options_of(method: str) -> type[Any]:
    loaded: Any = registry.load(registry.METHODS, method)
    kind: type[Any] = loaded.Config
    return kind


@pytest.mark.parametrize(("method", "values"), INSIDE, ids=str)
def test_the_edge_belongs_to_it(method: str, values: dict[str, object]) -> None:
    made = build(options_of(method), values, method)
    assert {name: float(getattr(made, name)) for name in values} == {n: float(str(v)) for n, v in values.items()}


@pytest.mark.parametrize(("method", "values"), OUTSIDE, ids=str)
def test_a_value_out_of_range_is_named(method: str, values: dict[str, object]) -> None:
    ((name, value),) = values.items()
    with pytest.raises(ConfigError) as error:
        build(options_of(method), values, method)
    assert str(error.value).startswith(f"{method}.{name} is {value!r}; it must be ")


@pytest.mark.parametrize(("method", "values", "name"), TOGETHER, ids=str)
def test_values_that_do_not_fit_each_other_are_named(method: str, values: dict[str, object], name: str) -> None:
    with pytest.raises(ConfigError) as error:
        build(options_of(method), values, method)
    assert str(error.value).startswith(f"{method}: {name} ")
