"""Teachers from ONNX files and InsightFace packs, run by onnxruntime."""

import logging
import os
import re
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from arcface_kd.errors import TeacherError, first_line
from arcface_kd.teachers.base import Teacher, as_rows, local_path, prepared
from arcface_kd.teachers.checkpoint import is_run_folder
from arcface_kd.teachers.file_type import signature
from arcface_kd.teachers.onnx.form import USUAL_SIZE
from arcface_kd.teachers.onnx.graph import MOST_ELEMENTS, OnnxGraph, free_batch, read_graph
from arcface_kd.teachers.onnx.normalisation import find_normalisation
from arcface_kd.teachers.options import Preprocessing, TeacherOptions

logger = logging.getLogger(__name__)

_PACK = "insightface:"
_PACK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# Sizes of insightface's landmark networks, whose output may have any number of numbers.
_OTHER_SIZES = (192,)
_EMBEDDING_STEP = 16
_INPUT_TYPES: dict[str, torch.dtype] = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(double)": torch.float64,
    "tensor(uint8)": torch.uint8,
}


def _providers(device: torch.device | None) -> list[tuple[str, dict[str, object]]]:
    """InsightFace's choice, CUDA where onnxruntime has it and the CPU behind it, on the rank's own GPU.

    CoreML, which InsightFace prefers on a Mac, is left out: it rounds to float16, and no teacher should depend on that.
    """
    import onnxruntime

    available = onnxruntime.get_available_providers()
    chosen: list[tuple[str, dict[str, object]]] = []
    if "CUDAExecutionProvider" in available and (device is None or device.type == "cuda"):
        index = device.index if device is not None else None
        if index is None:
            index = torch.cuda.current_device() if torch.cuda.is_available() else 0
        if hasattr(onnxruntime, "preload_dlls"):
            onnxruntime.preload_dlls()
        chosen.append(("CUDAExecutionProvider", {"device_id": index}))
    chosen.append(("CPUExecutionProvider", {}))
    return chosen


class OnnxNetwork(nn.Module):
    """An ONNX graph as a module without parameters; the session is made anew after pickling and on another device.

    Attributes:
        graph: what is computed.
        device: where; None leaves the choice to onnxruntime.
    """

    def __init__(self, graph: OnnxGraph, device: torch.device | None = None) -> None:
        """Build the session.

        Args:
            graph: the graph to run; with a fixed batch size, images are run in portions of it.
            device: where to run.

        Raises:
            TeacherError: onnxruntime cannot run the graph.
        """
        super().__init__()
        self.graph = graph
        self.device = device
        self._session: Any = self._new_session()

    def _new_session(self) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Idle threads that spin would take the cores from torch, which trains the student on them.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # Errors arrive as exceptions; warnings tell of optimisations not taken.
        options.log_severity_level = 4
        providers = _providers(self.device)
        try:
            # Its fallback would print to stdout, and try the same providers once more.
            session = onnxruntime.InferenceSession(self.graph.model, options, providers=providers, enable_fallback=0)
        # onnxruntime's exceptions share no base class of their own.
        except Exception as error:
            raise TeacherError(f"onnxruntime cannot run the graph: {first_line(error)}") from error
        if session.get_providers()[0] != providers[0][0]:
            logger.warning("the ONNX teacher runs on the CPU: onnxruntime could not start %s", providers[0][0])
        kind = session.get_inputs()[0].type
        if kind not in _INPUT_TYPES:
            raise TeacherError(f"the graph takes {kind}; wanted floating-point or uint8 images")
        self._input_type = _INPUT_TYPES[kind]
        cuda = session.get_providers()[0] == "CUDAExecutionProvider"
        self._place = torch.device("cuda", int(str(providers[0][1]["device_id"]))) if cuda else torch.device("cpu")
        return session

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_session": None}

    def _apply(self, fn: Any, recurse: bool = True) -> "OnnxNetwork":
        place = fn(torch.empty(0, device=self._place)).device
        if place not in (self._place, self.device):
            self.device = place
            self._session = self._new_session()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Run the graph.

        Args:
            images: (B, 3, S, S), prepared.

        Returns:
            (B, D) float32 on the CPU, or whatever the graph makes of images.
        """
        if self._session is None:
            self._session = self._new_session()
        if self._input_type == torch.uint8:
            images = images.round().clamp(0, 255)
        images = images.to(self._input_type)
        size = self.graph.fixed_batch
        if size is None:
            return self._run(images)
        portions = []
        for portion in images.split(size):
            missing = size - len(portion)
            padded = torch.cat([portion, portion[-1:].expand(missing, -1, -1, -1)]) if missing else portion
            portions.append(self._run(padded)[: len(portion)])
        return torch.cat(portions)

    def _run(self, images: Tensor) -> Tensor:
        if images.device.type == "cuda" and images.device != self._place:
            images = images.to(self._place)
        images = images.contiguous()
        if images.device.type == "cuda":
            # onnxruntime has a stream of its own and must not read the images before torch has written them.
            torch.cuda.current_stream(images.device).synchronize()
        binding = self._session.io_binding()
        element = np.dtype(str(images.dtype).removeprefix("torch."))
        where = images.device
        binding.bind_input(
            self.graph.input_name, where.type, where.index or 0, element.type, tuple(images.shape), images.data_ptr()
        )
        binding.bind_output(self.graph.output_name, "cpu")
        self._session.run_with_iobinding(binding)
        (embeddings,) = binding.copy_outputs_to_cpu()
        if embeddings.dtype.kind != "f":
            raise TeacherError(f"the graph returns {embeddings.dtype}; wanted floating-point embeddings")
        return as_rows(torch.from_numpy(embeddings.astype(np.float32, copy=True)), len(images))


def _agrees(network: OnnxNetwork, wanted: Preprocessing) -> bool:
    """Whether three unlike images embed in one batch as they do one by one."""
    size = wanted.size
    noise = torch.rand((3, 3, size, size), generator=torch.Generator().manual_seed(1))
    images = prepared(noise * 2 - 1, wanted)
    try:
        together = network(images)
        alone = torch.cat([network(image[None]) for image in images])
    # A graph that does not take a batch says so in any of onnxruntime's exceptions.
    except Exception:
        return False
    if not alone.numel() or not torch.isfinite(alone).all():
        # No matter of batches; what tries the teacher says so.
        return together.shape == alone.shape
    scale = float(alone.abs().max())
    return together.shape == alone.shape and bool(torch.allclose(together, alone, rtol=1e-3, atol=1e-3 * scale))


def any_batch(graph: OnnxGraph, wanted: Preprocessing) -> OnnxNetwork:
    """A session that takes batches of any size and embeds each image as it would alone.

    Args:
        graph: the graph as read.
        wanted: how it wants its images.

    Returns:
        The graph freed from its batch size where that is proved on test images, else the graph itself run in portions
        of the batch size it declares (one image at a time where it declares none).

    Raises:
        TeacherError: onnxruntime cannot run the graph.
    """
    freed = free_batch(graph)
    try:
        network = OnnxNetwork(freed)
        if _agrees(network, wanted):
            return network
    except TeacherError:
        if freed is graph:
            raise
    if (graph.fixed_batch or 1) * 3 * wanted.size**2 > MOST_ELEMENTS:
        raise TeacherError(f"the graph takes {graph.fixed_batch} images at a time and no others; wanted any number")
    logger.warning("the ONNX teacher's batch size cannot be freed; images are embedded in portions of it, more slowly")
    return OnnxNetwork(OnnxGraph(**{**vars(graph), "fixed_batch": graph.fixed_batch or 1}))


def _files(folder: Path) -> list[Path]:
    """ONNX files of a pack in InsightFace's order; antelopev2's archive has a folder of its own name inside."""
    files = sorted(folder.glob("*.onnx"))
    return files or sorted((folder / folder.name).glob("*.onnx"))


def _from_manifest(folder: Path) -> tuple[Path, Preprocessing] | None:
    """The recognition network of a pack with a manifest, read and verified by the insightface package."""
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


def _recognition_network(folder: Path, output: str | None) -> tuple[Path, OnnxGraph]:
    """The one network of a folder that puts out embeddings.

    That is a row of numbers whose count is a multiple of 16, of a square colour image: landmarks, attributes, liveness
    and expressions come in other counts, and detectors and restorers put out no row.
    """
    found: dict[Path, OnnxGraph] = {}
    others: dict[Path, str] = {}
    level = logging.INFO
    for file in _files(folder):
        try:
            graph = read_graph(file, output)
        except TeacherError as error:
            others[file] = re.split("[,:;]", first_line(error).removeprefix(f"teacher {file} "))[0]
            continue
        if graph.size in _OTHER_SIZES:
            others[file] = f"takes {graph.size}x{graph.size}, as landmark networks do"
        elif graph.width is not None and (graph.width == 0 or graph.width % _EMBEDDING_STEP):
            others[file] = f"puts out {graph.width or 'no row of'} numbers"
            # The insightface package would take it, if its name comes first.
            level = logging.WARNING if graph.width and (graph.size or 0) >= USUAL_SIZE else level
        else:
            found[file] = graph
    listed = "; ".join(f"{file.name} {why}" for file, why in others.items())
    if not found:
        raise TeacherError(
            f"teacher {folder} has no recognition network among its .onnx files ({listed or 'there are none'}); name "
            "the file itself"
        )
    if len(found) > 1:
        names = ", ".join(f"{file.name} ({graph.width or 'open'} numbers)" for file, graph in found.items())
        raise TeacherError(
            f"teacher {folder} has {len(found)} recognition networks: {names}; name one, as --kd-teacher "
            f"{next(iter(found))}"
        )
    ((file, graph),) = found.items()
    if others:
        logger.log(level, "teacher %s: %s is taken as the recognition network; %s", folder, file.name, listed)
    return file, graph


def _is_pack(source: object) -> bool:
    return isinstance(source, str) and source.startswith(_PACK) and not os.path.exists(source)


def _pack_folder(name: str) -> Path:
    """The folder of a pack under ``~/.insightface/models``; the insightface package downloads it when it is missing."""
    if not _PACK_NAME.fullmatch(name) or ".." in name:
        raise TeacherError(f"teacher {_PACK}{name}: wanted the name of a pack, such as insightface:buffalo_l")
    folder = Path("~/.insightface/models").expanduser() / name
    if folder.is_dir() and _files(folder):
        return folder
    from insightface.utils import storage

    logger.warning("%s is not there: insightface downloads %s", folder, storage.BASE_REPO_URL + f"/{name}.zip")
    try:
        # A folder without networks is what an interrupted download leaves behind.
        storage.download("models", name, force=True)
    # requests, urllib3, zipfile and insightface each raise their own.
    except Exception as error:
        raise TeacherError(
            f"teacher {_PACK}{name} is not in {folder.parent} and cannot be downloaded: {first_line(error)}"
        ) from error
    return folder


def _input_of(graph: OnnxGraph, size: int | str | None) -> tuple[Preprocessing, list[str]]:
    """How a graph wants its images, and what it does to them itself, in words."""
    usual = Preprocessing(size=graph.size or int(size or Preprocessing().size))
    normalisation = find_normalisation(graph, usual.size)
    if normalisation is None:
        return usual, []
    return normalisation.preprocessing(usual.size), [f"normalises inside: {normalisation}"]


class OnnxSource:
    """ONNX files, folders of an InsightFace pack, and packs by name.

    Input is RGB as (x - 127.5) / 127.5, or what the graph wants where it normalises its input itself.
    """

    description: ClassVar[str] = "an ONNX file, an InsightFace pack's folder, or insightface:NAME"

    @staticmethod
    def accepts(source: object) -> bool:
        """Whether this is an ONNX file by its content (or by its name, where the content says nothing) or a pack."""
        if _is_pack(source):
            return True
        path = local_path(source)
        if path is None:
            return False
        if path.is_dir():
            # arcface_torch can leave an ONNX file beside the model.pt that it was made from.
            return bool(_files(path)) and not is_run_folder(path)
        kind = signature(path)
        return kind == "onnx" or (kind is None and path.is_file() and path.suffix.lower() == ".onnx")

    @staticmethod
    def load(source: str | os.PathLike[str], options: TeacherOptions) -> Teacher:
        """Load the graph, free its batch size, flush its denormal weights.

        Args:
            source: a file, a folder, or ``insightface:NAME``, which may download.
            options: ``network`` and ``precision`` other than ``fp32`` have no meaning here.

        Raises:
            TeacherError: damaged, hostile, or no recognition network.
            ConfigError: an option without meaning.
        """
        options.refuse("network", "an ONNX file holds its own network")
        if options.precision != "fp32":
            options.refuse("precision", "onnxruntime computes in the precision of the file")
        path = _pack_folder(str(source)[len(_PACK) :]) if _is_pack(source) else local_path(source)
        assert path is not None
        known, graph = None, None
        if path.is_dir():
            found = _from_manifest(path)
            path, known = found if found is not None else (path, None)
        if path.is_dir():
            path, graph = _recognition_network(path, options.output)
        graph = graph or read_graph(path, options.output)
        notes = [] if graph.choice is None else [graph.choice]
        if known is None:
            known, note = _input_of(graph, options.size)
            notes += note
        preprocessing = options.preprocessing(known)
        if graph.size not in (None, preprocessing.size):
            raise TeacherError(
                f"teacher {path} takes {graph.size}x{graph.size} images, not teacher.size={options.size}"
            )
        try:
            network = any_batch(graph, preprocessing)
        except TeacherError as error:
            raise TeacherError(f"teacher {path}: {error}") from error
        return Teacher(
            network,
            preprocessing=preprocessing,
            description=f"ONNX {path}{' (' + '; '.join(notes) + ')' if notes else ''}",
            weights=graph.digest,
            precision=options.precision,
            embedding_size=options.embedding_size,
            parameter_count=graph.parameter_count,
        )
