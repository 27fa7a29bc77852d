"""Methods and teacher sources by entry point, with distributions that are made up for the test."""

import sys
import types
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from arcface_kd import registry
from arcface_kd.errors import ConfigError
from arcface_kd.methods.adadistill import AdaDistill


class _Distribution(metadata.Distribution):
    """A distribution that is nothing but its name and entry points."""

    def __init__(self, name: str, entry_points: str) -> None:
        self._files = {
            "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n",
            "entry_points.txt": entry_points,
        }

    def read_text(self, filename: str) -> str | None:
        return self._files.get(filename)

    def locate_file(self, path: Any) -> Any:
        raise FileNotFoundError(path)


class _Finder(metadata.DistributionFinder):
    def __init__(self, distributions: list[_Distribution]) -> None:
        self.distributions = distributions

    def find_spec(self, *_: Any) -> None:
        return None

    def find_distributions(self, context: Any = None) -> Iterator[_Distribution]:
        return iter(self.distributions)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> list[_Distribution]:
    """Distributions that count as installed beside the real ones."""
    distributions: list[_Distribution] = []
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, _Finder(distributions)])
    return distributions


def _entry(group: str, name: str, value: str) -> str:
    return f"[{group}]\n{name} = {value}\n"


def test_built_in_methods_and_teachers_come_through_entry_points() -> None:
    assert registry.load(registry.METHODS, "adadistill") is AdaDistill
    assert {"checkpoint", "onnx"} <= set(registry.entry_points(registry.TEACHERS))


def test_a_strangers_method_is_found_and_not_imported_before_it_is_asked_for(
    installed: list[_Distribution], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed.append(_Distribution("face-extras", _entry(registry.METHODS, "extra", "face_extras_of_nobody:Extra")))
    assert "extra" in registry.entry_points(registry.METHODS)
    assert "face_extras_of_nobody" not in sys.modules
    module = types.ModuleType("face_extras_of_nobody")
    module.Extra = object()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "face_extras_of_nobody", module)
    assert registry.load(registry.METHODS, "extra") is module.Extra


def test_two_distributions_that_claim_one_name_are_both_named(installed: list[_Distribution]) -> None:
    installed.append(_Distribution("one-kd", _entry(registry.METHODS, "extra", "one:Extra")))
    installed.append(_Distribution("other-kd", _entry(registry.METHODS, "extra", "other:Extra")))
    with pytest.raises(ConfigError, match=r"claim the name 'extra' in arcface_kd.methods: one-kd and other-kd"):
        registry.entry_points(registry.METHODS)


def test_a_built_in_cannot_be_taken_over_in_silence(installed: list[_Distribution]) -> None:
    installed.append(_Distribution("imposter", _entry(registry.METHODS, "adadistill", "imposter:AdaDistill")))
    with pytest.raises(ConfigError, match=r"arcface_kd and imposter|arcface-kd and imposter"):
        registry.load(registry.METHODS, "adadistill")


def test_one_distribution_seen_twice_is_no_conflict(installed: list[_Distribution]) -> None:
    """As an editable install beside its egg-info is."""
    for _ in range(2):
        installed.append(_Distribution("one-kd", _entry(registry.METHODS, "extra", "one:Extra")))
    assert registry.entry_points(registry.METHODS)["extra"].value == "one:Extra"


def test_names_are_sorted(installed: list[_Distribution]) -> None:
    installed.append(_Distribution("z-kd", f"[{registry.METHODS}]\nzeta = z:Z\naaa = z:A\n"))
    names = list(registry.entry_points(registry.METHODS))
    assert names == sorted(names)


def test_an_unknown_name_lists_the_known_and_offers_the_closest() -> None:
    with pytest.raises(
        ConfigError, match=r"no method named 'adadistil'; there are: .*adadistill.*; did you mean 'adadi"
    ):
        registry.load(registry.METHODS, "adadistil")
    with pytest.raises(ConfigError, match=r"no teacher named 'xyz'; there are: .*checkpoint.*onnx[^;]*$"):
        registry.load(registry.TEACHERS, "xyz")


def test_a_plug_in_that_fails_on_import_breaks_only_its_own_name(
    installed: list[_Distribution], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "fails_on_import.py").write_text("raise RuntimeError('no licence')\n")
    monkeypatch.syspath_prepend(tmp_path)
    installed.append(_Distribution("broken-kd", _entry(registry.METHODS, "extra", "fails_on_import:Extra")))
    found = registry.load_all(registry.METHODS)
    assert set(found) == set(registry.entry_points(registry.METHODS)) - {"extra"}
    (warning,) = caplog.messages
    assert "'extra' of broken-kd" in warning
    assert "no licence" in warning
    with pytest.raises(ConfigError, match="broken-kd"):
        registry.load(registry.METHODS, "extra")


@pytest.mark.parametrize("value", ["no_such_module_of_anybody:Extra", "arcface_kd.errors:NoSuchClass"])
def test_an_entry_point_that_cannot_be_imported_names_its_distribution(
    installed: list[_Distribution], value: str
) -> None:
    installed.append(_Distribution("broken-kd", _entry(registry.METHODS, "extra", value)))
    with pytest.raises(ConfigError, match=r"'extra' of broken-kd cannot be loaded: .*(no_such_module|NoSuchClass)"):
        registry.load(registry.METHODS, "extra")


def test_an_empty_group_says_how_to_install() -> None:
    with pytest.raises(ConfigError, match="pip install PATH/TO/arcface_kd"):
        registry.entry_points("arcface_kd.nothing")
