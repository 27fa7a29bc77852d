"""A network of the user's own from training to judging, by the command line alone."""

import json
from pathlib import Path

import pytest
import torch

from arcface_kd.cli.main import main
from tests.host.trainer.faces import draw_faces
from tests.networks import tiny

OWN = "python:tests.networks:tiny"


def test_it_is_trained_judged_and_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "faces"
    folder.mkdir()
    faces = draw_faces(folder, identities=4, images=4)
    torch.manual_seed(0)
    teacher = tmp_path / "teacher.pt"
    torch.save(tiny(16).state_dict(), teacher)
    keys = {"network": OWN, "embedding_size": 16, "rec": str(folder), "num_classes": faces.num_classes}
    keys |= {"num_image": faces.num_image, "num_epoch": 1, "warmup_epoch": 0, "batch_size": 8, "num_workers": 0}
    keys |= {"val_targets": ["pairs"], "output": str(tmp_path / "run")}
    config = tmp_path / "own.py"
    config.write_text(f"from easydict import EasyDict\n\nconfig = EasyDict({keys!r})\n")

    run, words = str(tmp_path / "run"), ["--kd", "crosskd", "--kd-teacher", str(teacher), "--kd-option"]
    options = [f"teacher.network={OWN}", f"student.init={teacher}"]
    maps = ["crosskd.student_map=features.4", "crosskd.teacher_map=features.3"]
    assert main(["train", str(config), *words, *options]) == 2
    assert "name the module that returns it" in capsys.readouterr().err
    assert main(["train", str(config), *words, *options, *maps]) == 0
    trained = torch.load(tmp_path / "run" / "model.pt", weights_only=True)
    assert not torch.equal(trained["fc.weight"], torch.load(teacher, weights_only=True)["fc.weight"])

    named = ["--kd-option", f"teacher.network={OWN}"]
    scores = tmp_path / "scores.json"
    assert main(["eval", run, f"{run}/model.pt", "--data", str(folder), *named, "--out", str(scores)]) == 0
    first, second, *_ = json.loads(scores.read_text())
    assert first["accuracy"] == second["accuracy"]
    assert main(["check", "--kd-teacher", run, *named]) == 0
    assert OWN in capsys.readouterr().out

    report = tmp_path / "report"
    judge = ["compare", run, "--data", str(folder), "--no-faces", "--out", str(report)]
    assert main(judge) == 2
    assert f"--network {OWN}" in capsys.readouterr().err
    assert main([*judge, "--network", OWN]) == 0
    assert OWN in (report / "report.md").read_text()
