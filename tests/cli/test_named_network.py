"""A student with options in its name, from training to judging: after training its files alone say what it is."""

from pathlib import Path

import pytest
import torch

from arcface_kd.backbones import get_backbone
from arcface_kd.cli.main import main
from arcface_kd.teachers.checkpoint import load_network
from arcface_kd.teachers.student_init import start_from
from tests.host.trainer.faces import draw_faces

NAME = "mbf:width=0.125,se=true"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_no_command_has_to_be_told_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, run = tmp_path / "faces", tmp_path / "run"
    folder.mkdir()
    faces = draw_faces(folder, identities=4, images=4)
    keys = {"network": "mbf", "embedding_size": 16, "rec": str(folder), "num_classes": faces.num_classes}
    keys |= {"num_image": faces.num_image, "num_epoch": 1, "warmup_epoch": 0, "batch_size": 8, "num_workers": 0}
    keys |= {"val_targets": [], "output": str(run), "save_all_states": True, "frequent": 1}
    config = tmp_path / "config.py"
    config.write_text(f"from easydict import EasyDict\n\nconfig = EasyDict({keys!r})\n")

    assert main(["train", str(config), "--set", f"network={NAME}"]) == 0
    log = (run / "training.log").read_text()
    assert f"student {NAME}: 0.6" in log
    assert log.index("M multiply-adds an image") < log.index("Global Step")
    # A file alone, without the log beside it.
    moved = {name: tmp_path / f"moved_{name}" for name in ("model.pt", "checkpoint_gpu_0.pt")}
    for name, path in moved.items():
        (run / name).rename(path)
        assert load_network(path).name == NAME
    model = str(moved["model.pt"])
    assert main(["eval", model, "--data", str(folder)]) == 0
    assert main(["check", "--kd-teacher", model]) == 0
    assert NAME in capsys.readouterr().out
    assert main(["export", model, str(tmp_path / "student.onnx")]) == 0
    assert f"{NAME}, 16 dimensions" in capsys.readouterr().out
    # The same file starts another run.
    student, _ = start_from(model, None, lambda: get_backbone(NAME, num_features=16), 16, name=NAME)
    trained = torch.load(model, weights_only=True)
    assert all(torch.equal(tensor, trained[key]) for key, tensor in student.state_dict().items())
