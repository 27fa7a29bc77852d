import copy
import hashlib
import json
import logging
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto

from arcface_kd.data.formats.verification_bin import VerificationSet
from arcface_kd.errors import ConfigError, TeacherError
from arcface_kd.evaluation.verification import evaluate
from arcface_kd.teachers import Preprocessing, Teacher, load_teacher
from arcface_kd.teachers.onnx.graph import read_graph
from arcface_kd.teachers.onnx.session import OnnxNetwork, any_batch
from arcface_kd.teachers.onnx.source import OnnxSource
from arcface_kd.teachers.onnx.torch_module import TorchGraph
from arcface_kd.teachers.onnx.torch_operators import OPERATORS
from benchmarks.denormals import clear_denormals
from tests.teachers.onnx_models import EMBEDDING_SIZE, embed_one_by_one, face_network, other_network, weights


def saved(folder: Path, model: Any, name: str = "model.onnx") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_bytes(model.SerializeToString())
    return path


def pixels(count: int = 5) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (count, 3, 112, 112), dtype=np.uint8)


def student_view(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images.astype(np.float32) / 127.5 - 1)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home without packs, and without a network to get them from."""
    from insightface.utils import storage

    def no_network(*arguments: object, **keywords: object) -> None:
        raise RuntimeError("Failed downloading url\nno network in tests")

    monkeypatch.setattr(storage, "download", no_network)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.mark.parametrize("leading", [(), ("Sub_0", "Mul_1")])
def test_embeddings_are_those_of_the_insightface_package(tmp_path: Path, leading: tuple[str, ...]) -> None:
    from insightface.model_zoo import get_model

    path = saved(tmp_path, face_network(batch=None, tail="flatten", leading=leading))
    images = pixels()
    teacher = load_teacher(path)
    oracle = get_model(str(path), providers=["CPUExecutionProvider"])
    expected = oracle.get_feat([np.ascontiguousarray(image[::-1].transpose(1, 2, 0)) for image in images])
    np.testing.assert_allclose(teacher(student_view(images)).numpy(), expected, rtol=1e-3, atol=1e-4)
    assert teacher.embedding_size == EMBEDDING_SIZE
    assert teacher.parameter_count == sum(array.size for array in weights().values()) + (2 if leading else 0)


@pytest.mark.parametrize("tail", ["reshape", "constant_node", "flatten", "merged", "mixing"])
@pytest.mark.parametrize("batch", [None, 1, 3])
def test_every_image_is_embedded_as_if_it_were_alone(tmp_path: Path, tail: Any, batch: int | None) -> None:
    # An open batch with a Reshape that is baked to 1, as found in the wild, has no answer but one by one.
    if tail == "mixing" and batch == 3:
        pytest.skip("a graph that mixes the images of its batch embeds none of them alone")
    model = face_network(batch=batch, tail=tail)
    teacher = load_teacher(saved(tmp_path, model), {"channels": "bgr", "mean": "127", "std": "128"})
    images = pixels(5)
    prepared = (images[:, ::-1].astype(np.float32) - 127) / 128
    expected = embed_one_by_one(model, prepared)
    np.testing.assert_allclose(teacher(student_view(images)).numpy(), expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(teacher(student_view(images[:1])).numpy(), expected[:1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("tail", "freed"), [("reshape", True), ("flatten", True), ("merged", False), ("mixing", False)]
)
def test_a_batch_size_is_freed_only_where_that_is_proved(
    tmp_path: Path, tail: Any, freed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        network = any_batch(read_graph(saved(tmp_path, face_network(tail=tail))), Preprocessing())
    assert (network.graph.fixed_batch is None) is freed
    assert ("cannot be freed" in caplog.text) is not freed


def test_a_declared_batch_is_filled_up_and_the_filling_thrown_away(tmp_path: Path) -> None:
    network = any_batch(read_graph(saved(tmp_path, face_network(batch=3, tail="merged"))), Preprocessing())
    assert network.graph.fixed_batch == 3
    images = torch.randn(7, 3, 112, 112)
    everything = network(images)
    assert everything.shape == (7, EMBEDDING_SIZE)
    torch.testing.assert_close(network(images[6:]), everything[6:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("element", [TensorProto.UINT8, TensorProto.FLOAT16, TensorProto.DOUBLE])
def test_input_of_another_type_is_converted(tmp_path: Path, element: int) -> None:
    model = face_network(batch=None, tail="flatten", element=element, leading=("Sub_0", "Mul_1"))
    images = pixels(2)
    embeddings = load_teacher(saved(tmp_path, model), {"mean": 0, "std": 1})(student_view(images)).numpy()
    plain = face_network(batch=None, tail="flatten", leading=("Sub_0", "Mul_1"))
    expected = embed_one_by_one(plain, images.astype(np.float32))
    np.testing.assert_allclose(embeddings, expected, rtol=2e-3, atol=2e-3)


def test_input_that_is_no_image_type_is_refused(tmp_path: Path) -> None:
    model = face_network(element=TensorProto.INT64)
    with pytest.raises(TeacherError, match=r"model\.onnx: the graph takes tensor\(int64\)"):
        load_teacher(saved(tmp_path, model))


def test_output_that_is_no_embedding_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match=r"returns .* wanted"):
        load_teacher(saved(tmp_path, _without_last_nodes(face_network(batch=None), 2)))


def _without_last_nodes(model: Any, count: int) -> Any:
    del model.graph.node[-count:]
    model.graph.output[0].CopyFrom(model.graph.input[0])
    model.graph.output[0].name = "map2"
    del model.graph.output[0].type.tensor_type.shape.dim[:]
    return model


def test_a_graph_that_onnxruntime_cannot_run_ends_in_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = face_network()
    model.graph.node[1].op_type = "NoSuchOperator"
    with pytest.raises(TeacherError, match=r"model\.onnx: onnxruntime cannot run the graph") as caught:
        load_teacher(saved(tmp_path, model))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().out == ""


def test_embeddings_without_a_number_are_refused(tmp_path: Path) -> None:
    nothing = {**weights(), "matrix": np.zeros((64, 0), np.float32)}
    model = face_network(arrays=nothing)
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 0
    with pytest.raises(TeacherError, match=r"returns \(2, 0\) for 2 images"):
        load_teacher(saved(tmp_path, model))


def test_a_batch_size_that_nobody_can_fill_is_refused(tmp_path: Path) -> None:
    """One image would be embedded among a million copies of itself: 150 GB."""
    with pytest.raises(TeacherError, match="takes 1000000 images at a time and no others; wanted any number"):
        load_teacher(saved(tmp_path, face_network(batch=1_000_000, tail="merged")))


def test_weights_that_embed_as_nan_are_named(tmp_path: Path) -> None:
    arrays = weights()
    arrays["matrix"][0] = np.nan
    with pytest.raises(TeacherError, match="embeds test images as NaN or inf"):
        load_teacher(saved(tmp_path, face_network(arrays=arrays)))


def test_options_that_an_onnx_file_cannot_honour_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, face_network())
    with pytest.raises(ConfigError, match=r"teacher\.network='r50' does not apply"):
        load_teacher(path, {"network": "r50"})
    with pytest.raises(TeacherError, match=r"takes 112x112 images, not teacher\.size=96"):
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


def test_a_session_survives_copying_and_pickling(tmp_path: Path) -> None:
    teacher = load_teacher(saved(tmp_path, face_network()))
    images = student_view(pixels())
    for twin in (copy.deepcopy(teacher), pickle.loads(pickle.dumps(teacher))):
        assert torch.equal(twin(images), teacher(images))


def test_sessions_take_as_many_threads_as_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    made: list[Any] = []
    original = onnxruntime.SessionOptions

    def watched() -> Any:
        made.append(original())
        return made[-1]

    monkeypatch.setattr(onnxruntime, "SessionOptions", watched)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    load_teacher(saved(tmp_path, face_network()))
    assert [options.intra_op_num_threads for options in made] == [3]


@pytest.mark.parametrize(
    ("device", "available", "chosen"),
    [
        ("cpu", ["CUDAExecutionProvider", "CPUExecutionProvider"], ["CPUExecutionProvider"]),
        ("cuda:3", ["AzureExecutionProvider", "CPUExecutionProvider"], ["CPUExecutionProvider"]),
        (
            "cuda:3",
            ["CUDAExecutionProvider", "CPUExecutionProvider"],
            ["CUDAExecutionProvider", "CPUExecutionProvider"],
        ),
    ],
)
def test_providers_are_those_of_the_images_own_device(
    monkeypatch: pytest.MonkeyPatch, device: str, available: list[str], chosen: list[str]
) -> None:
    import onnxruntime
    from insightface.model_zoo.onnxruntime_utils import get_default_providers

    from arcface_kd.teachers.onnx.session import _providers

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: available)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None, raising=False)
    providers = _providers(torch.device(device))
    assert [name for name, _ in providers] == chosen
    if device == "cuda:3":
        assert chosen == get_default_providers(available)
        assert providers[0][1] == ({"device_id": 3} if len(chosen) == 2 else {})


def test_a_session_follows_its_images_to_their_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not to the GPU that happens to be current when the teacher is loaded, which is the same one on all ranks."""
    import onnxruntime

    asked: list[Any] = []
    original = onnxruntime.InferenceSession

    class Session:
        def __init__(self, model: bytes, options: Any, providers: list[Any], enable_fallback: int) -> None:
            asked.append(providers)
            self.inner = original(model, options, providers=["CPUExecutionProvider"])

        def get_providers(self) -> list[str]:
            return [name for name, _ in asked[-1]]

        def get_inputs(self) -> Any:
            return self.inner.get_inputs()

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    available = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: available)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None, raising=False)
    network = OnnxNetwork(read_graph(saved(tmp_path, face_network())))
    assert asked == [[("CPUExecutionProvider", {})]]
    for _ in range(2):
        network._follow(torch.device("cuda", 2))
    assert len(asked) == 2
    assert asked[1][0] == ("CUDAExecutionProvider", {"device_id": 2})


def _with_operator(name: str) -> Any:
    """The network with one more function behind its first convolution."""
    model = face_network(batch=None, tail="flatten")
    model.graph.node[1].input[0] = "more"
    model.graph.node.insert(1, onnx.helper.make_node(name, ["map1"], ["more"]))
    return model


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
    path = saved(tmp_path, _with_operator("Softsign"))
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


def test_asking_for_a_gpu_that_onnxruntime_lacks_changes_nothing(tmp_path: Path) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime has CUDA here")
    teacher = load_teacher(saved(tmp_path, face_network()))
    images = student_view(pixels())
    before = teacher(images)
    network: Any = teacher.network
    network._apply(lambda tensor: tensor.to("meta"))
    session = network._session
    network._apply(lambda tensor: tensor.to("meta"))
    assert network._session is session
    assert torch.equal(teacher(images), before)


def _pack(folder: Path) -> Path:
    """Files named and shaped like buffalo_l's."""
    saved(folder, other_network(192, 1), "1k3d68.onnx")
    saved(folder, other_network(192, 1), "2d106det.onnx")
    saved(folder, other_network(640, 9), "det_10g.onnx")
    saved(folder, other_network(96, 1), "genderage.onnx")
    saved(folder, face_network(batch=None, tail="flatten"), "w600k_r50.onnx")
    return folder


def test_the_recognition_network_of_a_pack_is_the_one_insightface_routes_to(tmp_path: Path) -> None:
    from insightface.model_zoo import get_model

    folder = _pack(tmp_path / "buffalo")
    routed = {file.name: type(get_model(str(file))).__name__ for file in sorted(folder.iterdir())}
    assert [name for name, kind in routed.items() if kind == "ArcFaceONNX"] == ["w600k_r50.onnx"]
    assert load_teacher(folder).fingerprint == load_teacher(folder / "w600k_r50.onnx").fingerprint
    assert load_teacher(folder).description == f"ONNX {folder / 'w600k_r50.onnx'}"


def test_a_damaged_neighbour_does_not_hide_the_recognition_network(tmp_path: Path) -> None:
    folder = _pack(tmp_path / "buffalo")
    (folder / "a.onnx").write_bytes(b"damaged")
    assert load_teacher(folder).embedding_size == EMBEDDING_SIZE


def test_a_pack_without_a_recognition_network_lists_its_files(tmp_path: Path) -> None:
    saved(tmp_path, other_network(640, 9), "det.onnx")
    saved(tmp_path, other_network(96, 1), "genderage.onnx")
    with pytest.raises(TeacherError, match=r"\(det\.onnx has 9 outputs; genderage\.onnx puts out 3 numbers\)"):
        load_teacher(tmp_path)


def test_two_recognition_networks_are_named_with_how_to_choose(tmp_path: Path) -> None:
    for name in ("glintr100.onnx", "w600k_r50.onnx"):
        saved(tmp_path, face_network(batch=None, tail="flatten"), name)
    with pytest.raises(TeacherError, match=r"glintr100\.onnx \(16 numbers\), w600k_r50\.onnx") as caught:
        load_teacher(tmp_path)
    assert f"--kd-teacher {tmp_path / 'glintr100.onnx'}" in str(caught.value)


def _putting_out(numbers: int) -> Any:
    """A network of the recogniser's input that puts out so many numbers: liveness, expressions, attributes."""
    model = face_network(arrays={**weights(), "matrix": np.ones((64, numbers), np.float32)})
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = numbers
    return model


def _restorer() -> Any:
    model = face_network(size=512)
    del model.graph.node[1:]
    model.graph.node[0].output[0] = "embedding"
    model.graph.output[0].CopyFrom(onnx.helper.make_tensor_value_info("embedding", TensorProto.FLOAT, [1, 8, 64, 64]))
    return model


@pytest.mark.parametrize(
    ("other", "warned"),
    [(_putting_out(2), True), (_putting_out(8), True), (_putting_out(40), True), (_restorer(), False)],
)
def test_a_network_that_puts_out_no_embedding_is_passed_over(
    tmp_path: Path, other: Any, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """The insightface package would take the first one by name; where that may be meant, it is said."""
    saved(tmp_path, other, "antispoof.onnx")
    saved(tmp_path, face_network(batch=None, tail="flatten"), "w600k_r50.onnx")
    with caplog.at_level(logging.WARNING):
        assert load_teacher(tmp_path).description == f"ONNX {tmp_path / 'w600k_r50.onnx'}"
    assert ("w600k_r50.onnx is taken" in caplog.text) is warned


@pytest.mark.parametrize("inside", [".", "antelope"])
def test_a_pack_by_name_is_found_where_insightface_keeps_it(home: Path, inside: str) -> None:
    # The archive of antelopev2 has a folder of its own name inside.
    _pack(home / ".insightface" / "models" / "antelope" / inside)
    teacher = load_teacher("insightface:antelope")
    assert teacher.embedding_size == EMBEDDING_SIZE
    assert "w600k_r50.onnx" in teacher.description


def test_a_missing_pack_is_downloaded_by_insightface_and_said_so(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from insightface.utils import storage

    def download(kind: str, name: str, force: bool) -> None:
        assert (kind, force) == ("models", True)
        _pack(home / ".insightface" / kind / name)

    monkeypatch.setattr(storage, "download", download)
    (home / ".insightface" / "models" / "buffalo_l").mkdir(parents=True)
    with caplog.at_level(logging.WARNING):
        assert load_teacher("insightface:buffalo_l").embedding_size == EMBEDDING_SIZE
    assert "insightface downloads" in caplog.text
    assert "buffalo_l.zip" in caplog.text


def test_a_failed_download_is_one_clear_line(home: Path) -> None:
    with pytest.raises(TeacherError, match=r"insightface:buffalo_l is not in .* and cannot be downloaded") as caught:
        load_teacher("insightface:buffalo_l")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["", "..", "../models", "a/b", "/etc", "a\\b", "a..b", "-x"])
def test_a_pack_name_leads_nowhere_else(home: Path, name: str) -> None:
    with pytest.raises(TeacherError, match="wanted the name of a pack"):
        load_teacher(f"insightface:{name}")


def _manifest(folder: Path, **recognition: object) -> Path:
    path = saved(folder, face_network(batch=None, tail="flatten"), "recognition.onnx")
    task = {"file": "recognition.onnx", "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), **recognition}
    (folder / "MODEL.LICENSE").write_text("test")
    manifest = {"manifest_version": 2, "model_id": "small", "license": "MODEL.LICENSE", "tasks": {"recognition": task}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_a_manifest_decides_on_file_and_preprocessing(tmp_path: Path) -> None:
    folder = _pack(_manifest(tmp_path / "raccoon", preprocessing={"mean": 127, "std": 128}))
    teacher = load_teacher(folder)
    assert teacher.preprocessing == Preprocessing("rgb", (127.0,) * 3, (128.0,) * 3)
    assert "recognition.onnx" in teacher.description
    assert load_teacher(folder, {"std": "1"}).preprocessing.std == (1.0, 1.0, 1.0)
    embedded = load_teacher(_manifest(tmp_path / "other", preprocessing="embedded"))
    assert embedded.preprocessing == Preprocessing("rgb", (0.0,) * 3, (1.0,) * 3)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"manifest_version": 2}', '{"manifest_version": 2, "model_id": "\\u0000"}']
)
def test_a_manifest_that_is_none_is_one_line(tmp_path: Path, text: str) -> None:
    _manifest(tmp_path / "raccoon")
    (tmp_path / "raccoon" / "manifest.json").write_text(text)
    with pytest.raises(TeacherError, match=r"teacher .*raccoon: ") as caught:
        load_teacher(tmp_path / "raccoon")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "recognition",
    [{"file": "../recognition.onnx"}, {"sha256": "0" * 64}, {"file": "missing.onnx"}, {"preprocessing": 5}],
)
def test_a_manifest_that_leads_astray_is_refused(tmp_path: Path, recognition: dict[str, object]) -> None:
    with pytest.raises(TeacherError, match="raccoon") as caught:
        load_teacher(_manifest(tmp_path / "raccoon", **recognition))
    assert "\n" not in str(caught.value)


def test_a_file_is_taken_by_its_content_before_its_name(tmp_path: Path) -> None:
    assert OnnxSource.accepts(saved(tmp_path, face_network(), "teacher.bin"))
    (tmp_path / "checkpoint.onnx").write_bytes(b"PK\x03\x04")
    assert not OnnxSource.accepts(tmp_path / "checkpoint.onnx")
    (tmp_path / "unknown.onnx").write_bytes(b"?")
    assert OnnxSource.accepts(tmp_path / "unknown.onnx")
    assert not OnnxSource.accepts(tmp_path / "missing.onnx")


def _real(real_data: Path) -> Path:
    return real_data / "teachers" / "mobilefacenet_512.onnx"


@pytest.mark.slow
@pytest.mark.real
def test_mobilefacenet_512_reaches_99_percent(real_data: Path, some_pairs: VerificationSet) -> None:
    options = {"channels": "bgr", "mean": "127", "std": "128"}
    teacher = load_teacher(_real(real_data), options)
    assert isinstance(teacher, Teacher)
    assert evaluate(teacher, some_pairs, batch_size=64).accuracy >= 0.99


@pytest.mark.real
def test_mobilefacenet_512_embeds_as_its_cleaned_twin(real_data: Path, tmp_path: Path) -> None:
    """The denormal weights that it comes with, which make it slow, are gone; nothing else is."""
    import onnx

    path = _real(real_data)
    model = onnx.load(str(path))
    assert clear_denormals(model) > 0
    assert clear_denormals(onnx.load_from_string(read_graph(path).model)) == 0
    teachers = [load_teacher(path), load_teacher(saved(tmp_path, model))]
    images = torch.rand(4, 3, 112, 112) * 2 - 1
    first, second = (teacher(images) for teacher in teachers)
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)
