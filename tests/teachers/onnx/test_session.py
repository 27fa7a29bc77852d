"""Graphs run by onnxruntime: each image as it would be alone, on the images' own device."""

import copy
import logging
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from arcface_kd.errors import TeacherError
from arcface_kd.teachers import Preprocessing, load_teacher
from arcface_kd.teachers.onnx.graph import read_graph
from arcface_kd.teachers.onnx.session import OnnxNetwork, any_batch
from tests.teachers.onnx_models import (
    embed_one_by_one,
    face_network,
    pixels,
    saved,
    student_view,
)


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
    ("tail", "freed"),
    [("reshape", True), ("constant_numbers", True), ("flatten", True), ("merged", False), ("mixing", False)],
)
def test_a_batch_size_is_freed_only_where_that_is_proved(
    tmp_path: Path, tail: Any, freed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        network = any_batch(read_graph(saved(tmp_path, face_network(tail=tail))), Preprocessing())
    assert (network.graph.fixed_batch is None) is freed
    assert ("cannot be freed" in caplog.text) is not freed


def test_a_graph_that_onnxruntime_cannot_run_ends_in_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = face_network()
    model.graph.node[1].op_type = "NoSuchOperator"
    with pytest.raises(TeacherError, match=r"model\.onnx: onnxruntime cannot run the graph") as caught:
        load_teacher(saved(tmp_path, model))
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().out == ""


def test_a_batch_size_that_nobody_can_fill_is_refused(tmp_path: Path) -> None:
    """One image would be embedded among a million copies of itself: 150 GB."""
    with pytest.raises(TeacherError, match="takes 1000000 images at a time"):
        load_teacher(saved(tmp_path, face_network(batch=1_000_000, tail="merged")))


def test_a_session_survives_copying_and_pickling(tmp_path: Path) -> None:
    teacher = load_teacher(saved(tmp_path, face_network()))
    images = student_view(pixels())
    for twin in (copy.deepcopy(teacher), pickle.loads(pickle.dumps(teacher))):
        assert torch.equal(twin(images), teacher(images))


def test_sessions_take_as_many_threads_as_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    teacher: Any = load_teacher(saved(tmp_path, face_network()))
    assert teacher.network._session.get_session_options().intra_op_num_threads == 3


CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"


def test_a_session_follows_its_images_to_their_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not to the GPU that happens to be current when the teacher is loaded, which is the same one on all ranks."""
    asked: list[Any] = []
    original = onnxruntime.InferenceSession

    class Session:
        def __init__(self, model: bytes, options: Any, providers: list[Any], enable_fallback: int) -> None:
            asked.append(providers)
            self.inner = original(model, options, providers=[CPU])

        def get_providers(self) -> list[str]:
            return [name for name, _ in asked[-1]]

        def get_inputs(self) -> Any:
            return self.inner.get_inputs()

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None, raising=False)
    network = OnnxNetwork(read_graph(saved(tmp_path, face_network())))
    assert asked == [[(CPU, {})]]
    for _ in range(2):
        network._follow(torch.device("cuda", 2))
    assert len(asked) == 2
    assert asked[1][0] == (CUDA, {"device_id": 2})


def test_asking_for_a_gpu_that_onnxruntime_lacks_changes_nothing(tmp_path: Path) -> None:
    if CUDA in onnxruntime.get_available_providers():
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
