"""The flag, the copied config and the drop-ins, against trainers that are nothing but their names.

tests/host/trainer runs whole trainers.
"""

import argparse
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from easydict import EasyDict
from torch import Tensor, nn
from unidiff import PatchSet

from arcface_kd.backbones import FaceBackbone
from arcface_kd.backbones.network_name import carried_names
from arcface_kd.config.arcface_torch import load_config
from arcface_kd.config.flags import add_arguments, merge_arguments
from arcface_kd.distillation import drop_ins as drop_ins_module
from arcface_kd.distillation.head import DistillationHead
from arcface_kd.errors import ConfigError, TeacherError
from arcface_kd.host.attach import HOST_NAMES, attach
from arcface_kd.host.patching import patches_folder
from arcface_kd.losses.margin import Margin
from arcface_kd.methods.recipe import Stage
from arcface_kd.methods.shkd.method import SHKD
from arcface_kd.teachers.base import Teacher, load_teacher
from arcface_kd.teachers.options import TeacherOptions
from tests.data.record_sets import encoded, insightface_records, write_records
from tests.networks import Tiny


class Network(nn.Module):
    """A student of the host's making."""

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.fc = nn.Linear(3 * 8 * 8, dimension)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.fc(images.flatten(1))
        return out


def host_get_model(name: str, **kwargs: Any) -> nn.Module:
    return Network(kwargs["num_features"])


def host_get_dataloader(*arguments: Any) -> tuple[Any, ...]:
    return ("the host's own loader", *arguments)


class HostHead(nn.Module):
    """The host's PartialFC_V2."""


@pytest.fixture
def trainer() -> types.ModuleType:
    module = types.ModuleType("train_v2")
    module.get_model = host_get_model  # type: ignore[attr-defined]
    module.get_dataloader = host_get_dataloader  # type: ignore[attr-defined]
    module.PartialFC_V2 = HostHead  # type: ignore[attr-defined]
    return module


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Teachers that are asked for by file; each is a network for 8x8 images."""
    asked: list[object] = []

    def load(source: object, options: object = None) -> Teacher:
        asked.append(source)
        return load_teacher(Network(4), TeacherOptions(size=8))

    monkeypatch.setattr("arcface_kd.teachers.cache.fill.load_teacher", load)
    return asked


def config_of(tmp_path: Path, **keys: Any) -> EasyDict:
    return EasyDict(
        {"batch_size": 4, "num_image": 40, "seed": 5, "frequent": 10, "output": str(tmp_path / "run"), **keys}
    )


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("config")
    add_arguments(parser)
    return parser.parse_args(["configs/x", *words])


# ---- arguments


def test_without_flags_a_config_is_left_as_it_is() -> None:
    config = {"kd": "a", "kd_teacher": "t", "lr": 0.1}
    merge_arguments(config, parse())
    assert config == {"kd": "a", "kd_teacher": "t", "lr": 0.1}


def test_flags_win_over_keys_and_options_one_by_one() -> None:
    config: dict[str, Any] = {
        "kd": "a",
        "kd_teacher": "t",
        "kd_option": {"teacher.channels": "rgb", "teacher.mean": 127.5},
    }
    merge_arguments(
        config,
        parse(
            *("--kd", "b", "--kd-teacher", "u", "--kd-option", "teacher.channels=bgr", "b.x=1"),
            *("--kd-option", "b.y=2"),
        ),
    )
    assert config == {
        "kd": "b",
        "kd_teacher": "u",
        "kd_option": {"teacher.channels": "bgr", "teacher.mean": 127.5, "b.x": "1", "b.y": "2"},
    }


def test_an_option_without_a_value_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"option 'teacher\.channels' has no value"):
        merge_arguments({}, parse("--kd-option", "teacher.channels"))


# ---- attach


def test_attach_puts_all_three_drop_ins_in(trainer: types.ModuleType, loaded: list[object], tmp_path: Path) -> None:
    made = attach(config_of(tmp_path, kd="adadistill", kd_teacher="r50.pt"), trainer=trainer)
    assert made is not None
    for name in HOST_NAMES:
        assert getattr(trainer, name) is getattr(made, name)
    assert loaded == ["r50.pt"]
    # The trainer goes on as it always does.
    student = trainer.get_model("r50", dropout=0.0, fp16=False, num_features=4)
    assert isinstance(student, Network)
    margin = types.SimpleNamespace(s=64, m1=1.0, m2=0.5, m3=0.0, interclass_filtering_threshold=0)
    head = trainer.PartialFC_V2(margin, 4, 6, 1.0, False)
    assert isinstance(head, DistillationHead)
    head.train()(student(torch.rand(2, 3, 8, 8)), torch.tensor([[0.0], [5.0]])).backward()
    assert student.fc.weight.grad is not None


def test_a_network_of_the_user_s_own_is_built_in_the_host(
    trainer: types.ModuleType, loaded: list[object], tmp_path: Path
) -> None:
    attach(config_of(tmp_path, kd="adadistill", kd_teacher="r50.pt"), trainer=trainer)
    student = trainer.get_model("python:tests.networks:tiny", dropout=0.0, fp16=True, num_features=4)
    assert isinstance(student, Tiny)
    assert student.fp16


@pytest.mark.parametrize("unknown", [ValueError, KeyError])
def test_names_that_the_host_does_not_have_are_built_in_it_and_told(
    trainer: types.ModuleType,
    loaded: list[object],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    unknown: type[Exception],
) -> None:
    def only_r18(name: str, num_features: int = 512, **kwargs: Any) -> nn.Module:
        if name != "r18":
            raise unknown
        return Network(num_features)

    trainer.get_model = only_r18  # type: ignore[attr-defined]
    attach(config_of(tmp_path, kd="adadistill", kd_teacher="r50.pt"), trainer=trainer)
    with caplog.at_level("INFO"):
        for name in ("thin_r10", "mbf:width=0.25"):
            student = trainer.get_model(name, dropout=0.0, fp16=False, num_features=4)
            assert isinstance(student, FaceBackbone)
            assert carried_names(student.state_dict()) == [name]
    assert "student mbf:width=0.25: 0.30 M" in caplog.text
    assert "M multiply-adds an image" in caplog.text
    assert isinstance(trainer.get_model("r18", num_features=4), Network)
    assert trainer.get_model("r18", 6).fc.out_features == 6
    with pytest.raises(unknown, match=r"^$"):
        trainer.get_model("none", num_features=4)


@pytest.mark.parametrize("config", [{}, {"kd": None}, {"kd": ""}, {"lr": 0.1}])
def test_off_is_off(trainer: types.ModuleType, loaded: list[object], config: dict[str, Any]) -> None:
    before = dict(vars(trainer))
    assert attach(config, parse(), trainer) is None
    assert vars(trainer) == before
    assert loaded == []


@pytest.mark.parametrize("option", ["student.augment=quality", "head.margin=adaface"])
def test_a_student_alone_is_degraded_or_gets_its_margin(
    trainer: types.ModuleType, loaded: list[object], tmp_path: Path, option: str
) -> None:
    """The trainer's own loader and head would look at neither."""
    copied = attach(config_of(tmp_path, kd=None, kd_option=option), trainer=trainer)
    assert copied is not None
    assert trainer.PartialFC_V2 is copied.PartialFC_V2
    made = attach(config_of(tmp_path), parse("--kd", "", "--kd-option", option), trainer)
    assert made is not None
    assert trainer.get_dataloader is made.get_dataloader
    assert attach(config_of(tmp_path), parse("--kd", "", "--kd-option", "student.augment=flip"), trainer) is None
    assert trainer.get_dataloader is host_get_dataloader
    assert loaded == []


def test_an_unknown_kd_key_is_refused_even_when_off(trainer: types.ModuleType) -> None:
    with pytest.raises(ConfigError, match="unknown key 'kd_teachr'"):
        attach({"kd_teachr": "r50.pt"}, trainer=trainer)


@pytest.mark.parametrize("gone", [("get_model",), ("get_dataloader", "PartialFC_V2")])
def test_names_that_the_trainer_lacks_are_named(
    trainer: types.ModuleType, loaded: list[object], tmp_path: Path, gone: tuple[str, ...]
) -> None:
    for name in gone:
        delattr(trainer, name)
    trainer.__file__ = "/somewhere/train_v9.py"
    before = dict(vars(trainer))
    with pytest.raises(ConfigError, match=rf"/somewhere/train_v9\.py has no {', '.join(gone)}: ") as error:
        attach(config_of(tmp_path, kd="adadistill", kd_teacher="r50.pt"), trainer=trainer)
    assert "\n" not in str(error.value)
    assert vars(trainer) == before
    assert loaded == []


def test_the_running_program_is_the_trainer(
    trainer: types.ModuleType, loaded: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "__main__", trainer)
    made = attach(config_of(tmp_path, kd="adadistill", kd_teacher="r50.pt"))
    assert made is not None
    assert trainer.get_model is made.get_model


def test_flags_beat_the_keys_of_a_copied_config_and_the_drop_ins_do_not_pile_up(
    trainer: types.ModuleType, loaded: list[object], tmp_path: Path
) -> None:
    """A copied config on a trainer with the flag: its last line comes first, the flag's own lines after it."""
    config = config_of(tmp_path, kd="adadistill", kd_teacher="from_config.pt")
    first = attach(config, trainer=trainer)
    second = attach(config, parse("--kd-teacher", "from_flag.pt"), trainer)
    assert first is not None
    assert second is not None
    assert loaded == ["from_config.pt", "from_flag.pt"]
    assert trainer.get_model is second.get_model
    student = trainer.get_model("r50", num_features=4)
    assert len(student._forward_pre_hooks) == 1
    assert trainer.get_dataloader("there", 0, 4, True)[0] == "the host's own loader"


def test_a_copied_config_is_attached_once_where_no_flag_is_given(
    trainer: types.ModuleType, loaded: list[object], tmp_path: Path
) -> None:
    config = config_of(tmp_path, kd="adadistill", kd_teacher="from_config.pt")
    first = attach(config, trainer=trainer)
    assert first is not None
    assert attach(config, parse(), trainer) is None
    assert loaded == ["from_config.pt"]
    assert trainer.get_model is first.get_model


def test_keys_of_a_config_that_does_not_attach_itself_count_too(
    trainer: types.ModuleType, loaded: list[object], tmp_path: Path
) -> None:
    assert attach(config_of(tmp_path, kd="adadistill", kd_teacher="r50.pt"), parse(), trainer) is not None
    assert loaded == ["r50.pt"]


def test_the_flag_switches_a_copied_config_off(trainer: types.ModuleType, loaded: list[object], tmp_path: Path) -> None:
    before = {name: getattr(trainer, name) for name in HOST_NAMES}
    config = config_of(tmp_path, kd="adadistill", kd_teacher="r50.pt")
    attach(config, trainer=trainer)
    assert attach(config, parse("--kd", ""), trainer) is None
    assert {name: getattr(trainer, name) for name in HOST_NAMES} == before


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--kd-teacher", "r50.pt"], "--kd-teacher"),
        (["--kd-cache", "c", "--kd-option", "teacher.std=128"], "--kd-cache and --kd-option"),
        (["--on-bad-record", "skip"], "--on-bad-record"),
    ],
)
def test_flags_without_a_method_are_refused(
    trainer: types.ModuleType, loaded: list[object], tmp_path: Path, words: list[str], named: str
) -> None:
    """The trainer would go on for days without a teacher."""
    with pytest.raises(ConfigError, match=f"^{named} without a method .* add --kd METHOD"):
        attach(config_of(tmp_path), parse(*words), trainer)
    assert loaded == []


def test_the_flags_in_the_patch_reach_us_whether_kd_is_among_them_or_not() -> None:
    """A copied config on a patched trainer: ``--kd-teacher`` alone must not be passed over."""
    (patch,) = [file for file in PatchSet((patches_folder() / "kd_flag.patch").read_text(encoding="utf-8"))]
    added = [line.value for line in patch[0] if line.is_added]
    assert added == ["    from arcface_kd import attach\n", "    attach(cfg, args)\n"]


def test_flags_do_not_change_a_copied_config_of_several_runs(
    trainer: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last line has made it the config of one of them, before the flags are read."""
    stage = Stage("shkd", 1, 3, "the temporary student", {"kd": None, "output": str(tmp_path / "stage1_student")})
    asked: list[str] = []

    def next_of(settings: dict[str, Any]) -> Stage:
        asked.append(settings["output"])
        return stage

    monkeypatch.setattr(SHKD, "next_run", next_of)
    config = {"kd": "shkd", "kd_teacher": "r50.pt", "output": None}
    base, own = types.ModuleType("configs.base"), types.ModuleType("configs.ours")
    base.config = {"output": "ms1mv3_arcface_r50"}  # type: ignore[attr-defined]
    own.config = config  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "configs.base", base)
    monkeypatch.setitem(sys.modules, "configs.ours", own)
    assert attach(config, trainer=trainer) is None
    # Neither the config nor the trainer has named a folder yet: the trainer will call it after the config, whatever
    # its base has.
    assert asked == [str(Path("work_dirs") / "ours")]
    assert config["kd"] is None
    assert attach(config, parse(), trainer) is None
    for words in (["--kd", "shkd"], ["--kd-teacher", "r100.pt"]):
        with pytest.raises(ConfigError, match=f"^{words[0]} would change a run .* set the keys in the config"):
            attach(config, parse(*words), trainer)


def test_a_missing_teacher_stops_before_anything_is_replaced(trainer: types.ModuleType, tmp_path: Path) -> None:
    before = {name: getattr(trainer, name) for name in HOST_NAMES}
    with pytest.raises(TeacherError, match="--kd-teacher FILE"):
        attach(config_of(tmp_path, kd="adadistill"), trainer=trainer)
    assert {name: getattr(trainer, name) for name in HOST_NAMES} == before


def test_a_copied_config_sees_what_the_host_completes_later(
    trainer: types.ModuleType, loaded: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host imports configs.base, then the copied file (which attaches), merges it and only then sets the output."""
    base = types.ModuleType("configs.base")
    base.config = EasyDict(seed=1, batch_size=128, frequent=7, output="its_own")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "configs.base", base)
    copied = EasyDict(kd="adadistill", kd_teacher="r50.pt", num_image=40, batch_size=4, output=None)
    attach(copied, trainer=trainer)
    base.config.update(copied)
    base.config.output = str(tmp_path / "work_dirs" / "copied")
    seen: dict[str, Any] = {}
    monkeypatch.setattr(drop_ins_module, "DistillationHead", lambda *a, **k: seen.update(k))
    trainer.PartialFC_V2(Margin(), 4, 6, 1.0, False)
    assert seen["seed"] == 1
    assert seen["steps_per_epoch"] == 10
    assert seen["run_folder"] == tmp_path / "work_dirs" / "copied"
    assert seen["log"].folder == tmp_path / "work_dirs" / "copied" / "tensorboard"
    assert seen["log"].every == 7


def test_the_compact_trainer_reads_a_copied_config_without_attaching(trainer: types.ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "copied.py"
    path.write_text(
        "from easydict import EasyDict\nconfig = EasyDict(kd='adadistill', kd_teacher='no_such_file.pt')\n"
        "import arcface_kd\narcface_kd.attach(config)\n"
    )
    assert load_config(str(path)).kd_teacher == "no_such_file.pt"


# ---- drop-ins


def test_a_config_that_sets_kd_behind_attach_is_refused(trainer: types.ModuleType) -> None:
    with pytest.raises(ConfigError, match=r"config\.kd"):
        attach({"lr": 0.1}, trainer=trainer)


def test_an_imported_trainer_is_found(
    trainer: types.ModuleType, loaded: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "train_v2", trainer)
    assert attach(config_of(tmp_path, kd="adadistill", kd_teacher="r50.pt")) is not None
    assert vars(trainer)["get_model"] is not host_get_model


def test_a_trainer_that_this_torch_would_stop_is_refused(
    trainer: types.ModuleType, loaded: list[object], tmp_path: Path
) -> None:
    class PolynomialLRWarmup(torch.optim.lr_scheduler.LRScheduler):
        def __init__(self, optimizer: Any, last_epoch: int = -1, verbose: bool = False) -> None:
            super().__init__(optimizer, last_epoch=last_epoch, verbose=verbose)  # type: ignore[call-arg]

    class PolyScheduler(torch.optim.lr_scheduler.LRScheduler):
        def __init__(self, optimizer: Any, last_epoch: int = -1) -> None:
            super().__init__(optimizer, -1, False)  # type: ignore[call-arg]

    for schedule in (PolynomialLRWarmup, PolyScheduler):
        setattr(trainer, schedule.__name__, schedule)
        with pytest.raises(ConfigError, match=f"{schedule.__name__}.*current_stack"):
            attach(config_of(tmp_path, kd="adadistill", kd_teacher="r50.pt"), trainer=trainer)
        delattr(trainer, schedule.__name__)


def test_a_schedule_that_takes_verbose_and_does_not_pass_it_on_runs(
    trainer: types.ModuleType, loaded: list[object], tmp_path: Path
) -> None:
    class PolynomialLRWarmup(torch.optim.lr_scheduler.LRScheduler):
        def __init__(self, optimizer: Any, last_epoch: int = -1, verbose=False) -> None:  # type: ignore[no-untyped-def]
            super().__init__(optimizer, last_epoch=last_epoch)  # was: super().__init__(optimizer, -1, False)

    trainer.PolynomialLRWarmup = PolynomialLRWarmup  # type: ignore[attr-defined]
    assert attach(config_of(tmp_path, kd="adadistill", kd_teacher="r50.pt"), trainer=trainer) is not None


@pytest.mark.parametrize("kd", ["adadistill", None])
def test_keys_of_the_compact_trainer_alone_are_told(
    kd: str | None, trainer: types.ModuleType, loaded: list[object], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    attach(config_of(tmp_path, kd=kd, kd_teacher="r50.pt", lr_decay="linear", ema=0), trainer=trainer)
    assert "lr_decay" not in caplog.text
    attach(config_of(tmp_path, kd=kd, kd_teacher="r50.pt", lr_decay="cosine", ema=0.9), trainer=trainer)
    assert "lr_decay=cosine and ema=0.9" in caplog.text


def test_arguments_without_the_flags_are_told(trainer: types.ModuleType, tmp_path: Path) -> None:
    config = config_of(tmp_path, kd="adadistill", kd_teacher="r50.pt")
    with pytest.raises(ConfigError, match="add_arguments"):
        attach(config, argparse.Namespace(config="configs/tiny"), trainer)


def test_several_record_sets_are_joined_and_the_trainer_sees_the_first(
    trainer: types.ModuleType, loaded: list[object], tmp_path: Path
) -> None:
    sets = [str(write_records(tmp_path / name, insightface_records([4, 4]))) for name in ("one", "two")]
    config = config_of(tmp_path, rec=sets, num_classes=4, num_image=16, kd="adadistill", kd_teacher="r50.pt")
    attach(config, trainer=trainer)
    assert config.rec == sets[0]
    loader = trainer.get_dataloader(config.rec, 0, 4, num_workers=0)
    assert loader.faces.labels().tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
    with pytest.raises(ConfigError, match="rec"):
        attach(config, parse("--kd", ""), trainer)


def test_the_trainer_looks_for_verification_sets_in_the_folder_of_a_tree(
    trainer: types.ModuleType, loaded: list[object], tmp_path: Path
) -> None:
    for name in ("a/1.png", "a/b/2.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(encoded(1, ".png"))
    config = config_of(tmp_path, rec=f"{tmp_path}/a/**", num_classes=0, kd="embedding", kd_teacher="r50.pt")
    attach(config, trainer=trainer)
    assert config.rec == f"{tmp_path}/a"
    assert trainer.get_dataloader(config.rec, 0, 2, num_workers=0).faces.labels().tolist() == [-1, -1]
