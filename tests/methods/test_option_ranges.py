"""Every method's options: the edges of their ranges; and what a method cannot do without or stand beside."""

from typing import Any

import pytest

from arcface_kd import registry
from arcface_kd.config.kd import KDConfig
from arcface_kd.config.options import build
from arcface_kd.distillation.distiller import Distiller
from arcface_kd.errors import ConfigError, TeacherError

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
# As a command line gives them.
OUTSIDE = {
    "adadistill": "alpha=heavy repeated=first",
    "arcdistill": "margin=1.6 margin=-0.1",
    "bank": "rows=0 of=views temperature=0 weight=-1 mined=inf nearest=0 labels=some",
    "cosdistill": "margin=2.0",
    "crosskd": (
        "mimic=features statistics=some adapter=none embedding_weight=-1 logit_weight=inf "
        "temperature=0.5 tap=4 tap=last"
    ),
    "ekd": "positive_weight=-1 negative_weight=nan hardest=0 temperature=0 momentum=0 momentum=1.1",
    "embedding": "distance=l1 labels=some weight=-1.0 weight=inf",
    "gkd": (
        "group=topk mass=0 mass=2 step=0 size=0 ranked_by=both logits=soft temperature=0 primary_weight=-1 "
        "binary_weight=-1 secondary_weight=-1 ramp_epochs=-1"
    ),
    "kd": "temperature=0.5 temperature=inf weight=-1 logits=soft",
    "margindistillation": "largest=1.6 smallest=-0.1 smallest=nan",
    "rkd": "distance_weight=-1 angle_weight=inf",
    "shkd": "teacher_epochs=0 teacher_lr=0 teacher_batch_size=1.5",
    "tcs": "variance=0 variance=1.1 dimension=0 basis=ica mimic=-1 drop=1 rounds=0 drop_begin=1 drop_end=1.5",
    "thkd": "form=both a=1.5 weight=-1 kd_weight=-1 teacher_head_weight=-1 temperature=0.1 logits=soft",
}
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


@pytest.mark.parametrize(
    ("method", "option"), [(method, each) for method, options in OUTSIDE.items() for each in options.split()]
)
def test_a_value_out_of_range_is_named(method: str, option: str) -> None:
    name, _, value = option.partition("=")
    with pytest.raises(ConfigError) as error:
        build(options_of(method), {name: value}, method)
    assert str(error.value).startswith(f"{method}.{name} is {value!r}; it must be ")


@pytest.mark.parametrize(("method", "values", "name"), TOGETHER, ids=str)
def test_values_that_do_not_fit_each_other_are_named(method: str, values: dict[str, object], name: str) -> None:
    with pytest.raises(ConfigError) as error:
        build(options_of(method), values, method)
    assert str(error.value).startswith(f"{method}: {name} ")


CLASSIFIER = {"classifier": "head.pt"}


@pytest.mark.parametrize(
    ("kd", "keys", "named"),
    [
        ("bank", {"teacher": "r50.pt"}, r"embeddings .* `arcface-kd cache CONFIG"),
        ("tcs", {"teacher": "r50.pt"}, r"embeddings .* `arcface-kd cache CONFIG"),
        ("crosskd", {}, r"tail, .* --kd-teacher FILE"),
        ("crosskd", {"options": {"crosskd": {"mimic": "logits"}}}, "classifier: .* --kd-classifier"),
        ("embedding", {}, "a teacher that embeds .* --kd-teacher FILE"),
        *((kd, {}, "classifier: .* --kd-classifier") for kd in ("proxylesskd", "arcdistill", "cosdistill")),
        *((kd, {}, "classifier: .* --kd-classifier") for kd in ("kd", "margindistillation")),
        *((kd, CLASSIFIER, "a teacher that embeds") for kd in ("kd", "margindistillation")),
    ],
)
def test_what_a_method_cannot_do_without_is_named(kd: str, keys: dict[str, Any], named: str) -> None:
    with pytest.raises(TeacherError, match=f"{kd} needs (the teacher's )?{named}"):
        Distiller(KDConfig((kd,), **keys))


@pytest.mark.parametrize(
    ("methods", "options", "named"),
    [
        (("kd", "gkd"), {}, "kd and gkd both bring"),
        (("gkd", "thkd"), {}, "gkd and thkd both bring"),
        (("proxylesskd", "arcdistill"), {}, "proxylesskd and arcdistill both bring"),
        (("adadistill", "embedding"), {"embedding": {"labels": "none"}}, r"adadistill .* embedding\.labels=classify"),
        (("embedding", "tcs"), {}, "tcs does not combine"),
        (("tcs", "adadistill"), {}, "tcs does not combine"),
    ],
)
def test_methods_that_do_not_combine_are_named(methods: tuple[str, ...], options: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=named) as error:
        Distiller(KDConfig(methods, classifier="head.pt", cache="rows", options=options))
    assert "\n" not in str(error.value)
