"""The compact trainer: the host's files, the keys it honours, what it prints."""

import gc
import io
import re
import shutil
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from easydict import EasyDict

from arcface_kd.backbones import get_backbone
from arcface_kd.config.arcface_torch import BASE
from arcface_kd.config.kd import KDConfig
from arcface_kd.distillation.distiller import Distiller
from arcface_kd.errors import ArcfaceKDError, ConfigError, DataError, ResourceError, TeacherError
from arcface_kd.evaluation.report.scalars import read_scalars
from arcface_kd.teachers.base import load_teacher
from arcface_kd.training import trainer
from arcface_kd.training.config_check import check_keys
from arcface_kd.training.run import Run
from arcface_kd.training.trainer import TrainResult, train
from tests.host.trainer.faces import Faces
from tests.system.test_run_lock import held_by_another
from tests.training.runs import NETWORK, config_for, loss_trace, same_weights, saved


def test_leaves_the_hosts_files(faces: Faces, tmp_path: Path) -> None:
    result = train(config_for(faces, tmp_path / "run", save_all_states=True))
    assert isinstance(result, TrainResult)
    assert result.steps == 2 * (80 // 16)
    assert {"training.log", "tensorboard", "model.pt", "checkpoint_gpu_0.pt"} <= {
        path.name for path in (tmp_path / "run").iterdir()
    }
    get_backbone(NETWORK, num_features=32).load_state_dict(saved(tmp_path / "run"), strict=True)
    host_keys = {"epoch", "global_step", "state_dict_backbone", "state_dict_softmax_fc"}
    host_keys |= {"state_optimizer", "state_lr_scheduler"}
    assert host_keys <= set(saved(tmp_path / "run", "checkpoint_gpu_0.pt"))
    log = (tmp_path / "run" / "training.log").read_text()
    assert log.startswith("Training: ")
    assert "[pairs][10]Accuracy-Flip: " in log
    assert 0.0 <= result.verification["pairs"].accuracy <= 1.0


def test_learns(faces: Faces, tmp_path: Path) -> None:
    train(config_for(faces, tmp_path / "run", num_epoch=8, lr=0.05))
    losses = loss_trace(tmp_path / "run")
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_the_run_is_gone_before_its_group(
    faces: Faces, teacher_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[weakref.ref[Run]] = []
    left: list[Run | None] = []

    class Watched(Run):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            runs.append(weakref.ref(self))

    @contextmanager
    def group() -> Iterator[tuple[int, int, int]]:
        yield 0, 0, 1
        gc.collect()
        left.extend(run() for run in runs)

    monkeypatch.setattr(trainer, "Run", Watched)
    monkeypatch.setattr(trainer, "process_group", group)
    train(config_for(faces, tmp_path, kd="adadistill", kd_teacher=str(teacher_file)))
    assert left == [None]


def test_a_second_run_in_the_folder_changes_nothing(faces: Faces, tmp_path: Path) -> None:
    (tmp_path / "training.log").write_text("the first's\n")
    (tmp_path / "checkpoint_gpu_0.pt.next").write_bytes(b"the first's")
    with held_by_another(tmp_path), pytest.raises(ConfigError, match="another run is writing to"):
        train(config_for(faces, tmp_path, val_targets=[]))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "checkpoint_gpu_0.pt.next", "training.log"]
    assert (tmp_path / "training.log").read_text() == "the first's\n"


# TensorBoard's own thread fails as well.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("kd", [None, "adadistill"])
def test_a_folder_that_is_taken_away_ends_the_run_in_one_line(
    kd: str | None, faces: Faces, teacher_file: Path, tmp_path: Path
) -> None:
    def take_away(epoch: int) -> None:
        shutil.rmtree(tmp_path / "run")

    keys = {"val_targets": [], "frequent": 1, "kd": kd, "kd_teacher": str(teacher_file) if kd else None}
    with pytest.raises(ResourceError, match=r"step \d+: cannot write to .*run: No such file or directory") as error:
        train(config_for(faces, tmp_path / "run", **keys), on_epoch=take_away)
    assert "\n" not in str(error.value)


def test_an_output_that_is_a_file_is_named(faces: Faces, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(ResourceError, match=r"the folder output='.*taken' cannot be made: File exists; name another"):
        train(config_for(faces, tmp_path / "taken", num_epoch=1, val_targets=[]))


def test_adadistill_trains_the_student_towards_the_teacher(faces: Faces, teacher_file: Path, tmp_path: Path) -> None:
    teacher = load_teacher(teacher_file)
    distiller = Distiller(KDConfig(methods=("adadistill",)), teacher)
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    result = train(config_for(faces, tmp_path / "run", num_epoch=6, lr=0.02, save_all_states=True), distiller=distiller)
    assert same_weights(before, teacher.state_dict())
    told = f"-teacher: {teacher.description}, 32-d, {teacher.preprocessing}\n"
    assert (tmp_path / "run" / "training.log").read_text().count(told) == 1
    scalars = read_scalars(result.output / "tensorboard")
    cosine = scalars["kd/student_teacher_cosine"].y
    assert cosine[-5:].mean() > cosine[:5].mean() + 0.1
    assert {"kd/ce", "kd/gradient_norm/ce", "kd/alpha_mean", "kd/alpha_q10", "kd/alpha_q90"} <= set(scalars)
    head = saved(result.output, "checkpoint_gpu_0.pt")["state_dict_softmax_fc"]
    centers = head["methods.adadistill.centers.weight"]
    assert centers.shape == (10, 32)
    norms = centers.norm(dim=1)
    # A class that was visited is an average of unit vectors; the start has norms of 0.01 * sqrt(32) = 0.06.
    assert (norms > 0.5).all()
    assert (norms <= 1 + 1e-5).all()


def test_switching_distillation_off_is_an_ordinary_run(faces: Faces, tmp_path: Path) -> None:
    train(config_for(faces, tmp_path / "plain"))
    train(config_for(faces, tmp_path / "off", kd=None, kd_teacher="nowhere.pt"))
    assert loss_trace(tmp_path / "plain") == loss_trace(tmp_path / "off")


# A batch of as many rows as there are classes may hold them all, and then there is nothing to sample.
SMALL: dict[str, Any] = {"batch_size": 4, "num_epoch": 1, "val_targets": []}


@pytest.fixture(scope="module")
def base(faces: Faces, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The student of a run that nothing is changed in."""
    output = tmp_path_factory.mktemp("base")
    train(config_for(faces, output, **SMALL))
    return dict(saved(output))


@pytest.mark.parametrize(
    ("keys", "differs"),
    [
        ({"margin_list": (1.0, 0.0, 0.4)}, True),
        ({"sample_rate": 0.5}, True),
        ({"interclass_filtering_threshold": 0.05}, True),
        ({"gradient_acc": 2}, True),
        ({"optimizer": "adamw", "lr": 0.001}, True),
        ({"momentum": 0.5}, True),
        ({"weight_decay": 0.05}, True),
        ({"lr": 0.01}, True),
        ({"warmup_epoch": 1}, True),
        ({"seed": 3}, True),
        ({"num_workers": 1}, False),
        ({"frequent": 3}, False),
        ({"verbose": 2, "val_targets": ["pairs"]}, False),
        ({"save_all_states": True}, False),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_honours_a_key(faces: Faces, base: dict[str, Any], tmp_path: Path, keys: dict[str, Any], differs: bool) -> None:
    train(config_for(faces, tmp_path / "other", **SMALL | keys))
    assert same_weights(base, saved(tmp_path / "other")) != differs


def test_verifies_every_verbose_steps(faces: Faces, tmp_path: Path) -> None:
    train(config_for(faces, tmp_path / "run", verbose=4))
    steps = read_scalars(tmp_path / "run" / "tensorboard")["pairs"].x.tolist()
    assert steps == [4, 8, 10]


def test_fp16_is_bf16_on_a_cpu(faces: Faces, tmp_path: Path) -> None:
    result = train(config_for(faces, tmp_path / "run", fp16=True))
    assert all(value.dtype != torch.bfloat16 for value in result.student.state_dict().values())
    assert not same_weights(saved(tmp_path / "run"), saved(train(config_for(faces, tmp_path / "base")).output))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"dali": True}, "dali=True needs the host"),
        ({"using_wandb": True}, "using_wandb=True needs the host"),
        ({"batchsize": 3}, "does not know the key 'batchsize'; did you mean 'batch_size'"),
        ({"optimizer": "lion"}, "it must be sgd or adamw"),
        ({"sample_rate": 0}, "sample_rate is 0"),
        ({"sample_rate": "0.5"}, "sample_rate is '0.5'"),
        ({"ema": "0.9"}, "ema is '0.9'"),
        ({"ema": None}, "ema is None"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"num_classes": None}, "the config sets no num_classes"),
        ({"margin_list": (1.0, 0.5)}, "margin_list"),
        ({"interclass_filtering_threshold": 2}, "interclass filtering threshold is 2"),
        ({"verbose": 0}, "verbose is 0; it must be a whole number, at least 1"),
        ({"warmup_epoch": -1}, "warmup_epoch is -1"),
        ({"lr": -0.1}, "lr is -0.1; it must be a finite number"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"momentum": -1}, "momentum is -1"),
        ({"weight_decay": "5e-4"}, "weight_decay is '5e-4'"),
        ({"seed": 2**31}, "seed is 2147483648; it must be a whole number from 0 to"),
        ({"seed": None}, "seed is None"),
        ({"val_targets": "lfw"}, "val_targets is 'lfw'; it must be a list"),
    ],
)
def test_refuses_a_key_by_name(faces: Faces, tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        check_keys(config_for(faces, tmp_path, **keys))


@pytest.mark.parametrize(
    ("keys", "error"),
    [
        ({"num_classes": 3}, DataError),
        ({"rec": "/nowhere"}, DataError),
        ({"kd": "adadistill"}, TeacherError),
        ({"kd": "adadistill", "kd_teacher": "/nowhere.pt"}, TeacherError),
        ({"kd": "nosuch"}, ConfigError),
        ({"kd_teachr": "x"}, ConfigError),
        ({"kd": "adadistill", "kd_option": ["adadistill.alpha=odd"]}, ConfigError),
        ({"network": "r9"}, ConfigError),
        ({"margin_list": (1.0, 9.0, 0.0)}, ConfigError),
        ({"resume": True}, ConfigError),
        ({"batch_size": 500}, (ConfigError, DataError)),
    ],
)
def test_bad_input_leaves_no_file(
    faces: Faces, tmp_path: Path, keys: dict[str, Any], error: type[ArcfaceKDError]
) -> None:
    with pytest.raises(error):
        train(config_for(faces, tmp_path / "run", **keys))
    assert not (tmp_path / "run").exists()


def test_a_teacher_of_another_dimension_wants_a_projection(faces: Faces, teacher_file: Path, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"kd": "adadistill", "kd_teacher": str(teacher_file), "embedding_size": 24}
    with pytest.raises(ConfigError, match="32 dimensions and the student 24"):
        train(config_for(faces, tmp_path / "run", **keys))
    assert not (tmp_path / "run").exists()
    train(config_for(faces, tmp_path / "run", kd_option=["student.projection=linear"], **keys))
    assert not any("projection" in key for key in saved(tmp_path / "run"))


class Terminal(io.StringIO):
    """A stderr that somebody watches."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_one_line_with_the_terms(
    faces: Faces,
    teacher_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    watched = Terminal()
    monkeypatch.setattr(sys, "stderr", watched)
    keys = {"kd": "embedding", "kd_teacher": str(teacher_file), "num_epoch": 1}
    train(config_for(faces, tmp_path / "run", **keys), title="student")
    line = watched.getvalue().rstrip().split("\r")[-1]
    number = r"\d+\.\d{3}"
    wanted = rf"student: 100%.* 5/5 \[\d\d:\d\d<.*, \d+ images/s, loss {number} = ce {number} \+ embedding {number}\]"
    assert re.fullmatch(wanted, line), line
    assert capsys.readouterr().out == "", "log lines would tear the bar"
    curves = read_scalars(tmp_path / "run" / "tensorboard")
    assert {"kd/ce", "kd/embedding", "kd/gradient_share/ce", "kd/gradient_share/embedding"} <= set(curves)
    shown = [float(part) for part in re.findall(number, line)]
    assert shown == pytest.approx([curves[tag].y[-1] for tag in ("loss", "kd/ce", "kd/embedding")], abs=1e-3)


def test_a_pipe_gets_plain_lines(
    faces: Faces, teacher_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    distiller = Distiller(KDConfig(methods=("adadistill",)), load_teacher(teacher_file))
    train(config_for(faces, tmp_path / "run", num_epoch=1), distiller=distiller)
    said = capsys.readouterr()
    assert said.err == ""
    assert "\r" not in said.out
    lines = said.out.splitlines()
    assert all(line.startswith("Training: ") for line in lines)
    terms = [line for line in lines if "-kd: " in line]
    assert len(terms) == 5
    assert re.search(r"alpha_mean 0\.\d{4}   .*center_drift \d\.\d{4}   .*ce \d+\.\d{4}   Global Step: 5$", terms[-1])
    assert re.search(r"Speed .* Loss .* Global Step: 5   Left: 0 s$", [line for line in lines if "Speed" in line][-1])
    log = (tmp_path / "run" / "training.log").read_text()
    assert set(lines) <= set(log.splitlines())
    assert re.search(r"-: kd +adadistill\n", log), "arcface-kd compare takes the method from here"


@pytest.mark.parametrize(("device", "fused"), [("cpu", None), ("cuda", True)])
def test_sgd_asks_a_gpu_for_no_value(device: str, fused: bool | None) -> None:
    parts = {"backbone": torch.nn.Linear(2, 2), "head": torch.nn.Linear(2, 2)}
    run: Any = SimpleNamespace(device=torch.device(device), config=EasyDict(BASE), **parts)
    assert Run._optimizer(run).defaults["fused"] is fused
