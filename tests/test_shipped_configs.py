"""The files in ``configs/``: each is read, is called what it trains, and asks for methods and options there are."""

from pathlib import Path

import pytest

from arcface_kd import registry
from arcface_kd.config import BASE, KDConfig, build, load_config
from arcface_kd.methods.base import Method, Requirement
from arcface_kd.trainer import check_keys

FILES = sorted((Path(__file__).resolve().parent.parent / "configs").glob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_config_trains_what_its_name_says(file: Path) -> None:
    config = load_config(str(file))
    check_keys(config)
    assert file.stem.split("_", 2)[1:] == [config.network, config.kd.replace("+", "_")]
    kd = KDConfig.from_config(config)
    assert kd.teacher is not None
    for name in kd.methods:
        kind = registry.load(registry.METHODS, name)
        assert isinstance(kind, type)
        assert issubclass(kind, Method)
        build(kind.Config, kd.options.get(name, {}), name)
        assert (Requirement.TEACHER_CLASSIFIER in kind.requires) <= (kd.classifier is not None)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_config_sets_only_keys_that_differ_from_the_host_s(file: Path) -> None:
    lines = file.read_text(encoding="utf-8").splitlines()
    config = load_config(str(file))
    set_here = [line.partition("=")[0].strip().removeprefix("config.") for line in lines if line.startswith("config.")]
    assert [key for key in set_here if key in BASE and BASE[key] == config[key]] == []
    assert lines[-1] == "arcface_kd.attach(config)"
