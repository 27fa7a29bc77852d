"""Model packs: what insightface 2 and older ones make of them, and what no pack is made of."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from arcface_kd.backbones import FaceBackbone
from arcface_kd.cli.main import main
from arcface_kd.data.formats.face_alignment import TEMPLATE
from arcface_kd.errors import ConfigError
from arcface_kd.export.pack import export_pack
from arcface_kd.teachers.base import load_teacher
from tests.export.students import CPU, D, cosines, embeddings_of


def write_detector(path: Path, landmarks: np.ndarray) -> None:
    """A detector as insightface knows them by nine outputs, that finds one face in every picture of 128 x 128."""
    cell = np.array([64.0, 64.0])
    values, outputs = [], []
    for width in (1, 4, 10):
        for stride in (8, 16, 32):
            rows = np.zeros((2 * (128 // stride) ** 2, width), np.float32)
            if stride == 8:
                found = {1: [0.9], 4: [5, 5, 5, 5], 10: ((landmarks - cell) / stride).ravel()}
                rows[2 * (8 * 16 + 8)] = found[width]
            name = f"out_{width}_{stride}"
            values.append(helper.make_node("Constant", [], [name], value=numpy_helper.from_array(rows)))
            outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, rows.shape))
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, 128, 128])
    model = helper.make_model(
        helper.make_graph(values, "detector", [image], outputs), opset_imports=[helper.make_opsetid("", 17)]
    )
    model.ir_version = 8
    onnx.save(model, path)


@pytest.mark.filterwarnings("ignore:`estimate` is deprecated:FutureWarning")
@pytest.mark.parametrize("manifest", [True, False], ids=["as insightface 2 loads it", "as older ones do"])
def test_a_pack_of_insightface(
    run: Path, tmp_path: Path, converted: None, student: FaceBackbone, faces: np.ndarray, manifest: bool
) -> None:
    from insightface.app import FaceAnalysis
    from insightface.model_zoo import get_model

    pack = tmp_path / "models" / "own_pack"
    pack.parent.mkdir()
    write_detector(tmp_path / "det.onnx", TEMPLATE + 8)
    assert main(["export", str(run), str(pack), "--pack", str(tmp_path / "det.onnx")]) == 0
    assert {path.name for path in pack.iterdir()} == {"detection.onnx", "recognition.onnx", "manifest.json"}
    assert {path.name for path in pack.parent.iterdir()} == {"own_pack"}
    if manifest:
        assert get_model(str(pack), model_task="recognition", providers=CPU).input_size == (112, 112)
        assert load_teacher(pack).embedding_size == D
    else:
        (pack / "manifest.json").unlink()
    app = FaceAnalysis(name="own_pack", root=str(tmp_path), providers=CPU)
    assert set(app.models) == {"detection", "recognition"}
    app.prepare(ctx_id=-1, det_size=(128, 128))
    expected = embeddings_of(student, faces[:3])
    for face, embedding in zip(faces[:3], expected, strict=True):
        picture = np.full((128, 128, 3), 90, np.uint8)
        picture[8:120, 8:120] = face[..., ::-1]
        (found,) = app.get(picture)
        np.testing.assert_allclose(found.kps, TEMPLATE + 8, atol=1e-3)
        assert cosines(found.embedding[None], embedding[None]).min() > 0.9999


def test_a_pack_that_was_changed_is_refused_by_its_manifest(
    run: Path, tmp_path: Path, converted: None, content: bytes
) -> None:
    from insightface.app import FaceAnalysis

    write_detector(tmp_path / "det.onnx", TEMPLATE + 8)
    export_pack(run, tmp_path / "pack", tmp_path / "det.onnx")
    (tmp_path / "pack" / "recognition.onnx").write_bytes(content + b" ")
    with pytest.raises(RuntimeError, match="SHA-256"):
        FaceAnalysis(name=str(tmp_path / "pack"), providers=CPU)


@pytest.mark.parametrize(
    ("folder", "detector", "named"),
    [
        ("pack", "none.onnx", "none.onnx"),
        ("pack", "student.onnx", "no face detector"),
        ("pack", "text.onnx", "cannot load"),
        ("there", "det.onnx", "there already"),
        ("a pack", "det.onnx", "a pack"),
        ("none/pack", "det.onnx", "no folder"),
    ],
)
def test_no_pack_is_made_of_what_is_none(
    run: Path, tmp_path: Path, converted: None, content: bytes, folder: str, detector: str, named: str
) -> None:
    (tmp_path / "there").mkdir()
    write_detector(tmp_path / "det.onnx", TEMPLATE + 8)
    (tmp_path / "student.onnx").write_bytes(content)
    (tmp_path / "text.onnx").write_text("text")
    before = set(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=named):
        export_pack(run, tmp_path / folder, tmp_path / detector)
    assert set(tmp_path.rglob("*")) == before
