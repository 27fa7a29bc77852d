"""``arcface-kd export``: a trained student as an ONNX file that ``insightface.model_zoo.get_model`` loads as it is.

insightface tells what a file is by its shapes (one square input of 112 pixels or more, fewer than five outputs: a
recognition network) and feeds it RGB as (x - 127.5) / 127.5, unless it finds a subtraction and a multiplication among
the first nodes. The students here take just that, so that nothing is put in front of them. No file is written before
insightface itself has loaded it and embedded faces with it as the student does.
"""

import os
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from arcface_kd.data.dataset import View, open_dataset
from arcface_kd.errors import ArcfaceKDError, ConfigError, DataError, first_line
from arcface_kd.evaluation.embedding import embed, normalize
from arcface_kd.system.console import errors_only
from arcface_kd.system.device import default_device
from arcface_kd.system.files import atomic_write, require_folder_of
from arcface_kd.teachers.checkpoint import NetworkCheckpoint, load_network
from arcface_kd.teachers.options import Preprocessing

Precision = Literal["float32", "int8"]

# The first that torch's exporter writes; 17 would be reached by a conversion that it warns of.
OPSET = 18
# The oldest format that has this operator set, for the sake of those who run an onnxruntime of 2023.
_IR_VERSION = 8
_INPUT, _OUTPUT = "data", "embedding"
LEAST_COSINE: dict[Precision, float] = {"float32": 0.9999, "int8": 0.99}
# A network that loses too much in 8 bits gets so many of its first convolutions back in float32, until the faces that
# it is quantised with have this cosine: other faces have a little less.
_LEADING_SHARES = (0.0, 0.25, 0.5, 0.75)
_COMFORTABLE = 0.992
_CHECKED = 64
_BATCH = 16
_TUNED_BATCH = 32
# Faces that are drawn for each one of a batch at most: those that the file is checked with are passed over.
_MOST_DRAWN = 100


@dataclass(frozen=True)
class ExportReport:
    """Result of an export."""

    out: Path  # the file
    network: str  # the student's name among ``arcface_kd.backbones.NETWORKS``
    embedding_size: int  # D
    precision: Precision  # ``float32`` or ``int8``
    leading: float  # share of the convolutions, from the input on, that stayed in float32 in an int8 file
    tuned: int  # steps that it was fine-tuned for 8 bits
    size: int  # of the file in bytes
    faces: int  # how many were embedded by both
    mean_cosine: float  # of the file's embedding and the student's, over the faces
    least_cosine: float  # the smallest of them

    def __str__(self) -> str:
        behind = f" behind the first {self.leading:.0%} of its convolutions" if self.leading else ""
        behind += f" after {self.tuned} steps of tuning" if self.tuned else ""
        return (
            f"{self.out}: {self.network}, {self.embedding_size} dimensions, {self.precision}{behind}, "
            f"{self.size / 1e6:.1f} MB; on {self.faces} faces a cosine of {self.mean_cosine:.6f} with the student, "
            f"at least {self.least_cosine:.6f}"
        )


def export(
    run: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    network: str | None = None,
    int8: bool = False,
    calibration: str | os.PathLike[str] | None = None,
    images: int = 256,
    tune: int = 0,
) -> ExportReport:
    """Write a student as an ONNX file, and prove that insightface embeds faces with it as the student does.

    Args:
        run: a run's output folder, or a checkpoint of one of ``arcface_kd.backbones.NETWORKS``.
        out: the file, ending in ``.onnx``, as insightface wants it.
        network: the student's name, where its tensors do not tell.
        int8: quantise it with faces of ``calibration``.
        calibration: records or a folder of identities; the check takes its faces too, others than those of the
            quantisation where there are enough. Drawn faces check a file in float32 when None.
        images: how many faces the quantisation takes at most, at least 1.
        tune: steps of 32 faces of ``calibration`` that an int8 network is fine-tuned for, towards the student's own
            embeddings; 0 rounds it as it is.

    Returns:
        What was written.

    Raises:
        ConfigError: a file name or a number that cannot be, int8 without faces, or a missing package.
        TeacherError: a checkpoint that cannot be read.
        DataError: faces that cannot be read.
        ArcfaceKDError: the file embeds faces otherwise than the student, so it was not written.
    """
    target = Path(out)
    if target.suffix != ".onnx":
        raise ConfigError(f"{target}: insightface loads files that end in .onnx only; name it {target.stem}.onnx")
    require_folder_of(target)
    if images < 1:
        raise ConfigError(f"images is {images}; it must be at least 1")
    if int8 and calibration is None:
        raise ConfigError("int8 takes its scales from faces; give records with --calibration DIR")
    if tune < 0 or (tune and not int8):
        raise ConfigError(f"tune is {tune}; wanted a number of steps, at least 0, with int8")
    student = load_network(run, network)
    if student.author is None or student.author.shown != Preprocessing():
        raise ConfigError(
            f"{run}: a student takes RGB as (x - 127.5) / 127.5, and this {student.name} may want another "
            "order or scale; only what a run trained can be exported"
        )
    shown, checked = _faces(calibration, images if int8 else 0)
    content = to_onnx(student)
    leading = 0.0
    if int8:
        tuning = _Tuning(student.network, Path(str(calibration)), checked, tune) if tune else None
        content, leading = _quantized(content, student.network, shown, tuning)
    cosines = _cosines(content, student.network, checked)
    report = ExportReport(
        out=target,
        network=student.name,
        embedding_size=student.num_features,
        precision="int8" if int8 else "float32",
        leading=leading,
        tuned=tune,
        size=len(content),
        faces=len(checked),
        mean_cosine=float(cosines.mean()),
        least_cosine=float(cosines.min()),
    )
    _insist(report, int8=int8)
    with atomic_write(target) as stream:
        stream.write(content)
    return report


def to_onnx(student: NetworkCheckpoint) -> bytes:
    """Convert a student by torch's own exporter, any batch size, with batch norms folded where that is exact.

    ``data`` (batch, 3, 112, 112) float32 to ``embedding`` (batch, D).
    """
    import onnx

    try:
        import onnxscript  # noqa: F401
    except ImportError:
        raise ConfigError("torch's ONNX exporter needs onnxscript: pip install onnxscript") from None
    try:
        # Without the exporter's words about packages that it does not need and about its own future.
        with errors_only("torch.onnx"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program: Any = torch.onnx.export(
                student.network.eval(),
                (torch.zeros(2, 3, 112, 112),),
                dynamo=True,
                opset_version=OPSET,
                input_names=[_INPUT],
                output_names=[_OUTPUT],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                verbose=False,
            )
    # It raises errors of its own, of torch.export and of onnxscript; an older one does not know its arguments.
    except Exception as error:
        raise ConfigError(
            f"torch {torch.__version__} cannot export {student.name}: {first_line(error)}; the exporter that this was "
            "tried with is that of torch 2.13"
        ) from error
    model = program.model_proto
    # What it noted while tracing: lines of code, with paths of this machine.
    for part in (
        model,
        model.graph,
        *model.graph.node,
        *model.graph.input,
        *model.graph.output,
        *model.graph.value_info,
    ):
        del part.metadata_props[:]
        part.doc_string = ""
    del model.functions[:]
    model.ir_version = _IR_VERSION
    model.producer_name, model.producer_version = "arcface_kd", metadata.version("arcface_kd")
    for key, value in (("network", student.name), ("weights", student.digest), ("input", "RGB, (x - 127.5) / 127.5")):
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())


def _faces(folder: str | os.PathLike[str] | None, shown: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Faces to quantise with and faces to check with, both uint8 (N, 112, 112, 3), RGB."""
    if folder is None:
        from arcface_kd.data.synthetic_faces import SyntheticFaces

        drawn = SyntheticFaces(0)
        faces = [drawn.image(number, 0) for number in range(_CHECKED // 4)]
        return np.empty((0, *faces[0].shape), dtype=np.uint8), np.stack(faces)
    dataset = open_dataset(Path(folder))
    if len(dataset) < 2:
        raise DataError(f"{folder} has {len(dataset)} faces; wanted 2 at least, to show and to check")
    # Evenly over the identities, which lie one behind the other.
    chosen = np.unique(np.linspace(0, len(dataset) - 1, shown + _CHECKED).round().astype(int))
    count = min(_CHECKED, max(len(chosen) - shown, len(chosen) // 2))
    checked = chosen[np.unique(np.linspace(0, len(chosen) - 1, count).round().astype(int))]
    others = np.setdiff1d(chosen, checked)[:shown]

    def pixels(numbers: NDArray[np.int64]) -> NDArray[Any]:
        rows = [dataset.pixels(View(int(number), False))[1] for number in numbers]
        return np.stack(rows) if rows else np.empty((0, 112, 112, 3), dtype=np.uint8)

    return pixels(others), pixels(checked)


class _Tuning:
    """Fine-tuning on the faces of a data set but those that the file is checked with."""

    def __init__(self, student: nn.Module, folder: Path, checked: NDArray[Any], steps: int) -> None:
        self.student, self.steps, self._folder = student, steps, folder
        self._dataset = open_dataset(folder)
        self._checked = {face.tobytes() for face in checked}

    def __call__(
        self, content: bytes, shown: NDArray[Any], leading: float
    ) -> tuple[bytes, Mapping[str, tuple[float, float]]]:
        from arcface_kd.export.fake_quantization import tune

        teacher = self.student.to(default_device())
        try:
            return tune(content, shown, self._batch, teacher, leading=leading, steps=self.steps)
        finally:
            self.student.cpu()

    def _batch(self, step: int) -> NDArray[Any]:
        random = np.random.default_rng(step)
        faces: list[NDArray[Any]] = []
        for _ in range(_TUNED_BATCH * _MOST_DRAWN):
            face = self._dataset.pixels(View(int(random.integers(len(self._dataset))), False))[1]
            if face.tobytes() not in self._checked:
                faces.append(face[:, ::-1] if random.integers(2) else face)
            if len(faces) == _TUNED_BATCH:
                return _prepared(np.stack(faces))
        raise DataError(
            f"{self._folder} has next to no face but those that the file is checked with, some of them several times: "
            "give more faces, or leave --tune out"
        )


def _quantized(content: bytes, student: nn.Module, faces: NDArray[Any], tuning: _Tuning | None) -> tuple[bytes, float]:
    """The file in 8 bits, as many of its convolutions as the faces allow, and the share that stayed in float32."""
    from arcface_kd.export.int8 import quantize

    shown = _prepared(faces)
    quantized, leading = content, 0.0
    for leading in _LEADING_SHARES:
        network, ranges = (content, None) if tuning is None else tuning(content, shown, leading)
        quantized = quantize(network, shown, leading=leading, ranges=ranges)
        if _cosines(quantized, student, faces[:_CHECKED]).mean() > _COMFORTABLE:
            break
    return quantized, leading


def _prepared(faces: NDArray[Any]) -> NDArray[Any]:
    """What the network takes: float32 (N, 3, 112, 112)."""
    return (np.ascontiguousarray(faces.transpose(0, 3, 1, 2), dtype=np.float32) - 127.5) / 127.5


def _cosines(content: bytes, student: nn.Module, faces: NDArray[Any]) -> NDArray[Any]:
    """The cosine of each face's two embeddings: the student's by torch, the file's by insightface."""
    from insightface.model_zoo import get_model
    from insightface.model_zoo.arcface_onnx import ArcFaceONNX

    expected = embed(
        student, torch.from_numpy(faces.transpose(0, 3, 1, 2)), batch_size=_BATCH, flip=False, dtype=np.float64
    )
    with tempfile.TemporaryDirectory(prefix="arcface_kd_export_") as folder:
        file = Path(folder) / "student.onnx"
        file.write_bytes(content)
        try:
            loaded = get_model(str(file), providers=["CPUExecutionProvider"])
            if not isinstance(loaded, ArcFaceONNX):
                raise ArcfaceKDError(
                    f"insightface takes it for a {type(loaded).__name__}, not for a recognition network"
                )
            # One face, and batches of several sizes, as applications ask; its images are BGR.
            bgr = [np.ascontiguousarray(face[..., ::-1]) for face in faces]
            portions = [bgr[:1], *(bgr[at : at + _BATCH] for at in range(1, len(bgr), _BATCH))]
            met = np.concatenate([loaded.get_feat(portion) for portion in portions])
        except ArcfaceKDError:
            raise
        # onnxruntime's exceptions share no base class of their own.
        except Exception as error:
            raise ArcfaceKDError(
                f"insightface cannot embed faces with the exported file: {first_line(error)}"
            ) from error
    return cast("NDArray[Any]", np.einsum("ij,ij->i", expected, normalize(met)))


def _insist(report: ExportReport, *, int8: bool) -> None:
    """Raise if the export disagrees with the student.

    In float32 every face counts. In int8 the mean does: a face that is hardly one has an embedding that rounding turns
    far, and that nobody should trust in any precision.
    """
    met = report.mean_cosine if int8 else report.least_cosine
    # A NaN is not above anything.
    if not met > LEAST_COSINE[report.precision]:
        what = "mean" if int8 else "least"
        advice = (
            "calibrate with more faces (--images), of the kind that the application sees, or ship float32"
            if int8
            else "tell the developers of arcface_kd which torch and onnxruntime are installed"
        )
        raise ArcfaceKDError(
            f"{report.out} was not written: in {report.precision} its embeddings have a {what} cosine of {met:.6f} "
            f"with the student's on {report.faces} faces, wanted more than {LEAST_COSINE[report.precision]}; {advice}"
        )
