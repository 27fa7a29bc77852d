import io
import os
import pickle
from pathlib import Path

import pytest
import torch

from arcface_kd.teachers.file_type import describe, signature
from tests.teachers.onnx_models import face_network


def _torch_bytes(legacy: bool) -> bytes:
    stream = io.BytesIO()
    torch.save({"a": torch.ones(1)}, stream, _use_new_zipfile_serialization=not legacy)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "kind", "said"),
    [
        (_torch_bytes(legacy=False), "zip", "zip"),
        (_torch_bytes(legacy=True), "pickle", "pickle"),
        (pickle.dumps([1], protocol=4), "pickle", "pickle"),
        (face_network().SerializeToString(), "onnx", "ONNX"),
        ((0x112).to_bytes(8, "little") + bytes(16), "mxnet", "MXNet"),
        (b'  {"nodes": []}', "json", "JSON"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs", "git lfs pull"),
        (b"\n<!DOCTYPE html><html>", "html", "HTML"),
        (b"\1\2\3", None, "a file of 3 bytes that starts with 01 02 03"),
        (b"", None, "an empty file"),
    ],
)
def test_content_tells_what_a_file_is_whatever_its_name(
    tmp_path: Path, content: bytes, kind: str | None, said: str
) -> None:
    path = tmp_path / "misleading.png"
    path.write_bytes(content)
    assert signature(path) == kind
    assert said in describe(path)


def test_what_is_no_file_has_no_signature(tmp_path: Path) -> None:
    assert signature(tmp_path) is None
    assert signature(tmp_path / "missing") is None
    assert describe(tmp_path) == "a folder"
    assert describe(tmp_path / "missing") == "no such file"


def test_a_pipe_is_never_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert signature(tmp_path / "pipe") is None
    assert describe(tmp_path / "pipe") == "not a regular file"
