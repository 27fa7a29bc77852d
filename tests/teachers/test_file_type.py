import io
import os
import pickle
from pathlib import Path

import pytest
import torch

from arcface_kd.teachers.file_type import describe, head, signature
from tests.teachers.onnx_models import face_network


def _torch_bytes(legacy: bool) -> bytes:
    stream = io.BytesIO()
    torch.save({"a": torch.ones(1)}, stream, _use_new_zipfile_serialization=not legacy)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (_torch_bytes(legacy=False), "zip"),
        (_torch_bytes(legacy=True), "pickle"),
        (pickle.dumps([1], protocol=4), "pickle"),
        (face_network().SerializeToString(), "onnx"),
        ((0x112).to_bytes(8, "little") + bytes(16), "mxnet"),
        (b'  {"nodes": []}', "json"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs"),
        (b"\n<!DOCTYPE html><html>", "html"),
        (b"hello", None),
        (b"", None),
    ],
)
def test_content_tells_what_a_file_is_whatever_its_name(tmp_path: Path, content: bytes, kind: str | None) -> None:
    path = tmp_path / "misleading.png"
    path.write_bytes(content)
    assert signature(path) == kind
    assert "\n" not in describe(path)


def test_what_is_no_file_has_no_signature(tmp_path: Path) -> None:
    assert signature(tmp_path) is None
    assert signature(tmp_path / "missing") is None
    assert head(tmp_path / "missing") == b""
    assert describe(tmp_path) == "a folder"
    assert describe(tmp_path / "missing") == "no such file"


def test_a_pipe_is_never_opened(tmp_path: Path) -> None:
    if not hasattr(os, "mkfifo"):
        pytest.skip("no named pipes on this system")
    os.mkfifo(tmp_path / "pipe")
    assert signature(tmp_path / "pipe") is None
    assert describe(tmp_path / "pipe") == "not a regular file"


def test_descriptions_say_what_to_do_or_what_was_met(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert "git lfs pull" in describe(path)
    path.write_bytes(b"")
    assert describe(path) == "an empty file"
    path.write_bytes(b"\x01\x02\x03")
    assert describe(path) == "a file of 3 bytes that starts with 01 02 03"
