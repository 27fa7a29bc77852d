"""InsightFace's packs: folders with the networks of one pipeline, of which one recognises faces."""

import logging
import os
import re
from pathlib import Path

from filelock import FileLock

from arcface_kd.errors import TeacherError, first_line
from arcface_kd.teachers.onnx.form import EMBEDDING_STEP, USUAL_SIZE
from arcface_kd.teachers.onnx.graph import OnnxGraph, read_graph
from arcface_kd.teachers.options import Preprocessing

logger = logging.getLogger(__name__)

PREFIX = "insightface:"
_PACK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# Sizes of insightface's landmark networks, whose output may have any number of numbers.
_OTHER_SIZES = (192,)


def pack_files(folder: Path) -> list[Path]:
    """ONNX files of a pack in InsightFace's order; antelopev2's archive has a folder of its own name inside."""
    files = sorted(folder.glob("*.onnx"))
    return files or sorted((folder / folder.name).glob("*.onnx"))


def from_manifest(folder: Path) -> tuple[Path, Preprocessing] | None:
    """The recognition network of a pack with a manifest, read and verified by the insightface package; None without."""
    if not (folder / "manifest.json").is_file():
        return None
    try:
        from insightface.model_zoo import package_manifest
    except ImportError:
        return None
    try:
        if not package_manifest.has_model_package_manifest(folder):
            return None
        task = package_manifest.load_model_package(folder).task("recognition")
        file = package_manifest.verify_model_artifact(task)
    # A RuntimeError is also how the JSON reader answers deep nesting.
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        raise TeacherError(f"teacher {folder}: {first_line(error)}") from error
    known, size = task.metadata["preprocessing"], task.metadata["input_size"][0]
    mean, std = (0.0, 1.0) if isinstance(known, str) else (known["mean"], known["std"])
    return Path(file), Preprocessing("rgb", (mean,) * 3, (std,) * 3, size)


def recognition_network(folder: Path, output: str | None) -> tuple[Path, OnnxGraph]:
    """The one network of a folder that puts out embeddings: rows of numbers, a multiple of 16, of a square image.

    Landmarks, attributes, liveness and expressions come in other counts; detectors and restorers put out no row.
    """
    found: dict[Path, OnnxGraph] = {}
    others: dict[Path, str] = {}
    level = logging.INFO
    for file in pack_files(folder):
        try:
            graph = read_graph(file, output)
        except TeacherError as error:
            others[file] = re.split("[,:;]", first_line(error).removeprefix(f"teacher {file} "))[0]
            continue
        if graph.size in _OTHER_SIZES:
            others[file] = f"takes {graph.size}x{graph.size}, as landmark networks do"
        elif graph.width is not None and (graph.width == 0 or graph.width % EMBEDDING_STEP):
            others[file] = f"puts out {graph.width or 'no row of'} numbers"
            # The insightface package would take it, if its name comes first.
            level = logging.WARNING if graph.width and (graph.size or 0) >= USUAL_SIZE else level
        else:
            found[file] = graph
    listed = "; ".join(f"{file.name} {why}" for file, why in others.items())
    if not found:
        met = listed or "there are no .onnx files"
        raise TeacherError(f"teacher {folder} has no recognition network ({met}); name the file itself")
    if len(found) > 1:
        names = ", ".join(f"{file.name} ({graph.width or 'open'} numbers)" for file, graph in found.items())
        one = next(iter(found))
        raise TeacherError(f"teacher {folder} has {len(found)} recognition networks: {names}; name --kd-teacher {one}")
    ((file, graph),) = found.items()
    if others:
        logger.log(level, "teacher %s: %s is taken as the recognition network; %s", folder, file.name, listed)
    return file, graph


def is_pack(source: object) -> bool:
    """Whether a source is ``insightface:NAME``."""
    return isinstance(source, str) and source.startswith(PREFIX) and not os.path.exists(source)


def pack_folder(name: str) -> Path:
    """The folder of a pack below ``~/.insightface/models``; insightface downloads it when it is missing."""
    if not _PACK_NAME.fullmatch(name) or ".." in name:
        raise TeacherError(f"teacher {PREFIX}{name}: wanted the name of a pack, such as insightface:buffalo_l")
    folder = Path("~/.insightface/models").expanduser() / name
    if folder.is_dir() and pack_files(folder):
        return folder
    from insightface.utils import storage

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # One rank of a machine downloads; the others wait, and find the pack.
        with FileLock(folder.parent / f".{name}.lock"):
            if folder.is_dir() and pack_files(folder):
                return folder
            source = f"{storage.BASE_REPO_URL}/{name}.zip"
            logger.warning("%s is not there: insightface downloads %s", folder, source)
            # A folder without networks is what an interrupted download leaves behind.
            storage.download("models", name, force=True)
    # requests, urllib3, zipfile and insightface each raise their own.
    except Exception as error:
        where = f"teacher {PREFIX}{name} is not in {folder.parent}"
        raise TeacherError(f"{where} and cannot be downloaded: {first_line(error)}") from error
    return folder
