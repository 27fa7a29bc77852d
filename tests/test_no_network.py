"""No socket to anywhere but this machine, unless a command says so; what importing opens stands in test_import.py."""

import os
import socket
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from arcface_kd.backbones import get_backbone
from arcface_kd.cli.main import main
from tests.forked import start, wait
from tests.host.trainer.faces import draw_faces
from tests.no_network import refuse_connections
from tests.training.runs import config_file


def _in(folder: Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    os.chdir(folder)
    os.environ["HOME"] = str(folder)
    refuse_connections()
    return function(*arguments)


def watched(folder: Path, function: Callable[..., Any], *arguments: Any) -> tuple[int | None, str]:
    """The exit code and the output of a function in a process of its own."""
    log = folder / "watched.log"
    (code,) = wait([start(_in, folder, function, arguments, log=log, may_fork=True)], 600)
    return code, log.read_text()


@pytest.mark.parametrize(
    ("function", "argument"),
    [(socket.create_connection, ("192.0.2.1", 80)), (urllib.request.urlopen, "http://example.invalid/")],
    ids=["connection", "address"],
)
def test_the_watch_sees(function: Callable[..., Any], argument: Any, tmp_path: Path) -> None:
    code, said = watched(tmp_path, function, argument)
    assert code == 99
    assert "NETWORK " in said


def _all_end_well(commands: list[list[str]]) -> None:
    for words in commands:
        assert main(words) == 0, words


@pytest.mark.slow
def test_a_whole_job_opens_none(tmp_path: Path) -> None:
    """Cache, distilled training with verification, merging, checking a teacher, packing, exporting."""
    (tmp_path / "faces").mkdir()
    faces = draw_faces(tmp_path / "faces", identities=4, images=4)
    torch.manual_seed(7)
    torch.save(get_backbone("thin_r10", num_features=16).state_dict(), tmp_path / "teacher.pt")
    keys: dict[str, Any] = {"network": "thin_r10", "embedding_size": 16, "batch_size": 8, "num_epoch": 1}
    keys |= {"num_workers": 1, "save_all_states": True}
    keys |= {"kd": "adadistill", "kd_teacher": "teacher.pt", "kd_cache": "rows"}
    config = str(config_file(faces, tmp_path / "run", **keys))
    commands = [
        ["cache", config],
        ["train", config],
        ["merge-head", "run", "head.pt"],
        ["check", "--kd-teacher", "teacher.pt", "--bin", "faces/pairs.bin"],
        ["data", "subset", "faces", "few", "--images-per-identity", "2"],
        ["export", "run", "student.onnx"],
        ["methods"],
    ]
    code, said = watched(tmp_path, _all_end_well, commands)
    assert code == 0, said[-4000:]


def test_a_pack_by_name_says_that_it_is_downloaded(tmp_path: Path) -> None:
    """The one way to the network, which the teacher's own name asks for."""
    code, said = watched(tmp_path, main, ["check", "--kd-teacher", "insightface:buffalo_l"])
    assert code == 99
    assert "insightface downloads" in said
