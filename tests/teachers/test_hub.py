"""Teachers from the Hugging Face hub, with a hub that downloads nothing."""

import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from arcface_kd.backbones.ir import IRLayout, IRNet
from arcface_kd.errors import TeacherError
from arcface_kd.teachers import load_teacher
from arcface_kd.teachers.checkpoint import weights_file
from arcface_kd.teachers.hub import HubSource
from tests.teachers.checkpoint_files import prefixed


def fake_hub(monkeypatch: pytest.MonkeyPatch, download: Any) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=download))


def test_weights_and_settings_are_downloaded_and_no_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    state = IRNet(IRLayout((1, 1, 1, 1), (16, 32, 48, 64), 16), num_features=8).state_dict()
    save_file(prefixed(state, "model.net."), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"conf": {"color_space": "RGB"}}))
    asked: list[tuple[str, list[str]]] = []

    def download(name: str, *, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(tmp_path)

    fake_hub(monkeypatch, download)
    with caplog.at_level(logging.WARNING):
        teacher = load_teacher("hf:minchul/cvlface_adaface_ir101_webface4m")
    assert "hf:minchul/cvlface_adaface_ir101_webface4m" in caplog.text
    assert teacher.embedding_size == 8
    ((name, patterns),) = asked
    assert name == "minchul/cvlface_adaface_ir101_webface4m"
    assert {"config.json", "model.safetensors", "model.pt"} <= set(patterns)
    assert not any(pattern.endswith((".py", "*")) for pattern in patterns)
    assert weights_file(tmp_path) == tmp_path / "model.safetensors"
    # A configuration, or MXNet's symbol, is not where the weights are.
    assert weights_file(tmp_path / "config.json") is None


def test_what_cannot_be_had_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(name: str, **_: object) -> str:
        raise OSError(f"404: {name} not found")

    fake_hub(monkeypatch, nowhere)
    with pytest.raises(TeacherError, match=r"hf:a/b.*404"):
        load_teacher("hf:a/b")
    fake_hub(monkeypatch, lambda name, **_: str(tmp_path))
    with pytest.raises(TeacherError, match=r"hf:a/b.*config\.json"):
        load_teacher("hf:a/b")
    assert not HubSource.accepts("a/b")
