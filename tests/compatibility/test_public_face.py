"""Whatever commit a44a264 could be asked for by name can still be asked for."""

import dataclasses
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import arcface_kd
from arcface_kd import Distiller, KDConfig, load_config, load_teacher
from tests.compatibility.runs import DIMENSION, NETWORK, command
from tests.compatibility.signatures import fits, public_signatures, signature_of

TEACHER_OPTIONS = {
    **{"channels": "bgr", "mean": "127.5", "std": "128,128,128", "size": "112", "precision": "fp32"},
    **{"network": NETWORK, "embedding_size": str(DIMENSION)},
}


# Nobody but the package's own parser had a use for it.
INTERNAL = {"KDConfig.option_items"}


def test_names_are_exported(recorded: dict[str, Any]) -> None:
    names = recorded["public"]["names"]
    assert set(names) <= set(arcface_kd.__all__)
    assert all(getattr(arcface_kd, name) is not None for name in names)


def test_calls_are_understood(recorded: dict[str, Any]) -> None:
    now = public_signatures()
    then = {
        name: None if signature is None else [tuple(parameter) for parameter in signature]
        for name, signature in recorded["public"]["signatures"].items()
    }
    assert len(then) > 150
    lost = {name for name, signature in then.items() if name not in now or not fits(signature, now[name])}
    assert lost <= INTERNAL


def test_a_signature_that_fits_takes_every_old_call() -> None:
    def old(a: int, b: int = 1, *, c: int) -> None: ...
    def more(a: int, b: int = 1, x: int = 2, *, c: int, d: int = 3) -> None: ...
    def moved(a: int, x: int = 2, b: int = 1, *, c: int) -> None: ...
    def asks(a: int, b: int = 1, *, c: int, d: int) -> None: ...
    def lacks(a: int, b: int = 1) -> None: ...

    was = signature_of(old)
    assert [fits(was, signature_of(new)) for new in (old, more, moved, asks, lacks)] == [
        True,
        True,
        False,
        False,
        False,
    ]


def test_entry_points_load(recorded: dict[str, Any]) -> None:
    for group, names in recorded["public"]["entry_points"].items():
        found = {entry.name: entry for entry in metadata.entry_points(group=group)}
        assert set(names) <= set(found)
        assert all(callable(found[name].load()) for name in names)


def test_commands_take_their_flags(recorded: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    commands = recorded["public"]["commands"]
    assert len(commands) == 13
    for words in commands:
        with pytest.raises(SystemExit) as ended:
            command(*words, "--no-such-flag")
        assert ended.value.code == 2
        assert capsys.readouterr().err.strip().endswith("unrecognized arguments: --no-such-flag"), words


def test_keys_can_be_set(work: Path, recorded: dict[str, Any]) -> None:
    keys = recorded["public"]["keys"]
    assert {key for key in keys if key.startswith("kd")} == {
        *("kd", "kd_teacher", "kd_cache", "kd_classifier", "kd_option", "kd_on_bad_record")
    }
    config = load_config("gkd-1.py", dict.fromkeys(keys, "1"))
    assert [key for key in keys if config[key] not in (1, True, "1", ["1"], (1,))] == []


def test_configs_are_read(work: Path, recorded: dict[str, Any]) -> None:
    configs = recorded["public"]["configs"]
    assert len(configs) == 38
    for name, wanted in configs.items():
        config = load_config(f"configs/{name}.py")
        assert {key: list(config[key]) if isinstance(config[key], tuple) else config[key] for key in wanted} == wanted
        KDConfig.from_config(config)


def test_options_keep_their_names_and_defaults(work: Path, recorded: dict[str, Any]) -> None:
    options = dict(recorded["public"]["options"])
    assert options.pop("teacher").keys() == TEACHER_OPTIONS.keys()
    assert load_teacher("teacher/model.pt", TEACHER_OPTIONS).preprocessing.channels == "bgr"
    student = options.pop("student")
    assert {key: getattr(KDConfig(methods=("kd",)).student, key) for key in student} == student
    methods = {entry.name: entry.load() for entry in metadata.entry_points(group="arcface_kd.methods")}
    for name, wanted in options.items():
        fields = {field.name: field.default for field in dataclasses.fields(methods[name].Config)}
        assert {key: fields[key] for key in wanted} == wanted
        if name != "shkd":
            given = [f"{name}.{key}={value}" for key, value in wanted.items()]
            keys = {"kd": name, "kd_option": given, "kd_classifier": "teacher", "kd_cache": "rows"}
            Distiller(KDConfig.from_config(keys), nn.Flatten())
