"""Networks of the user's own, ``python:MODULE:FUNCTION``: rebuilt from checkpoints, started from, judged, exported."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from arcface_kd.cli.main import main
from arcface_kd.errors import ConfigError, TeacherError
from arcface_kd.evaluation.report.comparison import run_contestant
from arcface_kd.evaluation.report.cost import multiply_adds
from arcface_kd.evaluation.report.run_folder import read_run
from arcface_kd.evaluation.scoring import load_models
from arcface_kd.export.onnx import export
from arcface_kd.teachers import load_teacher
from arcface_kd.teachers.checkpoint import load_network
from arcface_kd.teachers.student_init import start_from
from arcface_kd.teachers.trunk_and_tail import cut_teacher
from tests.networks import Tiny, tiny

OWN, DIMENSION = "python:tests.networks:tiny", 24
# Nobody has imported it: what only a log names must not be.
STRANGER = "tests_own_network_stranger"


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return tiny(DIMENSION).eval()


@pytest.fixture
def images() -> Tensor:
    return torch.rand(3, 3, 112, 112, generator=torch.Generator().manual_seed(1)) * 2 - 1


def run_of(folder: Path, network: nn.Module, named: str = OWN) -> Path:
    """What a run of the network leaves."""
    folder.mkdir()
    torch.save(network.state_dict(), folder / "model.pt")
    (folder / "training.log").write_text(f"Training: 2026-01-02 03:04:05,678-: {'network'.ljust(25)}{named}\n")
    return folder


@pytest.fixture
def run(tmp_path: Path, network: nn.Module) -> Path:
    return run_of(tmp_path / "run", network)


@pytest.fixture
def stranger(tmp_path: Path, network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose log names a module that lies on the path and leaves a mark when it is imported."""
    (tmp_path / f"{STRANGER}.py").write_text("from tests.networks import tiny\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, STRANGER, raising=False)
    return run_of(tmp_path / "stranger", network, f"python:{STRANGER}:tiny")


def test_a_checkpoint_is_rebuilt(run: Path, network: nn.Module, images: Tensor) -> None:
    found = load_network(run / "model.pt", OWN)
    assert (found.name, found.num_features) == (OWN, DIMENSION)
    assert torch.equal(found.network(images), network(images))
    assert load_network(run, OWN, fp16=True).network.fp16 is True


def test_random_numbers_do_not_hang_on_its_outline_being_known(run: Path) -> None:
    def after() -> Tensor:
        torch.manual_seed(7)
        load_network(run, OWN)
        return torch.rand(3)

    assert torch.equal(after(), after())


def fixed(num_features: int, fp16: bool) -> nn.Module:
    """Neither ``fp16`` nor the size that is asked for; a number is read while it is built."""
    torch.linspace(0, 1, 3)[1].item()
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=8), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 11))


def wide(num_features: int, fp16: bool) -> nn.Module:
    """A first layer that follows the embedding size without being as large, and a size that must be even."""
    if num_features % 2:
        raise ValueError("an even number, please")
    width = num_features // 2 + 3
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(nn.Conv2d(3, width, 3, stride=16), pool, nn.Linear(width, num_features))


@pytest.mark.parametrize(("name", "size"), [("fixed", 11), ("wide", 20)])
def test_its_dimension_is_that_of_its_embeddings(name: str, size: int, tmp_path: Path, images: Tensor) -> None:
    network = {"fixed": fixed, "wide": wide}[name](size, False).eval()
    torch.save({"model": {f"module.{key}": value for key, value in network.state_dict().items()}}, tmp_path / "own.pth")
    found = load_network(tmp_path / "own.pth", f"python:{__name__}:{name}")
    assert found.num_features == size
    assert torch.equal(found.network(images), network(images))


def test_a_state_that_does_not_fit_is_named(run: Path, tmp_path: Path) -> None:
    state = torch.load(run / "model.pt", weights_only=True)
    del state["features.1.weight"]
    torch.save(state, tmp_path / "less.pt")
    with pytest.raises(TeacherError, match=rf"less\.pt does not fit network '{OWN}'.*features\.1\.weight"):
        load_network(tmp_path / "less.pt", OWN)


@pytest.mark.parametrize("function", ["none", "math", "number"])
def test_what_builds_no_network_is_named(function: str, run: Path) -> None:
    with pytest.raises(ConfigError, match=f"{__name__}:{function}"):
        load_network(run, f"python:{__name__}:{function}")


def math(num_features: int) -> nn.Module:
    """Takes no ``fp16``."""
    return tiny(num_features)


def number(num_features: int, fp16: bool) -> object:
    """Builds no module."""
    return 3


def test_it_is_a_teacher_and_can_be_cut(run: Path, network: nn.Module, images: Tensor) -> None:
    teacher = load_teacher(run, {"network": OWN})
    assert torch.allclose(teacher(images), network(images), atol=1e-5)
    assert cut_teacher(teacher, "features.4").map_shape == (16, 4, 4)


def test_a_run_starts_from_it_by_its_config_s_name(run: Path, network: nn.Module) -> None:
    student, _ = start_from(run, None, lambda: tiny(DIMENSION), DIMENSION, name=OWN)
    assert isinstance(student, Tiny)
    assert student.training
    assert student.fc.weight.requires_grad
    assert torch.equal(student.fc.weight, network.get_parameter("fc.weight"))


def test_a_log_s_word_alone_imports_nothing(stranger: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = rf"teacher\.network=python:{STRANGER}:tiny"
    for source in (stranger, stranger / "model.pt"):
        with pytest.raises(TeacherError, match=wanted):
            load_teacher(source)
    with pytest.raises(TeacherError, match=wanted):
        load_models([str(stranger)])
    with pytest.raises(TeacherError, match=wanted):
        export(stranger, tmp_path / "student.onnx")
    with pytest.raises(ConfigError, match=f"--network python:{STRANGER}:tiny"):
        run_contestant(read_run(stranger))
    assert main(["check", "--kd-teacher", str(stranger)]) == 2
    assert f"teacher.network=python:{STRANGER}:tiny" in capsys.readouterr().err
    assert STRANGER not in sys.modules
    assert load_teacher(stranger, {"network": f"python:{STRANGER}:tiny"}).embedding_size == DIMENSION
    assert STRANGER in sys.modules


def test_runs_are_judged_by_their_own_names(run: Path, tmp_path: Path, network: nn.Module, images: Tensor) -> None:
    contestant = run_contestant(read_run(run), own_networks=[OWN])
    assert contestant.network == OWN
    loaded = contestant.load()
    assert torch.allclose(loaded(images), network(images), atol=1e-5)
    assert multiply_adds(loaded) == 3 * 8 * 9 * 49 + 8 * 16 * 9 * 16 + 256 * DIMENSION

    judged = load_models([str(run)], {"network": OWN})[str(run)]
    assert torch.allclose(judged(images), network(images), atol=1e-5)
    other = run_of(tmp_path / "other", network, "r50")
    with pytest.raises(ConfigError, match="leave the options out"):
        load_models([str(other)], {"network": OWN})


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_it_is_exported(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "student.onnx"
    assert main(["export", str(run), str(out), "--kd-option", "teacher.std=128"]) == 2
    assert "teacher.network" in capsys.readouterr().err
    assert main(["export", str(run), str(out), "--kd-option", f"teacher.network={OWN}"]) == 0
    assert f"{OWN}, {DIMENSION} dimensions" in capsys.readouterr().out
    assert load_teacher(out).embedding_size == DIMENSION
