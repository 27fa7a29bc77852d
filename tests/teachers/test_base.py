import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from arcface_kd import registry
from arcface_kd.errors import ConfigError, TeacherError
from arcface_kd.teachers import Preprocessing, Teacher, TeacherOptions, load_teacher
from arcface_kd.teachers.base import local_path, tensors_digest
from tests.teachers.onnx_models import student_view


class Pooled(nn.Module):
    """Means of a 4x4 grid of each channel, turned by a matrix: sensitive to channels, scale and shift."""

    def __init__(self, size: int = 8) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.matrix = nn.Parameter(torch.randn((48, size), generator=generator))
        self.norm = nn.BatchNorm1d(size)

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(nn.functional.adaptive_avg_pool2d(images, 4).flatten(1) @ self.matrix)


AS_STUDENT = Preprocessing()


def teacher_of(network: Callable[[Tensor], Tensor], preprocessing: Preprocessing = AS_STUDENT, **rest: Any) -> Teacher:
    return Teacher(network, preprocessing=preprocessing, description="test", weights="digest", **rest)


def pixels(count: int = 2, size: int = 112) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 3, size, size), dtype=np.uint8)


@pytest.mark.parametrize("channels", ["rgb", "bgr"])
@pytest.mark.parametrize(
    ("mean", "std"),
    [
        ((127.5,) * 3, (127.5,) * 3),
        ((127.0,) * 3, (128.0,) * 3),
        ((0.0,) * 3, (1.0,) * 3),
        ((124.0, 116.0, 104.0), (58.0, 57.0, 56.0)),
    ],
)
def test_prepare_is_the_textbook_formula_on_pixel_values(channels: Any, mean: Any, std: Any) -> None:
    teacher = teacher_of(Pooled(), Preprocessing(channels, mean, std))
    images = pixels()
    assert torch.equal(teacher_of(Pooled()).prepare(student_view(images)), student_view(images))
    ordered = images if channels == "rgb" else images[:, ::-1]
    expected = (ordered.astype(np.float64) - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    prepared = teacher.prepare(student_view(images)).numpy()
    np.testing.assert_allclose(prepared, expected, rtol=0, atol=2e-7 * 255 / min(std))


def test_resize_is_opencvs_bilinear_when_enlarging() -> None:
    import cv2

    images = pixels(1, 56)
    enlarged = teacher_of(Pooled(), Preprocessing(size=112)).prepare(student_view(images))
    wanted = cv2.resize(images[0].transpose(1, 2, 0).astype(np.float32), (112, 112), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_allclose(enlarged[0].numpy().transpose(1, 2, 0) * 127.5 + 127.5, wanted, atol=0.01)


def test_shrinking_looks_at_every_pixel() -> None:
    stripes = np.zeros((1, 3, 112, 112), np.uint8)
    stripes[..., ::2] = 255
    small = teacher_of(Pooled(), Preprocessing(size=28)).prepare(student_view(stripes))
    assert small.shape == (1, 3, 28, 28)
    assert small.abs().max() < 0.2


def test_a_teacher_is_frozen_and_stays_in_evaluation_mode() -> None:
    network = Pooled().train()
    teacher = teacher_of(network)
    images = student_view(pixels(3)).requires_grad_()
    before = teacher(images)
    assert teacher.train() is teacher
    assert not teacher.training
    network.train()
    after = teacher(images)
    assert not network.training
    assert torch.equal(before, after)
    assert not after.requires_grad
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_embeddings_are_those_of_the_network_in_float32_and_not_normalised() -> None:
    network = Pooled(8).eval()
    images = student_view(pixels(5))
    embeddings = teacher_of(network, Preprocessing("bgr", (127.0,) * 3, (128.0,) * 3))(images)
    with torch.no_grad():
        expected = network((images.flip(1) * 127.5 + 0.5) / 128)
    torch.testing.assert_close(embeddings, expected, rtol=1e-4, atol=1e-6)
    assert embeddings.dtype == torch.float32
    assert embeddings.shape == (5, 8)
    assert teacher_of(network).embedding_size == 8
    assert teacher_of(network).parameter_count == 48 * 8 + 16


def test_weights_stay_out_of_the_student_it_is_attached_to() -> None:
    student = nn.Linear(2, 2)
    keys = set(student.state_dict())
    student.teacher = teacher_of(Pooled())
    assert set(student.state_dict()) == keys
    assert len(list(student.parameters())) == 2
    student.load_state_dict(student.state_dict(), strict=True)
    student.train()
    assert isinstance(student.teacher, Teacher)
    assert not student.teacher.training


def test_to_reaches_the_network_and_the_network_follows_its_images() -> None:
    network = Pooled()
    teacher = teacher_of(network)
    assert teacher.device == torch.device("cpu")
    teacher.to("meta")
    assert network.matrix.device.type == "meta"
    assert teacher.device == torch.device("meta")
    assert teacher_of(lambda images: images[:, :, 0, 0]).device is None
    # Nothing can be copied out of "meta", so that the attempt shows on a machine with one device.
    with pytest.raises(NotImplementedError, match="meta"):
        teacher(student_view(pixels()))


@pytest.mark.gpu
def test_on_a_gpu_the_embeddings_are_those_of_the_cpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    teacher, images = teacher_of(Pooled()), student_view(pixels())
    on_gpu = teacher(images.cuda())
    assert on_gpu.is_cuda
    torch.testing.assert_close(on_gpu.cpu(), teacher(images), rtol=1e-3, atol=1e-4)


def test_precision_is_the_teachers_own_whatever_the_step_runs_in() -> None:
    seen: list[torch.dtype] = []

    class Watched(Pooled):
        def forward(self, images: Tensor) -> Tensor:
            seen.append((images.flatten(1)[:, :48] @ self.matrix).dtype)
            return super().forward(images)

    images = student_view(pixels())
    plain, half = teacher_of(Watched()), teacher_of(Watched(), precision="bf16")
    seen.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain(images)
    half_embeddings = half(images)
    assert seen == [torch.float32, torch.bfloat16]
    assert half_embeddings.dtype == torch.float32
    assert not torch.equal(half_embeddings, plain(images))
    torch.testing.assert_close(half_embeddings, plain(images), rtol=0.05, atol=0.05)


def test_no_images_give_no_embeddings() -> None:
    assert teacher_of(Pooled(8))(torch.zeros((0, 3, 112, 112))).shape == (0, 8)


@pytest.mark.parametrize(
    "images", [torch.zeros(3, 112, 112), torch.zeros(1, 1, 112, 112), torch.zeros(1, 3, 112, 112, dtype=torch.uint8)]
)
def test_images_of_another_kind_are_refused(images: Tensor) -> None:
    with pytest.raises(TeacherError, match=r"\(B, 3, H, W\)"):
        teacher_of(Pooled())(images)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (lambda images: (images, images), "returns tuple"),
        (lambda images: images, r"returns \(2, 3, 112, 112\)"),
        (lambda images: images.flatten(1)[:1], r"returns \(1, 37632\) for 2 images"),
        (lambda images: images.flatten(1)[:, :0], r"returns \(2, 0\)"),
        (lambda images: images.flatten(1) / 0, "NaN or inf in fp32"),
        (lambda images: images.view(7, -1) + torch.zeros(3), "cannot embed 112x112 images"),
        (nn.Linear(5, 5), "cannot embed 112x112 images"),
    ],
)
def test_a_network_that_embeds_nothing_is_refused_at_once(network: Any, message: str) -> None:
    with pytest.raises(TeacherError, match=message) as caught:
        teacher_of(network)
    assert "\n" not in str(caught.value)


def test_the_dimension_is_that_of_the_embeddings() -> None:
    assert teacher_of(lambda images: images.mean((2, 3), keepdim=True)).embedding_size == 3
    with pytest.raises(TeacherError, match="dimension 8, wanted 512"):
        teacher_of(Pooled(8), embedding_size=512)


def test_fingerprint_depends_on_all_that_decides_the_embedding_and_on_nothing_else() -> None:
    network = Pooled()
    base = teacher_of(network)
    same = Teacher(network, preprocessing=Preprocessing(), description="elsewhere", weights="digest")
    others = [
        Teacher(network, preprocessing=Preprocessing(), description="test", weights="other"),
        base.with_preprocessing(Preprocessing("bgr")),
        base.with_preprocessing(Preprocessing(mean=(127.0,) * 3)),
        base.with_preprocessing(Preprocessing(std=(127.5, 127.5, 128.0))),
        base.with_preprocessing(Preprocessing(size=96)),
        teacher_of(network, precision="bf16"),
    ]
    assert base.fingerprint == same.fingerprint
    assert len({base.fingerprint, *(other.fingerprint for other in others)}) == 7


def test_with_preprocessing_shares_the_network() -> None:
    base = teacher_of(Pooled())
    turned = base.with_preprocessing(Preprocessing("bgr"))
    images = student_view(pixels())
    assert turned.network is base.network
    assert torch.equal(turned(images), base(images.flip(1)))
    assert base.preprocessing == Preprocessing()


def test_teachers_can_be_copied_and_pickled() -> None:
    teacher = teacher_of(Pooled())
    images = student_view(pixels())
    for twin in (copy.deepcopy(teacher), pickle.loads(pickle.dumps(teacher))):
        assert twin.network is not teacher.network
        assert torch.equal(twin(images), teacher(images))
        assert twin.fingerprint == teacher.fingerprint


def test_channels_last_changes_the_layout_and_not_the_embedding() -> None:
    layouts: list[bool] = []

    class Convolved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution = nn.Conv2d(3, 8, 8, 8)

        def forward(self, images: Tensor) -> Tensor:
            layouts.append(images.is_contiguous(memory_format=torch.channels_last))
            return self.convolution(images).flatten(1)

    network = Convolved()
    images = student_view(pixels())
    plain = teacher_of(copy.deepcopy(network))(images)
    layouts.clear()
    torch.testing.assert_close(teacher_of(network, channels_last=True)(images), plain, rtol=1e-4, atol=1e-5)
    assert all(layouts)


def test_tensors_digest_knows_names_shapes_types_and_bytes() -> None:
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(1), "c": torch.zeros(0)}
    shuffled = {"c": torch.zeros(0), "b": torch.tensor(1), "a": torch.arange(6.0).view(3, 2).t().contiguous()}
    assert tensors_digest(tensors) != tensors_digest(shuffled)
    shuffled["a"] = torch.arange(6.0).view(2, 3).t().contiguous().t()
    assert tensors_digest(tensors) == tensors_digest(shuffled)
    for name, other in (("a", tensors["a"].view(3, 2)), ("a", tensors["a"] + 1e-6), ("b", torch.tensor(1.0))):
        assert tensors_digest({**tensors, name: other}) != tensors_digest(tensors)
    assert tensors_digest({"x": tensors["a"], "b": tensors["b"], "c": tensors["c"]}) != tensors_digest(tensors)


@pytest.mark.parametrize("name", ["model.pt", "model.onnx", "model-symbol.json", "model"])
def test_a_missing_teacher_is_an_error_and_never_made_up(tmp_path: Path, name: str) -> None:
    for source in (tmp_path / name, str(tmp_path / name)):
        with pytest.raises(TeacherError, match=rf"{name} does not exist"):
            load_teacher(source)


def test_a_file_that_nobody_takes_names_what_it_is_and_which_kinds_there_are(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("hello")
    with pytest.raises(TeacherError, match=r"notes\.txt is a file of 5 bytes.*checkpoint:.*mxnet_checkpoint:.*onnx:"):
        load_teacher(path)
    with pytest.raises(TeacherError, match="is a folder"):
        load_teacher(tmp_path)


@pytest.mark.parametrize("source", ["", "s3:bucket/model.pt", "a\0b", None, 5, {"model.pt"}])
def test_what_is_neither_a_file_nor_a_network_is_named(source: object) -> None:
    with pytest.raises(TeacherError, match="no teacher source takes") as caught:
        load_teacher(source)
    assert "\n" not in str(caught.value)


def test_bad_options_stop_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown option teacher\.men"):
        load_teacher(tmp_path / "missing.pt", {"men": 127})


class StrangerSource:
    description = "a stranger's kind"

    @staticmethod
    def accepts(source: object) -> bool:
        return isinstance(source, str) and source.startswith("stranger:")

    @staticmethod
    def load(source: str, options: TeacherOptions) -> Teacher:
        return teacher_of(Pooled(), options.preprocessing(Preprocessing("bgr")), precision=options.precision)


def _sources(monkeypatch: pytest.MonkeyPatch, **kinds: object) -> None:
    monkeypatch.setattr(registry, "entry_points", lambda group: dict.fromkeys(kinds))
    monkeypatch.setattr(registry, "load", lambda group, name: kinds[name])


def test_a_strangers_source_is_asked_like_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    _sources(monkeypatch, stranger=StrangerSource)
    teacher = load_teacher("stranger:any", {"mean": "0"}, device="meta")
    assert teacher.preprocessing == Preprocessing("bgr", mean=(0.0, 0.0, 0.0))
    assert teacher.device == torch.device("meta")
    with pytest.raises(TeacherError, match=r"'other:any'; there are stranger: a stranger's kind"):
        load_teacher("other:any")


class BrokenSource(StrangerSource):
    @staticmethod
    def accepts(source: object) -> bool:
        raise RuntimeError("no licence")


def test_a_source_that_fails_keeps_no_other_from_its_teacher(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _sources(monkeypatch, broken=BrokenSource, stranger=StrangerSource)
    assert load_teacher("stranger:any").embedding_size > 0
    assert any("'broken'" in message and "no licence" in message for message in caplog.messages)


def test_two_sources_for_one_teacher_are_not_chosen_between(monkeypatch: pytest.MonkeyPatch) -> None:
    _sources(monkeypatch, one=StrangerSource, two=StrangerSource)
    with pytest.raises(TeacherError, match="one, two"):
        load_teacher("stranger:any")


def test_local_path_tells_places_from_schemes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local_path("timm:resnet50") is None
    assert local_path("models/r50.pt") == Path("models/r50.pt")
    assert local_path("~/r50.pt") == tmp_path / "r50.pt"
    assert local_path(tmp_path) == tmp_path
    assert local_path(SimpleNamespace()) is None
    (tmp_path / "odd:name").touch()
    assert local_path("odd:name") == Path("odd:name")


def test_a_place_that_the_system_refuses_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match="cannot be read: "):
        load_teacher("x" * 5000)
    (tmp_path / "loop.pt").symlink_to(tmp_path / "loop.pt")
    with pytest.raises(TeacherError, match=r"loop\.pt: cannot be read: "):
        load_teacher(tmp_path / "loop.pt")
