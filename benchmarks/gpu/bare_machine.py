"""The package from its checkout, on a machine without a registry: wheels from a folder, entry points from setup.cfg."""

import configparser
import os
import re
import subprocess
import sys
from importlib import invalidate_caches, metadata
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NEEDED = (
    "`make gpu` needs Python 3.10 with torch (CUDA), triton, onnx, onnxruntime, OpenCV, tensorboard, pytest and "
    "hypothesis; put wheels of the packages that are missing into a folder and give it: make gpu WHEELS=DIR"
)
# Of what setup.cfg asks for: only teachers of its model packs need it, and it brings OpenCV, which counts by itself.
_NOT_NEEDED = ("insightface",)
_MODULES = ("cv2", "pytest", "hypothesis")


def make_importable(site: Path, wheels: Path | None) -> None:
    """Put the checkout, the wheels and the package's entry points on the path of this process and those it starts.

    Args:
        site: a folder to make, for what the wheels hold and for the entry points.
        wheels: a folder with ``*.whl`` files; None where nothing is lacking.
    """
    site.mkdir(parents=True)
    files = sorted(wheels.glob("*.whl")) if wheels is not None else []
    if files:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "--no-deps", "--no-index", "--target", site, *files], check=True)
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg", encoding="utf-8")
    # Entry points are read from here, not from what an installation of the package has kept.
    package = site / f"arcface_kd-{settings['metadata']['version']}.dist-info"
    package.mkdir()
    (package / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: arcface_kd\nVersion: {settings['metadata']['version']}\n", encoding="utf-8"
    )
    groups = settings["options.entry_points"]
    (package / "entry_points.txt").write_text(
        "\n".join(f"[{group}]{groups[group]}\n" for group in groups), encoding="utf-8"
    )
    first = [str(site), str(ROOT)]
    sys.path[:0] = first
    os.environ["PYTHONPATH"] = os.pathsep.join([*first, *filter(None, [os.environ.get("PYTHONPATH")])])
    invalidate_caches()


def missing() -> list[str]:
    """Packages that the checks need and that are not there."""
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg", encoding="utf-8")
    names: list[str] = []
    for line in settings["options"]["install_requires"].split("\n"):
        found = re.match(r"[A-Za-z0-9_.-]+", line.strip())
        if found and found[0] not in (*names, *_NOT_NEEDED):
            names.append(found[0])
    return [*(name for name in names if not _installed(name)), *(name for name in _MODULES if find_spec(name) is None)]


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True
