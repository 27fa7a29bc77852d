"""Saving that is interrupted."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest
import torch

from arcface_kd.checkpoints import tensor_file
from arcface_kd.checkpoints.tensor_file import save_tensors
from arcface_kd.system.files import atomic_write


class Interrupted:
    """A file whose third writing Ctrl-C comes between."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream, self.writings = stream, 0

    def write(self, part: Any) -> int:
        self.writings += 1
        if self.writings == 3:
            raise KeyboardInterrupt
        return self.stream.write(part)


def test_ctrl_c_while_torch_writes_is_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tensors(tmp_path / "model.pt", {"weight": torch.zeros(3)})
    before = (tmp_path / "model.pt").read_bytes()

    @contextmanager
    def interrupted(path: str | os.PathLike[str]) -> Iterator[Interrupted]:
        with atomic_write(path) as stream:
            yield Interrupted(stream)

    monkeypatch.setattr(tensor_file, "atomic_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_tensors(tmp_path / "model.pt", {"weight": torch.ones(3)})
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]
    assert (tmp_path / "model.pt").read_bytes() == before
