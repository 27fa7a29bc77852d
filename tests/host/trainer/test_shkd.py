"""SH-KD's three runs in a trainer that is not ours: copied config or flag, one command for all of them, ranks."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from arcface_kd.backbones import get_backbone
from arcface_kd.cli.main import main
from arcface_kd.teachers.base import load_teacher
from tests.host.trainer.faces import Faces, draw_faces
from tests.host.trainer.host import checkout, settings
from tests.host.trainer.launch import head_state, launch, train, write_config
from tests.networks import tiny
from tests.teachers.onnx_models import EMBEDDING_SIZE, face_network

STAND_IN = Path(__file__).parent / "stand_in"
CHECKOUT = Path(__file__).parents[3]
ATTACH = "\nimport arcface_kd\n\narcface_kd.attach(config)"
# A port of its own.
STANDALONE = "--torchrun=--standalone"
# A teacher that has learned the student's classes is held against the records before the third run.
LEARNING = {"shkd.teacher_epochs": 6, "shkd.teacher_lr": 0.05}


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Faces:
    return draw_faces(tmp_path_factory.mktemp("faces"), identities=4, images=8)


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("teacher") / "teacher.onnx"
    path.write_bytes(face_network().SerializeToString())
    return path


@pytest.fixture(scope="module")
def flagged(arcface_torch: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real trainer with the flag."""
    folder = tmp_path_factory.mktemp("flagged") / "arcface_torch"
    return checkout(arcface_torch, folder, "kd_flag", "cpu_gloo", "current_stack")


def keys(faces: Faces, teacher: Path, **changes: object) -> dict[str, object]:
    own = {"kd": "shkd", "kd_teacher": str(teacher), "kd_option": LEARNING, "output": None, "num_epoch": 2}
    data = {"rec": str(faces.folder), "num_classes": faces.num_classes, "num_image": faces.num_image}
    return {**data, **own, **changes}


def assert_three_runs(output: Path, ranks: int = 1) -> None:
    for rank in range(ranks):
        first, second, third = (head_state(output / name, rank) for name in ("stage1_student", "stage2_teacher", "."))
        assert first["weight"].shape == (4 // ranks, EMBEDDING_SIZE), "the trainer's own head, without us"
        assert not [name for name in second if name.startswith("methods")], "the teacher learns no classes"
        assert [name for name in third if name.startswith("methods")]
    assert (output / "shkd.json").is_file()


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    folder = tmp_path / "trainer"
    shutil.copytree(STAND_IN, folder, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.mark.slow
def test_the_first_run_by_hand_and_the_others_by_one_command(
    stand_in: Path, faces: Faces, graph: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    config = write_config(stand_in, "ours", keys(faces, graph, embedding_size=EMBEDDING_SIZE), ATTACH)
    printed = train(stand_in, config)
    assert printed.count("shkd: run 1 of 3") == 1
    assert "the temporary student" in printed
    recipe = ["recipe", str(stand_in), f"configs/{config}", STANDALONE]
    assert main(recipe) == 0
    printed = "".join(capfd.readouterr())
    for number, what in ((2, f"starting from {graph}"), (3, "distilled by kd")):
        assert f"shkd: run {number} of 3" in printed
        assert what in printed
    assert_three_runs(stand_in / "work_dirs" / "ours")
    teacher = load_teacher(stand_in / "work_dirs" / "ours" / "stage2_teacher" / "teacher.onnx")
    assert teacher.embedding_size == EMBEDDING_SIZE
    again = launch(stand_in, config)
    assert again.exit_code != 0
    assert "all runs of shkd are done" in again.printed
    assert main(recipe) == 2
    assert "all runs of shkd are done" in capfd.readouterr().err


class TestRecipe:
    def test_it_prints_the_command_of_a_run(
        self, stand_in: Path, faces: Faces, graph: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        write_config(stand_in, "ours", keys(faces, graph), ATTACH)
        flags = ["--kd", "shkd", "--kd-teacher", "a b.pt", "--kd-option", "shkd.distil=thkd", "teacher.std=128"]
        assert main(["recipe", str(stand_in), "ours", "--nproc", "8", "--print", *flags]) == 0
        first, line = capsys.readouterr().out.splitlines()
        assert first.startswith("# 3 times: each makes the run that is next")
        assert line == (
            f"cd {stand_in} && torchrun --nproc_per_node=8 train_v2.py configs/ours --kd shkd --kd-teacher 'a b.pt' "
            "--kd-option shkd.distil=thkd teacher.std=128"
        )

    @pytest.mark.parametrize(
        ("changes", "config", "said"),
        [
            ({"kd": "adadistill", "kd_option": {}}, "ours", "kd is 'adadistill', which is one run"),
            ({"kd_teacher": "none.pt"}, "ours", "none.pt does not exist"),
            ({}, "theirs", "no config"),
            ({}, "ours --set lr=1", "--set is for the compact trainer"),
        ],
    )
    def test_what_cannot_be_run_is_one_line(
        self,
        stand_in: Path,
        faces: Faces,
        graph: Path,
        changes: dict[str, object],
        config: str,
        said: str,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        write_config(stand_in, "ours", keys(faces, graph, **changes), ATTACH)
        assert main(["recipe", str(stand_in), *config.split()]) == 2
        printed = capsys.readouterr().err
        assert said in printed
        assert printed.count("\n") == 1

    def test_flags_may_stand_between_the_folder_and_the_config(
        self, stand_in: Path, faces: Faces, graph: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        write_config(stand_in, "ours", keys(faces, graph), ATTACH)
        assert main(["recipe", str(stand_in), "--nproc", "2", "--print", "ours"]) == 0
        assert "--nproc_per_node=2 train_v2.py configs/ours" in capsys.readouterr().out

    @pytest.mark.parametrize("words", [["--nproc", "2"], ["--print"], [STANDALONE]])
    def test_the_host_s_flags_want_its_folder(self, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["recipe", "ours", *words]) == 2
        assert "give its folder before the config" in capsys.readouterr().err

    def test_a_folder_without_the_trainer_is_named(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["recipe", str(tmp_path), "ours"]) == 2
        assert "has no train_v2.py; wanted insightface's recognition/arcface_torch" in capsys.readouterr().err

    def test_a_run_that_fails_stops_it(
        self, stand_in: Path, faces: Faces, graph: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        config = write_config(stand_in, "ours", keys(faces, graph, embedding_size=EMBEDDING_SIZE), ATTACH)
        (stand_in / "train_v2.py").write_text("raise SystemExit(3)\n", encoding="utf-8")
        assert main(["recipe", str(stand_in), config, STANDALONE]) == 2
        assert (
            "run 1 of 3: the temporary student, tiny has failed, see above; the same command" in capfd.readouterr().err
        )


@pytest.mark.slow
def test_two_ranks_of_the_compact_trainer_in_one_command(faces: Faces, graph: Path, tmp_path: Path) -> None:
    """One process group for all three runs."""
    own = keys(
        faces, graph, embedding_size=EMBEDDING_SIZE, network="python:tests.networks:tiny", output=str(tmp_path / "out")
    )
    own |= {"warmup_epoch": 0, "val_targets": [], "batch_size": 4, "num_workers": 0, "num_epoch": 1}
    (tmp_path / "configs").mkdir()
    write_config(tmp_path, "ours", own)
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "arcface_kd"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(CHECKOUT)}
    run = subprocess.run(
        [sys.executable, *words, "train", str(tmp_path / "configs" / "ours.py")],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-6000:]
    assert [run.stdout.count(f"shkd: run {number} of 3") for number in (1, 2, 3)] == [1, 1, 1]
    tiny(EMBEDDING_SIZE).load_state_dict(torch.load(tmp_path / "out" / "model.pt", weights_only=True))


@pytest.mark.slow
@pytest.mark.trainer
class TestTheRealTrainer:
    def test_the_flag_and_one_command(
        self, flagged: Path, faces: Faces, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """From a checkpoint of the host's own network; what is left loads into it."""
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        torch.manual_seed(0)
        torch.save(get_backbone("mbf", num_features=EMBEDDING_SIZE).state_dict(), tmp_path / "teacher.pt")
        own = settings(faces, tmp_path / "out", embedding_size=EMBEDDING_SIZE, lr=0.05)
        config = write_config(flagged, "plain", own)
        words = ["recipe", str(flagged), f"configs/{config}", "--nproc", "2", "--kd", "shkd"]
        words += ["--kd-teacher", str(tmp_path / "teacher.pt"), STANDALONE, "--kd-option"]
        assert main([*words, "shkd.teacher_epochs=6", "shkd.teacher_lr=0.05"]) == 0
        assert_three_runs(tmp_path / "out", ranks=2)
        for name in ("stage1_student", "stage2_teacher", "."):
            state = torch.load(tmp_path / "out" / name / "model.pt", weights_only=True)
            get_backbone("mbf", num_features=EMBEDDING_SIZE).load_state_dict(state)

    def test_the_copied_config_from_an_onnx_teacher(
        self, flagged: Path, faces: Faces, graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With ``output = None``, as configs/ has it: the folder bears the file's name, whatever the base says."""
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        own = settings(faces, tmp_path, embedding_size=EMBEDDING_SIZE)
        own |= {"kd": "shkd", "kd_teacher": str(graph), "kd_option": LEARNING, "output": None}
        config = write_config(flagged, "copied", own, ATTACH)
        assert main(["recipe", str(flagged), f"configs/{config}", STANDALONE]) == 0
        assert_three_runs(flagged / "work_dirs" / "copied")
        teacher = load_teacher(flagged / "work_dirs" / "copied" / "stage2_teacher" / "teacher.onnx")
        assert teacher.embedding_size == EMBEDDING_SIZE
        assert not (flagged / "ms1mv3_arcface_r50").exists()
