"""Who trained a checkpoint, and so how it wants its images: the order of the channels is not in the tensors.

The authors' own code: AdaFace, FaceX-Zoo and MagFace read by OpenCV and train on BGR, FaceX-Zoo as (x - 127.5) / 128
and MagFace as x / 255; face.evoLVe trains on RGB; CVLface as ``color_space`` says in the settings beside its weights.
arcface_torch and this package train on RGB as (x - 127.5) / 127.5.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from arcface_kd.backbones.ir import IRLayout
from arcface_kd.teachers.options import Channels, Preprocessing

_LARGEST_SETTINGS = 1 << 20
_IN_YAML = re.compile(r"""^color_space:\s*['"]?(\w+)""", re.MULTILINE)
_IRESNETS = ("r18", "r34", "r50", "r100")


class Author(NamedTuple):
    """Who trained some weights."""

    name: str  # the project; empty for arcface_torch and this package
    shown: Preprocessing  # how its networks want their images


TRAINED_HERE = Author("", Preprocessing())
MAGFACE = Author("MagFace", Preprocessing("bgr", (0.0, 0.0, 0.0), (255.0, 255.0, 255.0)))
_ADAFACE = Author("AdaFace", Preprocessing("bgr"))
_FACEX_ZOO = Author("FaceX-Zoo", Preprocessing("bgr", std=(128.0, 128.0, 128.0)))
_EVOLVE = Author("face.evoLVe", Preprocessing())


def author_of(path: Path, network: str, prefix: str, beside: Sequence[str]) -> Author | None:
    """The author; None where networks of this layout come in RGB and in BGR and nothing tells which this is.

    Args:
        path: the file.
        network: its network's name.
        prefix: what the tensors' names begin with.
        beside: names of the other tensors.
    """
    told = _color_space(path)
    if told is not None:
        return Author("CVLface", Preprocessing(told))
    layout = IRLayout.of(network)
    if network in _IRESNETS and "features" in prefix.split("."):
        return MAGFACE
    if (layout is None and not network.startswith("cvlface_")) or (path.parent / "training.log").is_file():
        return TRAINED_HERE
    parts, called = prefix.split("."), path.name.lower()
    if layout is None or "net" in parts:
        return None
    if layout.inner_norm:
        return _ADAFACE if "model" in parts or ("adaface" in called and "cvlface" not in called) else None
    if "backbone" in parts and any("head" in name.split(".") for name in beside):
        return _FACEX_ZOO
    return _EVOLVE if called.startswith("backbone_") else None


def _color_space(path: Path) -> Channels | None:
    """The order in CVLface's settings: model.yaml beside model.pt, or the config.json of a Hugging Face folder."""
    folders = [path.parent, *([path.parent.parent] if path.parent.name == "pretrained_model" else [])]
    yamls = [path.with_suffix(".yaml"), path.parent / "pretrained_model" / "model.yaml"]
    for place in (*yamls, *(folder / "config.json" for folder in folders)):
        if not place.is_file() or place.stat().st_size > _LARGEST_SETTINGS:
            continue
        text = place.read_text(encoding="utf-8", errors="replace")
        found = _IN_YAML.search(text) if place.suffix == ".yaml" else None
        word = found[1] if found else _in_json(text) if place.suffix == ".json" else None
        if word in ("RGB", "BGR"):
            return "rgb" if word == "RGB" else "bgr"
    return None


def _in_json(text: str) -> object:
    try:
        settings = json.loads(text)
    # The JSON reader answers deep nesting with a RecursionError.
    except (ValueError, RecursionError):
        return None
    inner = settings.get("conf", settings) if isinstance(settings, dict) else None
    return inner.get("color_space") if isinstance(inner, dict) else None
