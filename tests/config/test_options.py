"""Option dataclasses: every kind of annotation, ranges, and what is said of values that do not fit."""

import dataclasses
import math
from typing import Annotated, Any, Literal

import pytest

from arcface_kd import registry
from arcface_kd.config.options import Count, Options, Range, Share, Temperature, Weight, build, convert, kinds_of
from arcface_kd.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Every(Options):
    """Options of every kind."""

    count: Count = 3
    weight: Weight = 1.0
    on: bool = False
    way: Literal["mean", "last"] = "mean"
    limit: Annotated[int, Range(2, 8)] | None = None
    name: str = "x"
    triple: Annotated[tuple[float, float, float], Range(0, ends="(]")] = (1.0, 2.0, 3.0)
    several: tuple[int, ...] = ()
    first: Annotated[float, Range(0, 1, "[)")] = 0.0
    last: Annotated[float, Range(0, 1)] = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.first > self.last:
            raise ValueError(f"first is {self.first}; it must be at most {self.last}, which is last")


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({}, Every()),
        (
            {"count": "5", "weight": "0.5", "on": "true", "way": "Last", "limit": "7", "name": "y"},
            Every(5, 0.5, True, "last", 7, "y"),
        ),
        ({"count": 5, "weight": 2, "on": True, "limit": None}, Every(5, 2.0, True)),
        ({"limit": "none", "count": 4.0}, Every(count=4)),
        ({"triple": "127.5"}, Every(triple=(127.5, 127.5, 127.5))),
        ({"triple": "1, 2,3.5"}, Every(triple=(1.0, 2.0, 3.5))),
        ({"triple": [1, 2, 3]}, Every()),
        ({"triple": "(1 2 3)", "several": "4,5"}, Every(several=(4, 5))),
        ({"several": 4}, Every(several=(4,))),
    ],
)
def test_options_are_built_from_text_and_from_values(values: dict[str, object], wanted: Every) -> None:
    met = build(Every, values, "method")
    assert met == wanted
    assert all(type(getattr(met, f.name)) is type(getattr(wanted, f.name)) for f in dataclasses.fields(Every))


@pytest.mark.parametrize(
    ("values", "name", "wanted"),
    [
        ({"count": "three"}, "count", "a whole number, at least 1"),
        ({"count": 3.7}, "count", "a whole number"),
        ({"count": True}, "count", "a whole number"),
        ({"count": 0}, "count", "at least 1"),
        ({"count": "1e3"}, "count", "a whole number"),
        ({"weight": "heavy"}, "weight", "a finite number, at least 0"),
        ({"weight": None}, "weight", "a finite number"),
        ({"weight": -1}, "weight", "at least 0"),
        ({"weight": "inf"}, "weight", "a finite number"),
        ({"weight": math.nan}, "weight", "a finite number"),
        ({"weight": False}, "weight", "a finite number"),
        ({"on": "perhaps"}, "on", "true or false"),
        ({"on": 2}, "on", "true or false"),
        ({"way": "first"}, "way", "one of mean, last"),
        ({"way": None}, "way", "one of mean, last"),
        ({"limit": "x"}, "limit", "a whole number, in [2, 8] or none"),
        ({"limit": 9}, "limit", "in [2, 8]"),
        ({"name": None}, "name", "text"),
        ({"triple": "1,2"}, "triple", "or 3 of them"),
        ({"triple": "1,2,x"}, "triple", "a finite number"),
        ({"triple": (1, 0, 1)}, "triple", "greater than 0"),
        ({"triple": {1, 2, 3}}, "triple", "a finite number"),
        ({"several": "1,1.5"}, "several", "a whole number, or several"),
        ({"first": 1}, "first", "in [0, 1)"),
    ],
)
def test_values_that_do_not_fit_are_named_with_what_is_wanted(values: dict[str, Any], name: str, wanted: str) -> None:
    with pytest.raises(ConfigError) as error:
        build(Every, values, "method")
    said = str(error.value)
    assert said.startswith(f"method.{name} is {values[name]!r}; it must be ")
    assert wanted in said
    assert "\n" not in said
    with pytest.raises(ConfigError, match=f"^{name} is "):
        Every(**values)


def test_an_unknown_option_is_named_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown option method\.weigth; .*did you mean 'method\.weight'\?"):
        build(Every, {"weigth": 1}, "method")


def test_options_that_depend_on_each_other_are_named_by_their_method() -> None:
    with pytest.raises(ConfigError, match=r"^method: first is 0\.9; "):
        build(Every, {"first": "0.9"}, "method")


def test_a_method_without_options() -> None:
    @dataclasses.dataclass(frozen=True)
    class Nothing:
        pass

    with pytest.raises(ConfigError, match=r"method\.alpha; it has none"):
        build(Nothing, {"alpha": 1}, "method")


def test_a_plain_dataclass_of_somebody_else_is_read_by_its_annotations() -> None:
    @dataclasses.dataclass
    class Theirs:
        count: int = 1
        anything: Any = None

    assert build(Theirs, {"count": "2", "anything": [3]}, "theirs") == Theirs(2, [3])
    with pytest.raises(ConfigError, match=r"theirs\.count"):
        build(Theirs, {"count": "x"}, "theirs")


@pytest.mark.parametrize(
    ("kind", "inside", "outside"),
    [
        (Share, (1e-9, 1), (0, 1.1)),
        (Weight, (0, 1e30), (-1e-9,)),
        (Temperature, (1, 64), (0.99,)),
        (Annotated[float, Range(0, 1, "()")], (0.5,), (0, 1)),
    ],
)
def test_the_ends_of_a_range(kind: Any, inside: tuple[float, ...], outside: tuple[float, ...]) -> None:
    for number in inside:
        assert convert(number, kind, "x") == number
    for number in outside:
        with pytest.raises(ConfigError, match=r"^x is "):
            convert(number, kind, "x")


OWN = [name for name, entry in registry.entry_points(registry.METHODS).items() if entry.value.startswith("arcface_kd.")]


@pytest.mark.parametrize("name", OWN)
def test_every_method_states_its_ranges_beside_its_fields(name: str) -> None:
    method: Any = registry.load(registry.METHODS, name)
    assert issubclass(method.Config, Options)
    for field, kind in kinds_of(method.Config).items():
        noted = "Range(" in str(kind)
        assert noted or not any(word in str(kind) for word in ("int", "float")), f"{name}.{field} has no range"
        assert build(method.Config, {}, name) == method.Config()
