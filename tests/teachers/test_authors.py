"""Whose weights a file holds: each author's wrapping, file name and settings, and what their images look like."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from arcface_kd.backbones import get_backbone
from arcface_kd.backbones.ir import IRLayout, IRNet
from arcface_kd.errors import ConfigError, TeacherError
from arcface_kd.export.onnx import export
from arcface_kd.teachers import Preprocessing, checkpoint, load_teacher
from tests.reference.ir import ir_embeddings
from tests.teachers.checkpoint_files import prefixed, saved

SIZE = 8
STARTS = {0, 1, 2, 3}
RGB, BGR = Preprocessing(), Preprocessing("bgr")
FACEX_ZOO = Preprocessing("bgr", std=(128.0,) * 3)


def weights(layout: IRLayout) -> dict[str, Tensor]:
    torch.manual_seed(0)
    state = IRNet(layout, num_features=SIZE).state_dict()
    for name, tensor in state.items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
        elif tensor.dim() == 1:
            tensor.normal_(0.5, 0.2)
    return state


@pytest.fixture(scope="module")
def inner() -> dict[str, Tensor]:
    """AdaFace's and CVLface's kind."""
    return weights(IRLayout((1, 1, 1, 1), (16, 32, 48, 64), 16, squeeze="se_block"))


@pytest.fixture(scope="module")
def outer() -> dict[str, Tensor]:
    """face.evoLVe's and FaceX-Zoo's kind."""
    return weights(IRLayout((1, 1, 1, 1), (16, 32, 48, 64), 16, inner_norm=False, affine=True))


def assert_shown(path: Path, wanted: Preprocessing, author: str, state: dict[str, Tensor]) -> None:
    """The teacher embeds RGB faces in [-1, 1] as the author's network does the same pixels prepared by hand."""
    teacher = load_teacher(path)
    assert teacher.preprocessing == wanted
    assert f"of {author} from" in teacher.description
    images = torch.rand(2, 3, 112, 112, generator=torch.Generator().manual_seed(1)) * 2 - 1
    pixels = (images.flip(1) if wanted.channels == "bgr" else images) * 127.5 + 127.5
    expected = ir_embeddings(state, (pixels - wanted.mean[0]) / wanted.std[0], STARTS)
    torch.testing.assert_close(teacher(images).double(), expected, rtol=1e-4, atol=1e-4)


def test_adaface_by_lightning_s_prefix_or_its_file_s_name(tmp_path: Path, inner: dict[str, Tensor]) -> None:
    content = {"epoch": 3, "state_dict": prefixed(inner, "model.") | {"head.kernel": torch.ones(SIZE, 3)}}
    assert_shown(saved(tmp_path, content, "any.ckpt"), BGR, "AdaFace", inner)
    assert_shown(saved(tmp_path, inner, "ir50_AdaFace_ms1mv2.pt"), BGR, "AdaFace", inner)


def test_facex_zoo_by_its_head_and_evolve_by_its_file_s_name(tmp_path: Path, outer: dict[str, Tensor]) -> None:
    for prefix in ("", "module."):
        content = prefixed(outer, f"{prefix}backbone.") | {f"{prefix}head.weight": torch.ones(SIZE, 3)}
        path = saved(tmp_path, {"epoch": 1, "state_dict": content}, "Epoch_17.pt")
        assert_shown(path, FACEX_ZOO, "FaceX-Zoo", outer)
    for name in ("backbone_ir50_ms1m_epoch120.pth", "Backbone_IR_50_Epoch_3_Batch_9_Time_x_checkpoint.pth"):
        assert_shown(saved(tmp_path, prefixed(outer, "module."), name), RGB, "face.evoLVe", outer)


@pytest.mark.parametrize("wanted", [RGB, BGR], ids=["RGB", "BGR"])
def test_cvlface_by_its_settings(tmp_path: Path, inner: dict[str, Tensor], wanted: Preprocessing) -> None:
    color = wanted.channels.upper()
    path = saved(tmp_path, prefixed(inner, "net."))
    with pytest.raises(TeacherError, match=r"teacher\.channels"):
        load_teacher(path)
    (tmp_path / "model.yaml").write_text(f"input_size: [3, 112, 112]\ncolor_space: '{color}'\nname: ir101\n")
    assert_shown(path, wanted, "CVLface", inner)


def test_a_hugging_face_folder_by_its_weights_and_settings(tmp_path: Path, inner: dict[str, Tensor]) -> None:
    (tmp_path / "wrapper.py").write_text("raise SystemExit('its code was run')\n")
    save_file(prefixed(inner, "model.net."), tmp_path / "model.safetensors")
    with pytest.raises(TeacherError):
        load_teacher(tmp_path)
    (tmp_path / "config.json").write_text(
        json.dumps({"conf": {"color_space": "BGR"}, "auto_map": {"AutoModel": "wrapper.X"}})
    )
    assert_shown(tmp_path, BGR, "CVLface", inner)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pretrained_model").mkdir()
    saved(tmp_path / "pretrained_model", prefixed(inner, "net."))
    assert_shown(tmp_path, BGR, "CVLface", inner)
    assert_shown(tmp_path / "pretrained_model" / "model.pt", BGR, "CVLface", inner)
    assert not checkpoint.is_run_folder(tmp_path)
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(TeacherError, match=r"teacher\.channels"):
        load_teacher(tmp_path)


def test_who_cannot_be_told_is_asked_for(tmp_path: Path, inner: dict[str, Tensor], outer: dict[str, Tensor]) -> None:
    for state in (inner, outer, prefixed(outer, "backbone."), prefixed(inner, "module.")):
        path = saved(tmp_path, state, "weights.pth")
        with pytest.raises(TeacherError, match=r"weights\.pth.*teacher\.channels=rgb or bgr"):
            load_teacher(path)
        assert load_teacher(path, {"channels": "bgr", "std": 128}).preprocessing == FACEX_ZOO
        with pytest.raises(ConfigError, match=r"weights\.pth"):
            export(path, tmp_path / "out.onnx")


def test_what_a_run_trained_is_shown_what_it_was_shown(tmp_path: Path, inner: dict[str, Tensor]) -> None:
    (tmp_path / "training.log").write_text("Training: 2026-01-01 10:00:00,000-: network                  ir_50\n")
    saved(tmp_path, inner)
    assert load_teacher(tmp_path).preprocessing == RGB


def test_a_student_of_this_package_says_that_it_is_one(tmp_path: Path) -> None:
    name = "ir:units=1-1-1-1,widths=16-32-48-64,stem=16,squeeze=se_block"
    state = get_backbone(name, num_features=SIZE, dropout=0.4).state_dict()
    teacher = load_teacher(saved(tmp_path, state, "moved.pt"))
    assert (teacher.preprocessing, teacher.description) == (RGB, f"{name} from {tmp_path / 'moved.pt'}")


def test_images_of_a_larger_network_are_larger(tmp_path: Path) -> None:
    state = weights(IRLayout((1, 1, 1, 1), (16, 32, 48, 64), 16, inner_norm=False, affine=True, side=14))
    assert load_teacher(saved(tmp_path, state, "backbone_ir50.pth")).preprocessing == Preprocessing(size=224)
