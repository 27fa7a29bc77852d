import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from arcface_kd.data.formats.verification_bin import VerificationSet
from arcface_kd.errors import ConfigError, TeacherError
from arcface_kd.evaluation.verification import evaluate
from arcface_kd.teachers import load_teacher
from arcface_kd.teachers.onnx.graph import read_graph
from arcface_kd.teachers.onnx.session import OnnxNetwork
from arcface_kd.teachers.onnx.source import OnnxSource
from arcface_kd.teachers.onnx.torch_module import TorchGraph
from arcface_kd.teachers.onnx.torch_operators import OPERATORS
from benchmarks.denormals import clear_denormals
from tests.teachers.onnx_models import (
    EMBEDDING_SIZE,
    embed_one_by_one,
    face_network,
    pixels,
    saved,
    student_view,
    weights,
)

NORMALISING = "[Sub_0] less = Sub (image, mean) [Mul_1] prepared = Mul (less, factor)"
CONSTANTS = {"mean": np.array(127.5, np.float32), "factor": np.array(1 / 127.5, np.float32)}


@pytest.mark.parametrize("before", ["", NORMALISING])
def test_embeddings_are_those_of_the_insightface_package(tmp_path: Path, before: str) -> None:
    from insightface.model_zoo import get_model

    more = CONSTANTS if before else {}
    path = saved(tmp_path, face_network(batch=None, tail="flatten", before=before, more=more))
    images = pixels()
    teacher = load_teacher(path)
    oracle = get_model(str(path), providers=["CPUExecutionProvider"])
    expected = oracle.get_feat([np.ascontiguousarray(image[::-1].transpose(1, 2, 0)) for image in images])
    np.testing.assert_allclose(teacher(student_view(images)).numpy(), expected, rtol=1e-3, atol=1e-4)
    assert teacher.embedding_size == EMBEDDING_SIZE
    assert teacher.parameter_count == sum(array.size for array in weights().values()) + len(more)


@pytest.mark.parametrize("kind", ["uint8", "float16", "double"])
def test_input_of_another_type_is_converted(tmp_path: Path, kind: str) -> None:
    before = f"wide = Cast <to = 1> (image) {NORMALISING.replace('image', 'wide')}"
    model = face_network(batch=None, tail="flatten", kind=kind, before=before, more=CONSTANTS)
    images = pixels(2)
    embeddings = load_teacher(saved(tmp_path, model), {"mean": 0, "std": 1})(student_view(images)).numpy()
    expected = embed_one_by_one(face_network(), images.astype(np.float32) / 127.5 - 1)
    np.testing.assert_allclose(embeddings, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (
            face_network(before="prepared = Cast <to = 1> (image)", kind="int64"),
            r"model\.onnx: the graph takes tensor\(int64\)",
        ),
        (face_network(outputs="float map2"), r"returns \(2, 16, 2, 2\)"),
        (
            face_network(
                arrays={**weights(), "matrix": np.zeros((64, 0), np.float32)}, outputs="float[1, 0] embedding"
            ),
            r"returns \(2, 0\)",
        ),
        (face_network(arrays={**weights(), "matrix": np.full((64, 16), np.nan, np.float32)}), "NaN or inf"),
    ],
    ids=["type", "map", "no numbers", "NaN"],
)
def test_what_cannot_be_a_teacher_is_refused(tmp_path: Path, model: Any, said: str) -> None:
    with pytest.raises(TeacherError, match=said):
        load_teacher(saved(tmp_path, model))


def test_options_that_an_onnx_file_cannot_honour_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, face_network())
    with pytest.raises(ConfigError, match=r"teacher\.network='r50' does not apply"):
        load_teacher(path, {"network": "r50"})
    with pytest.raises(TeacherError, match=r"size 112, not teacher\.size=96"):
        load_teacher(path, {"size": "96"})
    with pytest.raises(TeacherError, match="dimension 16, wanted 512"):
        load_teacher(path, {"embedding_size": "512"})
    assert load_teacher(path, {"precision": "fp32", "size": 112}).precision == "fp32"


def test_fingerprint_follows_the_file(tmp_path: Path) -> None:
    one = load_teacher(saved(tmp_path, face_network(), "one.onnx"))
    twin = load_teacher(saved(tmp_path, face_network(), "twin.onnx"))
    other = load_teacher(saved(tmp_path, face_network(arrays=weights(1)), "other.onnx"))
    assert one.fingerprint == twin.fingerprint
    assert one.fingerprint != other.fingerprint


@pytest.mark.parametrize("precision", [None, "fp16", "fp32"])
def test_beside_a_gpu_torch_runs_the_graph(
    precision: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    path, images = saved(tmp_path, face_network()), student_view(pixels(3))
    teacher = load_teacher(path, {"precision": precision} if precision else None)
    assert isinstance(teacher.network, TorchGraph)
    assert teacher.precision == (precision or "fp16")
    prepared = images.numpy()
    np.testing.assert_allclose(teacher(images), embed_one_by_one(face_network(), prepared), rtol=1e-3, atol=1e-3)
    on_cpu = load_teacher(path, device="cpu")
    assert on_cpu.precision == "fp32"


def test_what_torch_cannot_run_onnxruntime_does_and_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = saved(tmp_path, face_network(behind="embedding = Softsign (raw)"))
    with pytest.raises(ConfigError, match=r"teacher\.precision='bf16'.*Softsign"):
        load_teacher(path, {"precision": "bf16"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with caplog.at_level(logging.WARNING):
        teacher = load_teacher(path)
    assert isinstance(teacher.network, OnnxNetwork)
    assert teacher.precision == "fp32"
    assert "is run by onnxruntime and not by torch" in caplog.text
    assert "Softsign" in caplog.text


def test_a_module_that_embeds_otherwise_than_onnxruntime_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(OPERATORS, "PRelu", lambda call, x, slope: x)
    with caplog.at_level(logging.WARNING):
        teacher = load_teacher(saved(tmp_path, face_network()))
    assert isinstance(teacher.network, OnnxNetwork)
    assert "differ from onnxruntime's" in caplog.text


def test_a_narrow_precision_on_a_cpu(tmp_path: Path) -> None:
    path, images = saved(tmp_path, face_network()), student_view(pixels(3))
    narrow, full = load_teacher(path, {"precision": "bf16"}), load_teacher(path)
    assert (narrow.precision, full.precision) == ("bf16", "fp32")
    assert not torch.equal(narrow(images), full(images))
    assert torch.nn.functional.cosine_similarity(narrow(images), full(images)).min() > 0.999
    assert narrow.fingerprint != full.fingerprint


def test_a_file_is_taken_by_its_content_before_its_name(tmp_path: Path) -> None:
    assert OnnxSource.accepts(saved(tmp_path, face_network(), "teacher.bin"))
    (tmp_path / "checkpoint.onnx").write_bytes(b"PK\x03\x04")
    assert not OnnxSource.accepts(tmp_path / "checkpoint.onnx")
    (tmp_path / "unknown.onnx").write_bytes(b"?")
    assert OnnxSource.accepts(tmp_path / "unknown.onnx")
    assert not OnnxSource.accepts(tmp_path / "missing.onnx")


@pytest.mark.slow
@pytest.mark.real
def test_mobilefacenet_512_tells_real_faces_apart(real_data: Path, some_pairs: VerificationSet) -> None:
    options = {"channels": "bgr", "mean": "127", "std": "128"}
    teacher = load_teacher(real_data / "teachers" / "mobilefacenet_512.onnx", options)
    assert evaluate(teacher, some_pairs, batch_size=64).accuracy >= 0.98


@pytest.mark.real
def test_mobilefacenet_512_embeds_as_its_cleaned_twin(real_data: Path, tmp_path: Path) -> None:
    """The denormal weights that it comes with, which make it slow, are gone; nothing else is."""
    path = real_data / "teachers" / "mobilefacenet_512.onnx"
    model = onnx.load(str(path))
    assert clear_denormals(model) > 0
    assert clear_denormals(onnx.load_from_string(read_graph(path).model)) == 0
    teachers = [load_teacher(path), load_teacher(saved(tmp_path, model))]
    images = torch.rand(4, 3, 112, 112) * 2 - 1
    first, second = (teacher(images) for teacher in teachers)
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)
