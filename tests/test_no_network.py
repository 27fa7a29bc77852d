"""No socket to anywhere but this machine, at import and at run time, unless a command says so."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from arcface_kd.backbones import get_backbone
from tests.host.trainer.faces import Faces, draw_faces

# A connection to another machine, and the question for its address, end the process before they are made. Ranks meet in
# C++, which Python's audit does not see: they go where torchrun's MASTER_ADDR says.
_WATCHED = """
import runpy, socket, sys

def refuse(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg", "socket.bind"):
        address = arguments[1]
        if not isinstance(address, tuple) or address[0] in ("127.0.0.1", "::1", "localhost"):
            return
    elif event not in ("socket.getaddrinfo", "socket.gethostbyname", "urllib.Request", "http.client.connect"):
        return
    sys.stderr.write(f"NETWORK {event} {arguments!r}\\n")
    sys.stderr.flush()
    import os
    os._exit(99)

sys.addaudithook(refuse)
"""


def watched(code: str, *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", _WATCHED + code, *words],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


def test_the_watch_sees_a_connection(tmp_path: Path) -> None:
    tried = watched("import socket; socket.create_connection(('192.0.2.1', 80), 1)", cwd=tmp_path)
    assert tried.returncode == 99
    assert "NETWORK socket." in tried.stderr
    tried = watched("import urllib.request; urllib.request.urlopen('http://example.invalid/')", cwd=tmp_path)
    assert tried.returncode == 99


_EVERYTHING = """
import importlib, pkgutil
import arcface_kd
for module in pkgutil.walk_packages(arcface_kd.__path__, "arcface_kd."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
for name in ("insightface", "onnxruntime", "onnx", "tensorboard", "cv2"):
    importlib.import_module(name)
"""


def test_importing_every_module_opens_none(tmp_path: Path) -> None:
    done = watched(_EVERYTHING, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Faces:
    return draw_faces(tmp_path_factory.mktemp("faces"), identities=4, images=4)


@pytest.mark.slow
def test_a_whole_job_opens_none(faces: Faces, tmp_path: Path) -> None:
    """Cache, distilled training with verification, merging, checking a teacher, packing, exporting."""
    torch.manual_seed(7)
    torch.save(get_backbone("thin_r18", num_features=16).state_dict(), tmp_path / "teacher.pt")
    keys: dict[str, Any] = {
        **{"rec": str(faces.folder), "network": "thin_r18", "num_classes": 4, "num_image": 16, "num_epoch": 1},
        **{"warmup_epoch": 0, "val_targets": ["pairs"], "embedding_size": 16, "batch_size": 8, "num_workers": 1},
        **{"output": "run", "save_all_states": True},
        **{"kd": "adadistill", "kd_teacher": "teacher.pt", "kd_cache": "rows"},
    }
    (tmp_path / "small.py").write_text(f"from easydict import EasyDict\nconfig = EasyDict({keys!r})\n")
    commands = [
        ["cache", "small.py"],
        ["train", "small.py"],
        ["merge-head", "run", "head.pt"],
        ["check", "--kd-teacher", "teacher.pt", "--bin", str(faces.folder / "pairs.bin")],
        ["data", "subset", str(faces.folder), "few", "--images-per-identity", "2"],
        ["export", "run", "student.onnx"],
        ["methods"],
    ]
    code = "from arcface_kd.cli.main import main\n" + "".join(
        f"assert main({words!r}) == 0, {words!r}\n" for words in commands
    )
    done = watched(code, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]


def test_a_pack_by_name_says_that_it_is_downloaded(tmp_path: Path) -> None:
    """The one way to the network, which the teacher's own name asks for."""
    code = "import os\nos.environ['HOME'] = os.getcwd()\nfrom arcface_kd.cli.main import main\n"
    code += "main(['check', '--kd-teacher', 'insightface:buffalo_l'])\n"
    done = watched(code, cwd=tmp_path)
    assert done.returncode == 99
    assert "insightface downloads" in done.stderr
