"""Exported students: what insightface makes of them, alone and in a pack; files that are not the student."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from arcface_kd.backbones import FaceBackbone
from arcface_kd.cli.main import main
from arcface_kd.data.dataset import RecordDataset, View, open_dataset
from arcface_kd.errors import ArcfaceKDError, ConfigError, DataError
from arcface_kd.export import onnx as onnx_export
from arcface_kd.export.onnx import export, to_onnx
from arcface_kd.teachers.base import load_teacher
from arcface_kd.teachers.checkpoint import load_network
from tests.data.record_sets import encoded
from tests.export.students import CPU, D, cosines, embeddings_of, network_input, run_of, trained
from tests.host.trainer.faces import draw_faces


def test_the_graph_is_what_was_promised(file: Path) -> None:
    model = onnx.load(file)
    onnx.checker.check_model(model, full_check=True)
    (opset,) = model.opset_import
    assert (opset.domain, opset.version >= 17) == ("", True)
    (source,), (target,) = model.graph.input, model.graph.output
    shapes = [[d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim] for value in (source, target)]
    assert shapes == [["batch", 3, 112, 112], ["batch", D]]
    assert {value.type.tensor_type.elem_type for value in (source, target)} == {TensorProto.FLOAT}
    assert {tensor.data_type for tensor in model.graph.initializer} <= {TensorProto.FLOAT, TensorProto.INT64}
    kinds = [node.op_type for node in model.graph.node]
    # 21 convolutions and 31 batch norms: left are the 8 before a padded convolution, and the one before flattening.
    assert (kinds.count("Conv"), kinds.count("Gemm"), kinds.count("BatchNormalization")) == (21, 1, 9)
    assert {entry.key for entry in model.metadata_props} == {"network", "weights", "input"}


def test_nothing_of_this_machine_is_in_the_file(content: bytes) -> None:
    for word in (b"/work", b"site-packages", b".py", b"arcface_kd.backbones", str(Path.home()).encode() + b"/"):
        assert word not in content


def test_any_batch_embeds_as_the_student_does(content: bytes, student: FaceBackbone, faces: np.ndarray) -> None:
    session = onnxruntime.InferenceSession(content, providers=CPU)
    for count in (1, 2, 12):
        (met,) = session.run(None, {"data": network_input(faces[:count]).numpy()})
        np.testing.assert_allclose(met, embeddings_of(student, faces[:count]), rtol=1e-3, atol=1e-4)


def test_insightface_loads_it_and_prepares_faces_for_it(file: Path, student: FaceBackbone, faces: np.ndarray) -> None:
    from insightface.model_zoo import get_model
    from insightface.model_zoo.arcface_onnx import ArcFaceONNX

    model = get_model(str(file), providers=CPU)
    assert isinstance(model, ArcFaceONNX)
    assert (model.taskname, model.input_mean, model.input_std) == ("recognition", 127.5, 127.5)
    assert (model.input_size, model.output_shape) == ((112, 112), ["batch", D])
    images = [np.ascontiguousarray(face[..., ::-1]) for face in faces]
    expected = embeddings_of(student, faces)
    assert cosines(model.get_feat(images), expected).min() > 0.999999
    assert cosines(model.get_feat(images[3]), expected[3:4]).min() > 0.999999
    assert cosines(model.get_feat(images), expected[::-1]).max() < 0.999


def test_it_is_a_teacher(file: Path, student: FaceBackbone, faces: np.ndarray) -> None:
    teacher = load_teacher(file)
    assert teacher.embedding_size == D
    np.testing.assert_allclose(teacher(network_input(faces)), embeddings_of(student, faces), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_another_student(tmp_path: Path, faces: np.ndarray) -> None:
    run = run_of(tmp_path / "run", trained("mbf", faces))
    report = export(run, tmp_path / "mbf.onnx")
    assert (report.network, report.embedding_size, report.precision) == ("mbf", D, "float32")
    assert report.least_cosine > 0.9999
    assert report.size == (tmp_path / "mbf.onnx").stat().st_size


def test_a_checkpoint_says_the_same_as_its_run(run: Path, tmp_path: Path, converted: None) -> None:
    report = export(run / "model.pt", tmp_path / "a.onnx")
    assert str(report) == (
        f"{tmp_path / 'a.onnx'}: thin_r18, 32 dimensions, float32, {report.size / 1e6:.1f} MB; on 16 faces a cosine of "
        f"{report.mean_cosine:.6f} with the student, at least {report.least_cosine:.6f}"
    )


def test_int8(run: Path, records: Path, content: bytes, converted: None, capsys: pytest.CaptureFixture[str]) -> None:
    out = run.parent / "int8.onnx"
    assert main(["export", str(run), str(out), "--int8", "--calibration", str(records), "--images", "30"]) == 0
    assert "int8" in capsys.readouterr().out
    assert out.stat().st_size < 0.35 * len(content)
    kinds = {tensor.data_type for tensor in onnx.load(out).graph.initializer if len(tensor.dims) == 4}
    assert TensorProto.INT8 in kinds
    quantized = onnxruntime.InferenceSession(out, providers=CPU)
    whole = onnxruntime.InferenceSession(content, providers=CPU)
    pixels = np.stack([RecordDataset(records).pixels(View(n, True))[1] for n in range(20)])
    images = network_input(pixels).numpy()
    (met,), (expected,) = quantized.run(None, {"data": images}), whole.run(None, {"data": images})
    assert cosines(met, expected).mean() > 0.99


def test_faces_to_quantise_with_are_not_those_of_the_check(records: Path) -> None:
    for folder, wanted, counts in ((records, 10, (10, 50)), (records, 0, (0, 60)), (records, 256, (30, 30))):
        shown, checked = onnx_export._faces(folder, wanted)
        assert (len(shown), len(checked)) == counts
        assert not {face.tobytes() for face in shown} & {face.tobytes() for face in checked}
    assert onnx_export._faces(None, 0)[1].shape == (16, 112, 112, 3)


@pytest.mark.parametrize("there_before", [False, True])
def test_a_file_that_is_not_the_student_is_not_written(
    run: Path, tmp_path: Path, faces: np.ndarray, converted: None, there_before: bool
) -> None:
    """Weights of a run that went on since: the exported file no longer fits."""
    other = run_of(tmp_path / "other", trained("thin_r18", faces, seed=1))
    out = tmp_path / "out.onnx"
    if there_before:
        out.write_bytes(b"yesterday's")
    with pytest.raises(ArcfaceKDError, match=r"was not written: in float32 .* least cosine .* 0.9999"):
        export(other, out)
    assert out.read_bytes() == b"yesterday's" if there_before else not out.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"other", *(["out.onnx"] if there_before else [])}


def damaged(content: bytes, noise: float = 0.05) -> bytes:
    model = onnx.load_model_from_string(content)
    (matrix,) = (t for t in model.graph.initializer if len(t.dims) == 2)
    values = numpy_helper.to_array(matrix)
    values = values + np.float32(noise) * np.random.default_rng(0).normal(size=values.shape).astype(np.float32)
    matrix.CopyFrom(numpy_helper.from_array(values, matrix.name))
    return bytes(model.SerializeToString())


def test_int8_that_lost_too_much_is_not_written(
    run: Path, records: Path, tmp_path: Path, converted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("arcface_kd.export.int8.quantize", lambda content, faces, leading, ranges: damaged(content))
    with pytest.raises(ArcfaceKDError, match=r"in int8 .* mean cosine .* wanted more than 0.99; calibrate with more"):
        export(run, tmp_path / "out.onnx", int8=True, calibration=records)
    assert not any(tmp_path.iterdir())


def test_first_convolutions_stay_in_float_where_int8_loses_too_much(
    run: Path, records: Path, tmp_path: Path, content: bytes, converted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []

    def quantize(given: bytes, faces: np.ndarray, *, leading: float, ranges: object) -> bytes:
        asked.append(leading)
        return given if leading >= 0.5 else damaged(given)

    monkeypatch.setattr("arcface_kd.export.int8.quantize", quantize)
    report = export(run, tmp_path / "out.onnx", int8=True, calibration=records)
    assert asked == [0.0, 0.25, 0.5]
    assert "int8 behind the first 50% of its convolutions" in str(report)
    assert report.out.read_bytes() == content


def two_outputs(content: bytes) -> bytes:
    model = onnx.load_model_from_string(content)
    model.graph.output.add().CopyFrom(helper.make_tensor_value_info(model.graph.node[0].output[0], 1, None))
    return bytes(model.SerializeToString())


def of_96_pixels(content: bytes) -> bytes:
    model = onnx.load_model_from_string(content)
    for axis in (2, 3):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_value = 96
    del model.graph.value_info[:]
    return bytes(model.SerializeToString())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda content: damaged(content, np.nan), "cosine of nan"),
        (two_outputs, "insightface cannot embed faces"),
        (of_96_pixels, "takes it for a Attribute"),
        (lambda content: content[:1000], "insightface cannot embed faces"),
    ],
)
def test_what_insightface_cannot_use_is_not_written(
    run: Path, tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch, change: Any, named: str
) -> None:
    monkeypatch.setattr(onnx_export, "to_onnx", lambda student: change(content))
    with pytest.raises(ArcfaceKDError, match=named):
        export(run, tmp_path / "out.onnx")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["{run}", "{out}/student.pb"], ["student.pb", "name it student.onnx"]),
        (["{run}", "{out}/none/student.onnx"], ["there is no folder"]),
        (["{run}", "{out}/a.onnx", "--int8"], ["--calibration DIR"]),
        (["{run}", "{out}/a.onnx", "--int8", "--calibration", "{out}/none"], ["no folder", "none"]),
        (["{run}", "{out}/a.onnx", "--int8", "--calibration", "{records}", "--images", "0"], ["images is 0"]),
        (["{out}", "{out}/a.onnx"], ["wanted a file"]),
        (["{out}/none", "{out}/a.onnx"], ["none"]),
        (["{damaged}", "{out}/a.onnx"], ["model.pt"]),
        (["{run}", "{out}/a.onnx", "--int8", "--calibration", "{one}"], ["has 1 faces; wanted 2"]),
    ],
)
def test_refusals_end_in_one_line(
    run: Path,
    records: Path,
    tmp_path_factory: pytest.TempPathFactory,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    named: list[str],
) -> None:
    places = {"run": run, "out": tmp_path, "records": records}
    places |= {name: tmp_path_factory.mktemp(name) for name in ("damaged", "one")}
    (places["damaged"] / "model.pt").write_bytes(b"nothing")
    draw_faces(places["one"], identities=1, images=1)
    assert main(["export", *[word.format(**places) for word in words]]) == 2
    error = capsys.readouterr().err
    assert error.startswith("arcface-kd: ")
    assert error.count("\n") == 1
    for word in named:
        assert word in error
    assert not any(tmp_path.iterdir())


def test_without_the_exporter_s_package(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(ConfigError, match="pip install onnxscript"):
        export(run, tmp_path / "out.onnx")


def test_an_exporter_that_fails_is_told_in_one_line(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **keywords: object) -> None:
        raise TypeError("export() got an unexpected keyword\nargument 'dynamic_shapes'")

    monkeypatch.setattr("torch.onnx.export", fail)
    with pytest.raises(ConfigError, match=r"cannot export thin_r18: export\(\) got an unexpected keyword argument"):
        to_onnx(load_network(run))


@pytest.mark.real
@pytest.mark.slow
def test_real_faces(real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = RecordDataset(real_data / "faces_real")
    pixels = np.stack([records.pixels(View(number, False))[1] for number in range(0, 6000, 120)])
    run = run_of(tmp_path / "run", trained("thin_r18", pixels))
    converted = to_onnx(load_network(run))
    monkeypatch.setattr(onnx_export, "to_onnx", lambda student: converted)
    whole = export(run, tmp_path / "float32.onnx", calibration=real_data / "faces_real")
    assert (whole.faces, whole.least_cosine > 0.9999) == (64, True)
    small = export(run, tmp_path / "int8.onnx", int8=True, calibration=real_data / "faces_real", images=64)
    assert small.mean_cosine > 0.99
    assert small.size < 0.35 * whole.size


def test_a_data_set_of_checked_faces_alone_is_not_tuned_on(tmp_path: Path) -> None:
    """As where each photograph is there twice: the search for others would never end."""
    for name in ("1.png", "2.png"):
        (tmp_path / name).write_bytes(encoded(1, ".png"))
    checked = open_dataset(tmp_path).pixels(View(0, False))[1][None]
    with pytest.raises(DataError, match="--tune"):
        onnx_export._Tuning(nn.Identity(), tmp_path, checked, 1)._batch(0)


def test_int8_after_tuning_is_the_same_graph(
    run: Path, records: Path, content: bytes, converted: None, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["export", str(run), str(run.parent / "tuned.onnx"), "--int8", "--calibration", str(records)]
    assert main([*words, "--images", "24", "--tune", "6"]) == 0
    assert "int8 after 6 steps of tuning" in capsys.readouterr().out
    report = export(run, run.parent / "int8.onnx", int8=True, calibration=records, images=24)
    assert report.tuned == 0
    tuned, plain = (onnx.load(run.parent / f"{name}.onnx") for name in ("tuned", "int8"))
    assert [node.op_type for node in tuned.graph.node] == [node.op_type for node in plain.graph.node]
    assert {entry.key for entry in tuned.metadata_props} >= {"network", "weights", "input"}
    for steps, int8 in ((3, False), (-1, True)):
        with pytest.raises(ConfigError, match=f"tune is {steps}.*at least 0, with int8"):
            export(run, run.parent / "none.onnx", int8=int8, calibration=records, tune=steps)
