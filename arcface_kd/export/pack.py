"""``arcface-kd export --pack``: a student and a detector as a model pack that ``insightface.app.FaceAnalysis`` loads.

insightface 0.7 and 1 load every ``.onnx`` of a pack's folder and tell what each is by its shapes; insightface 2 reads
``manifest.json``, which names the files, their checksums and what they want. One folder serves both.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from arcface_kd.errors import ArcfaceKDError, ConfigError, first_line
from arcface_kd.export.onnx import ExportReport, export
from arcface_kd.system.files import require_folder_of

_DETECTOR, _STUDENT, _MANIFEST = "detection.onnx", "recognition.onnx", "manifest.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_CPU = ["CPUExecutionProvider"]


def export_pack(
    run: str | os.PathLike[str], folder: str | os.PathLike[str], detector: str | os.PathLike[str], **options: Any
) -> ExportReport:
    """Write a student as a model pack, and prove that insightface loads it.

    Args:
        run: as :func:`arcface_kd.export.onnx.export` takes it.
        folder: the pack, which is made; its name is the pack's. ``~/.insightface/models/NAME`` is where
            ``FaceAnalysis(name="NAME")`` looks for it.
        detector: a face detector's ``.onnx`` file, such as another pack's; FaceAnalysis wants one in every pack.
        options: as `export` takes them.

    Raises:
        ConfigError: a folder that is there or whose name no pack can have, or a file that is no detector.
        ArcfaceKDError: insightface does not load the pack, or see `export`; no folder is left.
    """
    target = Path(folder).expanduser()
    require_folder_of(target)
    if not _NAME.fullmatch(target.name):
        raise ConfigError(f"{target}: a pack's name is of letters, digits, '.', '_' and '-'")
    if target.exists():
        raise ConfigError(f"{target} is there already; name a new folder, or remove it")
    _require_detector(Path(detector).expanduser())
    # As insightface looks for it, `models/NAME` below a root, and where it can be moved from.
    with tempfile.TemporaryDirectory(prefix=".arcface_kd_pack_", dir=target.absolute().parent) as root:
        pack = Path(root) / "models" / target.name
        pack.mkdir(parents=True)
        shutil.copyfile(Path(detector).expanduser(), pack / _DETECTOR)
        report = export(run, pack / _STUDENT, **options)
        (pack / _MANIFEST).write_text(json.dumps(_manifest(pack, report), indent=2) + "\n")
        _require_loading(root, target.name)
        pack.rename(target)
    return replace(report, out=target)


def _require_detector(path: Path) -> None:
    from insightface.model_zoo import get_model

    if not path.is_file():
        raise ConfigError(
            f"--pack {path} is no file; wanted a face detector's .onnx, such as det_10g.onnx of buffalo_l"
        )
    try:
        model = get_model(str(path), providers=_CPU)
    # onnxruntime's exceptions share no base class of their own.
    except Exception as error:
        raise ConfigError(f"--pack {path}: insightface cannot load it: {first_line(error)}") from error
    if getattr(model, "taskname", None) != "detection":
        raise ConfigError(f"--pack {path} is no face detector: insightface takes it for a {type(model).__name__}")


def _manifest(pack: Path, report: ExportReport) -> dict[str, object]:
    """Insightface's manifest, version 2. A MODEL.LICENSE is signed by insightface alone, and none has to be there."""

    def entry(file: str) -> dict[str, object]:
        return {"file": file, "sha256": hashlib.sha256((pack / file).read_bytes()).hexdigest()}

    recognition = {
        **entry(_STUDENT),
        "preprocessing": {"mean": 127.5, "std": 127.5},
        "input_size": [112, 112],
        "embedding_dimension": report.embedding_size,
    }
    return {
        "manifest_version": 2,
        "model_id": pack.name,
        "license": "MODEL.LICENSE",
        "tasks": {"detection": entry(_DETECTOR), "recognition": recognition},
    }


def _require_loading(root: str, name: str) -> None:
    from insightface.app import FaceAnalysis

    try:
        models = FaceAnalysis(name=name, root=root, providers=_CPU).models
    except Exception as error:
        raise ArcfaceKDError(f"insightface cannot load the pack: {first_line(error)}") from error
    if set(models) != {"detection", "recognition"}:
        raise ArcfaceKDError(f"insightface finds {', '.join(models)} in the pack, wanted detection and recognition")
