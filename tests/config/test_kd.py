"""Config files with the host's semantics, and the ``kd*`` keys."""

import argparse
import dataclasses
import re
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from easydict import EasyDict

from arcface_kd.config import flags
from arcface_kd.config.arcface_torch import BASE, RUN_KEYS, find_config, load_config, reading_config
from arcface_kd.config.kd import KDConfig, Key
from arcface_kd.errors import ConfigError
from arcface_kd.methods.shkd.stages import _DECIDING

HEAD = "from easydict import EasyDict as edict\nconfig = edict()\n"


def write(folder: Path, name: str, body: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(HEAD + body)
    return path


def one_line(error: pytest.ExceptionInfo[ConfigError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- config files


def test_a_config_stands_over_the_host_s_base(tmp_path: Path) -> None:
    config = load_config(str(write(tmp_path, "small.py", "config.lr = 0.02\nconfig.num_classes = 10\n")))
    assert config.lr == 0.02
    assert config.num_classes == 10
    assert {key: config[key] for key in BASE if key not in ("lr", "output")} == {
        key: value for key, value in BASE.items() if key not in ("lr", "output")
    }
    assert config.output == str(Path("work_dirs") / "small")


def test_a_base_beside_the_config_is_the_base(tmp_path: Path) -> None:
    write(tmp_path / "configs", "base.py", "config.lr = 0.3\nconfig.output = 'from_base'\nconfig.using_wandb = False\n")
    path = write(tmp_path / "configs", "small.py", "config.momentum = 0.5\n")
    config = load_config(str(path))
    assert (config.lr, config.momentum, config.output, config.using_wandb) == (0.3, 0.5, "from_base", False)


def test_an_output_of_none_becomes_the_name_even_over_a_base_with_one(tmp_path: Path) -> None:
    write(tmp_path / "configs", "base.py", "config.output = 'from_base'\n")
    path = write(tmp_path / "configs", "small.py", "config.output = None\n")
    assert load_config(str(path)).output == str(Path("work_dirs") / "small")


@pytest.mark.parametrize("name", ["configs/small", "configs/small.py", "small", "small.py"])
def test_a_config_is_found_by_path_and_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    write(tmp_path / "configs", "small.py", "config.lr = 0.7\n")
    monkeypatch.chdir(tmp_path)
    assert load_config(name).lr == 0.7
    assert find_config(name).resolve() == tmp_path / "configs" / "small.py"


@pytest.mark.parametrize("name", ["nothing", "", ".", "..", "/", "configs/"])
def test_a_config_that_is_not_there_says_where_it_was_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"no config .*looked for") as error:
        load_config(name)
    one_line(error)


def test_a_config_may_build_on_its_neighbour(tmp_path: Path) -> None:
    write(tmp_path / "configs", "big.py", "config.lr = 0.4\nconfig.batch_size = 64\n")
    path = tmp_path / "configs" / "small.py"
    path.write_text("from configs.big import config\nconfig.lr = 0.1 * config.lr\n")
    assert load_config(str(path)).lr == pytest.approx(0.04)
    # Read again, it begins anew.
    assert load_config(str(path)).lr == pytest.approx(0.04)


def test_neighbours_of_one_config_are_not_those_of_the_next(tmp_path: Path) -> None:
    for where, rate in (("one", 0.1), ("other", 0.2)):
        write(tmp_path / where / "configs", "big.py", f"config.lr = {rate}\n")
        (tmp_path / where / "configs" / "small.py").write_text("from configs.big import config\n")
    assert load_config(str(tmp_path / "one" / "configs" / "small.py")).lr == 0.1
    assert load_config(str(tmp_path / "other" / "configs" / "small.py")).lr == 0.2
    assert not [name for name in sys.modules if name.partition(".")[0] == "configs"]
    assert not [entry for entry in sys.path if entry.startswith(str(tmp_path))]


def test_the_last_line_of_a_copied_config_attaches_to_nothing_here(tmp_path: Path) -> None:
    body = "config.kd = 'adadistill'\nimport arcface_kd\nassert arcface_kd.attach(config) is None\n"
    assert load_config(str(write(tmp_path, "copied.py", body))).kd == "adadistill"
    assert not reading_config()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("config.lr = 1 / 0\n", "ZeroDivisionError: division by zero"),
        ("import no_such_module_of_anybody\n", "ModuleNotFoundError"),
        ("config.lr = \n", "SyntaxError"),
        ("del config\n", "does not define `config`"),
        ("config = 3\n", "does not define `config`"),
    ],
)
def test_a_file_that_is_no_config_is_named(tmp_path: Path, body: str, said: str) -> None:
    path = write(tmp_path, "bad.py", body)
    with pytest.raises(ConfigError, match=said) as error:
        load_config(str(path))
    assert str(path) in one_line(error)
    assert not reading_config()


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("lr", "0.25", 0.25),
        ("batch_size", "64", 64),
        ("fp16", "True", True),
        ("fp16", "no", False),
        ("margin_list", "(1.0, 0.0, 0.4)", (1.0, 0.0, 0.4)),
        ("margin_list", "1, 0.5, 0", (1.0, 0.5, 0.0)),
        ("sample_rate", "0.3", 0.3),
        ("interclass_filtering_threshold", "0.4", 0.4),
        ("val_targets", "lfw, cfp_fp", ["lfw", "cfp_fp"]),
        ("num_epoch", "3", 3),
        ("output", "there", "there"),
        ("rec", "synthetic", "synthetic"),
        ("lr", 0.5, 0.5),
    ],
)
def test_overrides_are_read_as_the_type_of_the_key(tmp_path: Path, key: str, text: object, value: object) -> None:
    config = load_config(str(write(tmp_path, "small.py", "")), {key: text})
    assert config[key] == value
    assert type(config[key]) is type(value)


@pytest.mark.parametrize(
    ("key", "text", "said"),
    [
        ("batchsize", "64", r"unknown key 'batchsize'; did you mean 'batch_size'\?"),
        ("batch_size", "many", "batch_size is 'many'; it must be a whole number"),
        ("batch_size", "1.5", "batch_size is '1.5'; it must be a whole number"),
        ("fp16", "maybe", "fp16 is 'maybe'; it must be true or false"),
        ("margin_list", "1,a,0", "margin_list is 'a'; it must be a finite number"),
    ],
)
def test_overrides_that_cannot_be_read_are_refused(tmp_path: Path, key: str, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        load_config(str(write(tmp_path, "small.py", "")), {key: text})
    one_line(error)


@pytest.mark.trainer
def test_base_values_are_those_of_the_host(arcface_torch: Path) -> None:
    host = load_config(str(arcface_torch / "configs" / "base.py"))
    assert {key: host[key] for key in BASE if key != "output"} == {k: v for k, v in BASE.items() if k != "output"}


# ---- kd keys


def test_no_kd_is_off() -> None:
    for config in ({}, {"kd": None}, {"kd": ""}, {"lr": 0.1}):
        assert KDConfig.from_config(config) == KDConfig()


@pytest.mark.parametrize(
    "option",
    [
        {"adadistill.alpha": "plain", "teacher.channels": "bgr", "student.projection": "linear"},
        ["adadistill.alpha=plain", "teacher.channels=bgr", "student.projection=linear"],
        ("adadistill.alpha=plain", "teacher.channels=bgr", "student.projection=linear"),
        "adadistill.alpha=plain teacher.channels=bgr student.projection=linear",
    ],
)
@pytest.mark.parametrize("kind", [dict, EasyDict])
def test_options_may_be_a_mapping_or_words(option: Any, kind: type[dict[str, Any]]) -> None:
    kd = KDConfig.from_config(kind({"kd": "adadistill", "kd_teacher": "r50.pt", "kd_option": option}))
    assert kd.methods == ("adadistill",)
    assert kd.teacher == "r50.pt"
    assert kd.options == {
        "adadistill": {"alpha": "plain"},
        "teacher": {"channels": "bgr"},
        "student": {"projection": "linear"},
    }
    assert kd.student.projection == "linear"


def test_a_value_may_hold_an_equals_sign_and_a_name_a_dot() -> None:
    kd = KDConfig.from_config({"kd": "a", "kd_option": ["teacher.network=x=y", "a.b.c=1"]})
    assert kd.options == {"teacher": {"network": "x=y"}, "a": {"b.c": "1"}}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"methods": "adadistill"}, r"methods is 'adadistill'.*\('adadistill',\)"),
        ({"on_bad_record": "skipp"}, "on_bad_record is 'skipp'"),
        ({"teacher": object()}, "^teacher is <object"),
        ({"methods": ("kd",), "options": {"kd.weight": 2.0}}, r"'kd.weight': 2.0; it must have a mapping"),
        (
            {"methods": ("kd",), "options": {"gkd": {"mass": 0.9}}},
            "unknown option 'gkd.mass'; .*did you mean 'kd'",
        ),
    ],
    ids=["a word", "another word", "no file", "dotted names", "another method's"],
)
def test_fields_that_would_have_no_effect_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        KDConfig(**fields)


def test_methods_combine() -> None:
    assert KDConfig.from_config({"kd": "gkd + embedding"}).methods == ("gkd", "embedding")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"kd_teachr": "x"}, r"unknown key 'kd_teachr'; .*did you mean 'kd_teacher'\?"),
        ({"kdd": "x"}, "unknown key 'kdd'"),
        ({"kd": "a+a"}, "names a method twice"),
        ({"kd": "a", "kd_option": ["alpha=1"]}, r"unknown option 'alpha'; options start with teacher\., student\."),
        ({"kd": "a", "kd_option": {"teachr.size": 1}}, r"unknown option 'teachr.size'.*did you mean 'teacher'"),
        ({"kd": "a", "kd_option": ["b.alpha=1"]}, "unknown option 'b.alpha'"),
        ({"kd": "a", "kd_option": ["a.alpha"]}, r"option 'a.alpha' has no value; write it as a.alpha=VALUE"),
        ({"kd": "a", "kd_option": {"a": {"alpha": 1}}}, "unknown option 'a'"),
    ],
)
def test_kd_keys_that_cannot_be_meant_are_refused(config: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        KDConfig.from_config(config)
    one_line(error)


# ---- one key, one place


@dataclasses.dataclass(frozen=True)
class Extended(KDConfig):
    """With a key more."""

    mirror: Annotated[Literal["ours", "host"], Key("whose data set is read")] = "ours"


@pytest.fixture
def extended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flags, "KDConfig", Extended)


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    flags.add_arguments(parser)
    return parser.parse_args(words)


def test_a_new_field_is_a_key() -> None:
    assert Extended.from_config({"kd_mirror": "Host"}).mirror == "host"
    assert Extended.from_config({}).mirror == "ours"
    with pytest.raises(ConfigError, match="kd_mirror is 'x'; it must be one of ours, host"):
        Extended.from_config({"kd_mirror": "x"})
    with pytest.raises(ConfigError, match=r"did you mean 'kd_mirror'"):
        Extended.from_config({"kd_mirrr": "host"})
    with pytest.raises(ConfigError, match="unknown key 'kd_mirror'"):
        KDConfig.from_config({"kd_mirror": "host"})


@pytest.mark.usefixtures("extended")
def test_a_new_field_is_a_flag_that_is_merged_forwarded_and_refused_without_a_method(
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = parse("--kd-mirror", "host")
    config: dict[str, Any] = {"kd_mirror": "ours", "lr": 0.1}
    flags.merge_arguments(config, given)
    assert config == {"kd_mirror": "host", "lr": 0.1}
    assert flags.flags_of(given) == ["--kd-mirror", "host"]
    with pytest.raises(ConfigError, match="--kd-mirror without a method"):
        flags.refuse_flags_without_method(config, given)
    with pytest.raises(SystemExit):
        parse("--help")
    assert "--kd-mirror {ours,host}" in " ".join(capsys.readouterr().out.split())


def test_a_new_field_is_among_the_words_of_a_child_run() -> None:
    assert Extended.from_config({"kd": "a", "kd_mirror": "host"}).flags() == ["--kd", "a", "--kd-mirror", "host"]


def test_ranks_agree_on_every_key_and_may_have_their_files_elsewhere() -> None:
    options = {"teacher.size": 112, "a.x": "1"}
    kd = Extended.from_config({"kd": "a", "kd_teacher": "here.pt", "kd_option": options, "kd_mirror": "host"})
    shared = kd.shared()
    assert shared == {
        **{"kd": ("a",), "kd_teacher": True, "kd_cache": False, "kd_classifier": False},
        **{"kd_on_bad_record": "stop", "kd_loader": "own", "kd_mirror": "host", "teacher.size": 112, "a.x": "1"},
    }
    assert {key.name for key in Extended.keys().values()} - {"kd_option"} <= set(shared)


def test_every_key_may_be_set_on_the_command_line_and_decides_a_run_where_it_says_so() -> None:
    for field, key in KDConfig.keys().items():
        assert RUN_KEYS[key.name] is (list if key.many else str), field
        assert (key.name in _DECIDING) == key.decides, field


def test_the_documentation_has_every_key() -> None:
    text = (Path(__file__).parents[2] / "docs" / "host.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(--\S+)[^|]*` \| `(\w+)`", text, re.MULTILINE)
    assert rows == [(key.flag, key.name) for key in KDConfig.keys().values()]


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"kd": "a+b", "kd_teacher": "a b.pt", "kd_option": {"teacher.mean": (1, 2.5, 3), "a.x": "y=z", "b.on": True}},
        {"kd": "a", "kd_cache": "c", "kd_classifier": "class-means", "kd_on_bad_record": "skip"},
    ],
)
def test_the_words_of_a_command_line_give_the_same_keys_again(config: dict[str, Any]) -> None:
    kd = KDConfig.from_config(config)
    again: dict[str, Any] = {}
    flags.merge_arguments(again, parse(*kd.flags()))
    read = KDConfig.from_config(again)
    assert read.flags() == kd.flags()
    assert dataclasses.replace(read, options={}) == dataclasses.replace(kd, options={})
