"""Files of tensors: what is refused unread, what is passed over, and state dicts under any key."""

import io
import json
import pickle
import struct
import subprocess
import sys
import warnings
import zipfile
from argparse import Namespace
from collections import defaultdict
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from easydict import EasyDict
from torch import Tensor, nn

from arcface_kd.errors import TeacherError
from arcface_kd.teachers import load_teacher
from arcface_kd.teachers.state_dict import read_content, state_dicts
from tests.teachers.checkpoint_files import saved

WEIGHTS = {"a": torch.arange(6.0).view(2, 3), "b.c": torch.ones(2)}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "beside",
    [
        *(np.float64(0.99), np.float32(0.5), np.int64(7), np.bool_(True), np.arange(3.0)),
        [0.99, 10**12, "r50", None, (3.0,)],
        {"lr": 0.1, "scores": {"lfw": np.float64(0.9)}},
        Namespace(lr=0.1, output=Path("work_dirs/run")),
        EasyDict(lr=0.1, network=EasyDict(name="r50")),
        Path("work_dirs/run"),
        datetime(2026, 1, 2, 3, 4),
        SimpleNamespace(lr=0.1),
        defaultdict(list, loss=[0.5]),
        [int, float],
    ],
    ids=lambda value: type(value).__name__,
)
def test_plain_values_beside_the_tensors_are_passed_over(tmp_path: Path, beside: object, legacy: bool) -> None:
    content = {"best_acc": beside, "state_dict": WEIGHTS, "again": beside}
    path = saved(tmp_path, content, _use_new_zipfile_serialization=not legacy)
    found = state_dicts(read_content(path))
    assert found["state_dict"].keys() == WEIGHTS.keys()
    assert all(torch.equal(found["state_dict"][name], tensor) for name, tensor in WEIGHTS.items())


class Calls:
    """Calls a function of a package whose plain objects are passed over."""

    def __init__(self, function: Any, *arguments: object) -> None:
        self.reduced = (function, arguments)

    def __reduce__(self) -> Any:
        return self.reduced


def test_functions_of_the_packages_that_are_passed_over_are_not_called(tmp_path: Path) -> None:
    content = {"dtype": np.dtype("O"), "call": Calls(np.save, str(tmp_path / "mark"), [1]), "a": torch.zeros(1)}
    assert state_dicts(read_content(saved(tmp_path, content)))[""].keys() == {"a"}
    assert not list(tmp_path.glob("mark*"))
    with pytest.raises(TeacherError, match="an object of eval"):
        read_content(saved(tmp_path, {"call": Calls(eval, "1"), "a": torch.zeros(1)}))


def test_state_dicts_are_found_under_any_key_and_the_trained_one_first() -> None:
    own = {"w": torch.zeros(1)}
    content = {
        "ema": {"decay": 0.9, "shadow": own},
        "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(1)}}, "param_groups": [{"lr": 0.1}]},
        "model": {"state_dict": own, "epoch": 3},
        "total_ops": torch.zeros(1),
        "temperature": torch.zeros(1),
        "history": [{"w": torch.zeros(1)}, 3],
    }
    found = state_dicts(content)
    assert list(found) == ["", "model/state_dict", "ema/shadow", "history/0"]
    assert list(found[""]) == ["temperature"]
    assert found["model/state_dict"] == own
    assert state_dicts({}) == state_dicts(3) == state_dicts({1: torch.zeros(1)}) == {}


def safetensors_file(path: Path, content: bytes, **changes: object) -> Path:
    header = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24], **changes}}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content)
    return path


def test_safetensors_are_read(tmp_path: Path) -> None:
    path = safetensors_file(tmp_path / "w.safetensors", torch.arange(6.0).numpy().tobytes())
    assert torch.equal(state_dicts(read_content(path))[""]["a"], WEIGHTS["a"])


@pytest.mark.parametrize(
    ("changes", "size"), [({}, 20), ({"shape": [2, 300]}, 24), ({"dtype": "X9"}, 24), ({"data_offsets": 3}, 24)]
)
def test_damaged_safetensors_are_refused_by_name(tmp_path: Path, changes: dict[str, object], size: int) -> None:
    path = safetensors_file(tmp_path / "w.safetensors", bytes(size), **changes)
    with pytest.raises(TeacherError, match=r"w\.safetensors"):
        load_teacher(path)


def test_programs_are_called_that(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.trace(nn.Linear(2, 3), torch.zeros(1, 2)).save(str(path))
    with pytest.raises(TeacherError, match=r"model\.pt.*TorchScript"):
        load_teacher(path)
    for name, said in (
        ("model/models/model.json", r"torch\.export"),
        ("w600k_r50.onnx", "InsightFace pack"),
        ("a", ""),
    ):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(name, b"{}")
        with pytest.raises(TeacherError, match=rf"model\.pt.*{said}"):
            load_teacher(path)


def test_another_pickle_protocol_is_called_that(tmp_path: Path) -> None:
    path = saved(tmp_path, WEIGHTS, pickle_protocol=4)
    with pytest.warns(UserWarning, match="protocol 4"), pytest.raises(TeacherError, match="pickle protocol"):
        read_content(path)


def test_tensors_that_are_not_dense_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match="not a plain dense tensor"):
        read_content(saved(tmp_path, {"a": torch.eye(3).to_sparse()}))


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_a_malicious_checkpoint_runs_nothing(tmp_path: Path, form: str) -> None:
    mark, path = tmp_path / "mark", tmp_path / "model.pt"
    content = {"a": Calls(subprocess.call, [sys.executable, "-c", f"open({str(mark)!r}, 'w')"])}
    if form == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(TeacherError, match=r"model\.pt" if form == "pickle" else r"commands\.call") as caught:
        load_teacher(path)
    assert not mark.exists()
    assert not {"\n", "\x1b"} & set(str(caught.value))


def test_a_verification_set_is_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "lfw.bin"
    path.write_bytes(pickle.dumps(([b"jpeg"] * 2, [True]), protocol=2))
    with pytest.raises(TeacherError, match=r"lfw\.bin"):
        load_teacher(path)


def test_a_whole_pickled_module_asks_for_its_state_dict(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match=r"save its state_dict\(\)"):
        load_teacher(saved(tmp_path, nn.Linear(2, 2)))


def test_a_flipped_bit_in_a_weight_is_found_by_its_checksum(tmp_path: Path) -> None:
    path = saved(tmp_path, {"a": torch.arange(1000.0)})
    content = bytearray(path.read_bytes())
    content[content.find(torch.arange(1000.0).numpy().tobytes()) + 402] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(TeacherError, match=r"checksum of record '.*data/0' is wrong"):
        read_content(path)


@pytest.mark.parametrize("claimed", [b"J\x00\x00\x00\x10", b"J\xff\xff\xff\x7f"])
def test_a_tensor_larger_than_its_record_is_refused(tmp_path: Path, claimed: bytes) -> None:
    path = saved(tmp_path, {"a": torch.zeros(1000)})
    with zipfile.ZipFile(path) as archive:
        records = {record.filename: archive.read(record) for record in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, content.replace(b"M\xe8\x03", claimed) if name.endswith("data.pkl") else content)
    with pytest.raises(TeacherError, match="damaged or not a PyTorch checkpoint"):
        read_content(path)


def test_mangled_files_end_in_an_error_of_ours(tmp_path: Path) -> None:
    stream = io.BytesIO()
    torch.save({"a": torch.arange(10.0), "b": torch.ones(2, 2)}, stream)
    whole = stream.getvalue()
    generator = torch.Generator().manual_seed(0)
    path = tmp_path / "model.pt"
    refused = 0
    for _ in range(100):
        content = bytearray(whole)
        for place, value in torch.randint(0, 1 << 30, (2, 2), generator=generator).tolist():
            content[place % len(content)] = value % 256
        path.write_bytes(bytes(content))
        try:
            state = read_content(path)
        except TeacherError:
            refused += 1
        else:
            assert all(
                isinstance(tensor, Tensor) for tensors in state_dicts(state).values() for tensor in tensors.values()
            )
    assert refused > 50
