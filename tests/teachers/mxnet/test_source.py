import json
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from arcface_kd.data.formats.verification_bin import VerificationSet
from arcface_kd.errors import ConfigError, TeacherError
from arcface_kd.evaluation.verification import evaluate
from arcface_kd.teachers import Preprocessing, load_teacher
from tests.mxnet_oracle import silently
from tests.teachers.mxnet_files import face_arrays, params_bytes, write_checkpoint
from tests.teachers.onnx_models import pixels, student_view


@pytest.mark.parametrize("source", ["model", "model-symbol.json", "model-0000.params", "model,0", ""])
def test_either_file_their_folder_the_prefix_or_prefix_and_epoch_name_a_checkpoint(tmp_path: Path, source: str) -> None:
    write_checkpoint(tmp_path)
    teacher = load_teacher(str(tmp_path / source))
    assert teacher.preprocessing == Preprocessing("rgb", (0.0,) * 3, (1.0,) * 3, 112)
    assert teacher.embedding_size == 16
    assert teacher.parameter_count == sum(array.size for array in face_arrays().values())
    assert teacher.description == f"MXNet {tmp_path / 'model-0000.params'}"


def test_pixel_values_reach_the_graph_as_they_are(tmp_path: Path) -> None:
    teacher = load_teacher(write_checkpoint(tmp_path))
    images = pixels()
    network = teacher.network
    expected = network(torch.from_numpy(images.astype(np.float32)))
    torch.testing.assert_close(teacher(student_view(images)), expected, rtol=1e-4, atol=1e-4)
    turned = load_teacher(tmp_path / "model", {"channels": "bgr"})
    torch.testing.assert_close(turned(student_view(images)), teacher(student_view(images[:, ::-1].copy())))


def test_the_epoch_given_is_taken_and_the_last_one_otherwise(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    for epoch in (3, 12):
        write_checkpoint(tmp_path, arrays=face_arrays(seed=epoch), epoch=epoch)
    by_source = {
        source: load_teacher(str(tmp_path / source)).fingerprint
        for source in ("model,0", "model-0003.params", "model,3", "model", "model-symbol.json", "model,12")
    }
    assert by_source["model"] == by_source["model-symbol.json"] == by_source["model,12"]
    assert by_source["model,3"] == by_source["model-0003.params"]
    assert len(set(by_source.values())) == 3


def test_a_checkpoint_with_a_similar_name_is_another_one(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, prefix="y1")
    write_checkpoint(tmp_path, prefix="y1-large", epoch=9)
    assert load_teacher(tmp_path / "y1").description == f"MXNet {tmp_path / 'y1-0000.params'}"
    assert load_teacher(tmp_path / "y1-large").description == f"MXNet {tmp_path / 'y1-large-0009.params'}"


@pytest.mark.parametrize("missing", ["model-symbol.json", "model-0000.params"])
@pytest.mark.parametrize("source", ["model", "model-symbol.json", "model-0000.params"])
def test_half_a_checkpoint_names_the_missing_file(tmp_path: Path, missing: str, source: str) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(TeacherError, match=rf"{re.escape(missing)}: no such file"):
        load_teacher(str(tmp_path / source))


def test_arrays_under_another_name_ask_for_their_symbol(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(params_bytes(face_arrays()))
    with pytest.raises(TeacherError, match=r"weights\.bin .* wanted NAME-0000\.params"):
        load_teacher(path)


def test_a_stray_json_file_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"nodes": []}))
    with pytest.raises(TeacherError, match="is a JSON file, which no teacher source takes"):
        load_teacher(tmp_path / "config.json")


def test_options(tmp_path: Path) -> None:
    prefix = write_checkpoint(tmp_path)
    with pytest.raises(ConfigError, match=r"teacher\.network"):
        load_teacher(prefix, {"network": "r50"})
    with pytest.raises(TeacherError, match=r"'pre_fc1' \(FullyConnected\) cannot take"):
        load_teacher(prefix, {"size": "224"})
    half = load_teacher(prefix, {"precision": "bf16", "mean": "0", "std": "1"})
    images = student_view(pixels())
    full = load_teacher(prefix)(images)
    assert not torch.equal(half(images), full)
    assert torch.nn.functional.cosine_similarity(half(images), full).min() > 0.99


def test_damaged_files_end_in_one_line(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    params = tmp_path / "model-0000.params"
    whole = params.read_bytes()
    params.write_bytes(whole[:-3])
    with pytest.raises(TeacherError, match="cut short"):
        load_teacher(params)
    params.write_bytes(whole)
    (tmp_path / "model-symbol.json").write_text('{"nodes": [')
    with pytest.raises(TeacherError, match="damaged or no MXNet symbol"):
        load_teacher(params)


@pytest.mark.real
def test_y1_equals_mxnet(real_data: Path, mxnet: ModuleType) -> None:
    prefix = real_data / "teachers" / "y1"

    @silently
    def expected() -> np.ndarray:
        symbols, arguments, states = mxnet.model.load_checkpoint(str(prefix), 0)
        data = mxnet.nd.array(pixels(4).astype(np.float32))
        symbols = symbols.get_internals()["fc1_output"]
        executor = symbols.bind(mxnet.cpu(), {**arguments, "data": data}, aux_states=states, grad_req="null")
        return np.asarray(executor.forward(is_train=False)[0].asnumpy())

    answer = load_teacher(prefix)(student_view(pixels(4))).numpy()
    assert answer.shape == (4, 128)
    np.testing.assert_allclose(answer, expected(), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.real
def test_y1_reaches_99_percent(real_data: Path, some_pairs: VerificationSet) -> None:
    teacher = load_teacher(real_data / "teachers" / "y1", {"embedding_size": 128})
    assert evaluate(teacher, some_pairs, batch_size=64).accuracy >= 0.99
