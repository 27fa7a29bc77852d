"""Teachers from MXNet checkpoints, the older InsightFace model zoo's format, without mxnet."""

import os
import re
from pathlib import Path
from typing import ClassVar

from arcface_kd.errors import TeacherError
from arcface_kd.teachers.base import Teacher, existing_file, local_path, tensors_digest
from arcface_kd.teachers.file_type import signature
from arcface_kd.teachers.mxnet.arrays import read_arrays
from arcface_kd.teachers.mxnet.symbol import SymbolGraph
from arcface_kd.teachers.options import Preprocessing, TeacherOptions
from arcface_kd.teachers.preparation import default_precision

_SYMBOL = "-symbol.json"
_PARAMS = re.compile(r"-\d{4,}\.params$")
_EPOCH = re.compile(r"(?P<prefix>.+),(?P<epoch>\d{1,6})$")


def _is_named(path: Path) -> bool:
    return path.name.endswith(_SYMBOL) or _PARAMS.search(path.name) is not None


def _symbol_in(folder: Path) -> Path | None:
    """The symbol of a folder that holds one, and no network in ONNX."""
    names = {place.name: place for place in (_siblings(folder / _SYMBOL) if folder.is_dir() else ())}
    symbols = [place for name, place in names.items() if name.endswith(_SYMBOL)]
    return symbols[0] if len(symbols) == 1 and not any(name.endswith(".onnx") for name in names) else None


def _files(path: Path) -> tuple[Path, Path]:
    """Symbol and parameters that a path stands for: either file, their folder or prefix, or ``prefix,epoch``."""
    path = _symbol_in(path) or path
    name = path.name
    numbered = _EPOCH.fullmatch(name)
    if name.endswith(_SYMBOL):
        prefix = name[: -len(_SYMBOL)]
    elif _PARAMS.search(name):
        return path.with_name(_PARAMS.sub("", name) + _SYMBOL), path
    elif numbered is not None:
        prefix = numbered["prefix"]
        return path.with_name(prefix + _SYMBOL), path.with_name(f"{prefix}-{int(numbered['epoch']):04d}.params")
    else:
        prefix = name
    symbol = path.with_name(prefix + _SYMBOL)
    pattern = re.compile(re.escape(prefix) + r"-(\d{4,})\.params")
    epochs = {int(match[1]): place for place in _siblings(path) if (match := pattern.fullmatch(place.name))}
    return symbol, epochs[max(epochs)] if epochs else path.with_name(f"{prefix}-0000.params")


def _siblings(path: Path) -> list[Path]:
    try:
        return list(path.parent.iterdir())
    except OSError:
        return []


class MXNetSource:
    """MXNet checkpoints, fed RGB pixel values 0..255: InsightFace's graphs normalise by themselves."""

    description: ClassVar[str] = "an MXNet checkpoint (NAME-symbol.json with NAME-0000.params, just NAME, or a folder)"

    @staticmethod
    def accepts(source: object) -> bool:
        """Whether this is one of a checkpoint's two files, or what their names begin with."""
        path = local_path(source)
        if path is None:
            return False
        if path.is_dir():
            return _symbol_in(path) is not None
        if path.is_file():
            kind = signature(path)
            return kind == "mxnet" or (_is_named(path) and kind in (None, "json"))
        return any(file.is_file() for file in _files(path))

    @staticmethod
    def load(source: str | os.PathLike[str], options: TeacherOptions) -> Teacher:
        """Load the graph up to ``fc1_output`` with the arrays of the given epoch, or of the last one."""
        options.refuse("network", "an MXNet checkpoint holds its own network")
        options.refuse("output", "only an ONNX file has outputs to choose from")
        path = local_path(source)
        assert path is not None
        if path.is_file() and not _is_named(path):
            raise TeacherError(f"teacher {path} holds MXNet arrays; wanted NAME-0000.params beside NAME-symbol.json")
        symbol, params = (existing_file(file) for file in _files(path))
        network = SymbolGraph(symbol, read_arrays(params))
        known = Preprocessing("rgb", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        preprocessing = options.preprocessing(known)
        network.check(preprocessing.size)
        return Teacher(
            network,
            preprocessing=preprocessing,
            description=f"MXNet {params}",
            weights=tensors_digest(network.arrays),
            precision=options.precision or default_precision(),
            embedding_size=options.embedding_size,
            channels_last=True,
        )
