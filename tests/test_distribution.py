"""The wheel and the sdist: what is in them, and that a clean environment runs what they install."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

REPOSITORY = Path(__file__).parents[1]

_BUILD = """
import sys
from setuptools import build_meta
print(getattr(build_meta, sys.argv[1])(sys.argv[2]))
"""


class Built(NamedTuple):
    """The two files that are published."""

    wheel: Path
    sdist: Path


def build(tree: Path, kind: str, out: Path) -> Path:
    """Build in a tree with the setuptools that is here, as ``python -m build`` does in an environment of its own."""
    out.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", _BUILD, f"build_{kind}", str(out)], cwd=tree, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What git knows, as it stands in the work tree."""
    tree = tmp_path_factory.mktemp("tree")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("the tests do not run from a git checkout")
    for name in listed.stdout.decode().split("\0"):
        source = REPOSITORY / name
        if name and source.is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes(source.read_bytes())
    return tree


@pytest.fixture(scope="module")
def built(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    out = tmp_path_factory.mktemp("dist")
    return Built(build(tree, "wheel", out), build(tree, "sdist", out))


def shipped(tree: Path) -> dict[str, Path]:
    """What the package consists of, by its place in the wheel."""
    own = {path.relative_to(tree): path for path in (tree / "arcface_kd").rglob("*") if path.is_file()}
    patches = {Path("arcface_kd") / path.relative_to(tree): path for path in (tree / "patches").iterdir()}
    return {place.as_posix(): path for place, path in {**own, **patches}.items() if "__pycache__" not in place.parts}


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(tree: Path, built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as wheel:
        content = {name: wheel.read(name) for name in wheel.namelist() if ".dist-info/" not in name}
        assert any(name.endswith("LICENSE") for name in wheel.namelist())
    assert content == {place: path.read_bytes() for place, path in shipped(tree).items()}


@pytest.mark.slow
def test_the_sdist_makes_the_same_wheel(built: Built, tmp_path: Path) -> None:
    with tarfile.open(built.sdist) as sdist:
        sdist.extractall(tmp_path, filter="data")
    (unpacked,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    again = build(unpacked, "wheel", tmp_path / "again")

    def content(path: Path) -> dict[str, bytes]:
        with zipfile.ZipFile(path) as wheel:
            return {name: wheel.read(name) for name in wheel.namelist() if not name.endswith("RECORD")}

    assert content(again) == content(built.wheel)


_SMOKE = """
import importlib, pathlib, pkgutil, sys
import cv2, numpy
import arcface_kd
from arcface_kd.cli.main import main
from arcface_kd.host import patching

for place in (pathlib.Path(arcface_kd.__file__), patching.patches_folder()):
    assert place.is_relative_to(sys.prefix), place
assert len(patching.available_patches()) == 3
for module in pkgutil.walk_packages(arcface_kd.__path__, "arcface_kd."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
for name in arcface_kd.__all__:
    getattr(arcface_kd, name)
faces = pathlib.Path("images/someone")
faces.mkdir(parents=True)
for number in range(4):
    cv2.imwrite(str(faces / f"{number}.png"), numpy.full((112, 112, 3), 40 * number, "uint8"))
assert main(["data", "pack", "images", "packed"]) == 0
assert main(["train", "small.py"]) == 0
"""


@pytest.mark.slow
def test_a_clean_environment_runs_it(built: Built, tmp_path: Path) -> None:
    home = tmp_path / "environment"
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", "--no-cache-dir", str(built.wheel)], check=True)
    # What it depends on comes from the environment of the tests, behind what is installed here.
    packages = Path(next((home / "lib").glob("python*/site-packages")))
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def run(*words: str) -> str:
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
        return done.stdout

    (tmp_path / "small.py").write_text(
        "from easydict import EasyDict\nconfig = EasyDict(rec='packed', network='thin_r10', num_classes=1, "
        "num_image=4, num_epoch=1, warmup_epoch=0, val_targets=[], embedding_size=8, batch_size=2, num_workers=0, "
        "output='run')\n"
    )
    assert "run/model.pt: 2 steps" in run(str(python), "-c", _SMOKE)
    assert "adadistill" in run(str(home / "bin" / "arcface-kd"), "methods")
