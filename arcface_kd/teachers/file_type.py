"""What a file is, told by its first bytes rather than by its name."""

from pathlib import Path
from typing import Literal

from arcface_kd.system.downloads import is_html, is_lfs_pointer

Signature = Literal["zip", "pickle", "safetensors", "onnx", "mxnet", "json", "git-lfs", "html"]

_MXNET_LIST_MAGIC = (0x112).to_bytes(8, "little")
# Wire tags of the fields 2..8 and 14 of ONNX's ModelProto: one of them follows the ir_version, which is written first.
_ONNX_SECOND_TAGS = frozenset((0x12, 0x1A, 0x22, 0x28, 0x32, 0x3A, 0x42, 0x72))


def head(path: Path, size: int = 64) -> bytes:
    """The first bytes of a regular file; none where there is none or it cannot be opened."""
    if not path.is_file():
        return b""
    try:
        with path.open("rb") as stream:
            return stream.read(size)
    except OSError:
        return b""


def signature(path: Path) -> Signature | None:
    """The kind of a file that holds a teacher, or that is taken for one; None where its first bytes do not tell."""
    start = head(path)
    if start.startswith(b"PK\x03\x04"):
        return "zip"
    if start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "pickle"
    # The length of a header in JSON, then the header: the length may look like another kind's first bytes.
    if start[8:9] == b"{" and start[4:8] == bytes(4):
        return "safetensors"
    if start.startswith(_MXNET_LIST_MAGIC):
        return "mxnet"
    if len(start) > 2 and start[0] == 0x08 and 1 <= start[1] < 0x40 and start[2] in _ONNX_SECOND_TAGS:
        return "onnx"
    if is_lfs_pointer(start):
        return "git-lfs"
    if start.lstrip().startswith(b"{"):
        return "json"
    return "html" if is_html(start) else None


def describe(path: Path) -> str:
    """What is at a path, in a few words for error messages."""
    if path.is_dir():
        return "a folder"
    if not path.exists():
        return "no such file"
    if not path.is_file():
        return "not a regular file"
    size = path.stat().st_size
    if size == 0:
        return "an empty file"
    words = {
        "zip": "a zip archive",
        "pickle": "a Python pickle",
        "safetensors": "a safetensors file",
        "onnx": "an ONNX file",
        "mxnet": "an MXNet parameter file",
        "json": "a JSON file",
        "git-lfs": "a Git LFS pointer, not the file itself (run `git lfs pull`)",
        "html": "an HTML page, not a model (a download that asked for a login?)",
    }
    kind = signature(path)
    if kind is not None:
        return words[kind]
    return f"a file of {size} bytes that starts with {head(path, 8).hex(' ')}"
