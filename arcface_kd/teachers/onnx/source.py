"""Teachers from ONNX files and InsightFace packs: by torch on a GPU, by onnxruntime on a CPU."""

import logging
import os
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn.functional import normalize

from arcface_kd.errors import ConfigError, TeacherError
from arcface_kd.teachers.base import Teacher, local_path
from arcface_kd.teachers.checkpoint import is_run_folder
from arcface_kd.teachers.file_type import signature
from arcface_kd.teachers.onnx.graph import OnnxGraph, read_graph
from arcface_kd.teachers.onnx.normalisation import find_normalisation
from arcface_kd.teachers.onnx.pack import PREFIX, from_manifest, is_pack, pack_files, pack_folder, recognition_network
from arcface_kd.teachers.onnx.session import any_batch
from arcface_kd.teachers.onnx.torch_module import TorchGraph
from arcface_kd.teachers.options import Preprocessing, TeacherOptions
from arcface_kd.teachers.preparation import TOLERANCE, as_rows, autocast, default_precision, prepared, probe_images

logger = logging.getLogger(__name__)


def _input_of(graph: OnnxGraph, size: int | str | None) -> tuple[Preprocessing, list[str]]:
    """How a graph wants its images, and what it does to them itself, in words."""
    usual = Preprocessing(size=graph.size or int(size or Preprocessing().size))
    normalisation = find_normalisation(graph, usual.size)
    if normalisation is None:
        return usual, []
    return normalisation.preprocessing(usual.size), [str(normalisation)]


def _network(graph: OnnxGraph, known: Preprocessing, wanted: str | None) -> tuple[nn.Module, str]:
    """The graph as torch runs it where there is a GPU or a narrow precision is wanted, else as onnxruntime does.

    Torch's embeddings must be onnxruntime's on a few images. On a GPU onnxruntime would need a package of its own, and
    a copy to the host in each step.
    """
    session = any_batch(graph, known)
    narrow = wanted in ("bf16", "fp16")
    if not narrow and not torch.cuda.is_available():
        return session, "fp32"
    precision: Any = wanted or default_precision()
    try:
        module = TorchGraph(graph).eval()
        images = prepared(probe_images(known.size), known)
        images = torch.cat([images, images.flip(3)])
        with torch.no_grad():
            told = normalize(as_rows(session(images), len(images)))
            with autocast(precision, images.device):
                met = normalize(as_rows(module(images), len(images)).float())
        difference = float((met - told).abs().max()) if met.shape == told.shape else float("inf")
        fault = f"its embeddings differ from onnxruntime's by {difference:.1g}"
        # Beside a GPU the CPU computes in fp32; the GPU is compared with it when the first images come.
        if difference < TOLERANCE["fp32" if torch.cuda.is_available() else precision]:
            return module, precision
    except TeacherError as error:
        fault = str(error)
    if narrow:
        raise ConfigError(f"teacher.precision={wanted!r}: torch cannot run the graph: {fault}; leave the option out")
    logger.warning("the ONNX teacher is run by onnxruntime and not by torch, more slowly on a GPU: %s", fault)
    return session, "fp32"


class OnnxSource:
    """ONNX files, folders of an InsightFace pack, and packs by name.

    Input is RGB as (x - 127.5) / 127.5, or what the graph wants where it normalises its input itself.
    """

    description: ClassVar[str] = "an ONNX file, an InsightFace pack's folder, or insightface:NAME"

    @staticmethod
    def accepts(source: object) -> bool:
        """Whether this is an ONNX file, by its content or else by its name, or a pack."""
        if is_pack(source):
            return True
        path = local_path(source)
        if path is None:
            return False
        if path.is_dir():
            # arcface_torch can leave an ONNX file beside the model.pt that it was made from.
            return bool(pack_files(path)) and not is_run_folder(path)
        kind = signature(path)
        return kind == "onnx" or (kind is None and path.is_file() and path.suffix.lower() == ".onnx")

    @staticmethod
    def load(source: str | os.PathLike[str], options: TeacherOptions) -> Teacher:
        """Load the graph, free its batch size, flush its denormal weights; ``insightface:NAME`` may download."""
        options.refuse("network", "an ONNX file holds its own network")
        path = pack_folder(str(source)[len(PREFIX) :]) if is_pack(source) else local_path(source)
        assert path is not None
        known, graph = None, None
        if path.is_dir():
            found = from_manifest(path)
            path, known = found if found is not None else (path, None)
        if path.is_dir():
            path, graph = recognition_network(path, options.output)
        graph = graph or read_graph(path, options.output)
        notes = [] if graph.choice is None else [graph.choice]
        if known is None:
            known, note = _input_of(graph, options.size)
            notes += note
        preprocessing = options.preprocessing(known)
        if graph.size not in (None, preprocessing.size):
            raise TeacherError(f"teacher {path} takes images of size {graph.size}, not teacher.size={options.size}")
        try:
            network, precision = _network(graph, preprocessing, options.precision)
        except TeacherError as error:
            raise TeacherError(f"teacher {path}: {error}") from error
        return Teacher(
            network,
            preprocessing=preprocessing,
            description=f"ONNX {path}{' (' + '; '.join(notes) + ')' if notes else ''}",
            weights=graph.digest,
            precision=precision,
            embedding_size=options.embedding_size,
            parameter_count=graph.parameter_count,
            channels_last=isinstance(network, TorchGraph),
        )
