"""The learned classifier's benchmark against the host's own head."""

from pathlib import Path

import pytest
import torch
from torch import distributed

from benchmarks import learned
from tests.make_believe_gpu import make_believe_gpu

CPU = torch.device("cpu")


@pytest.mark.trainer
def test_host_and_ours_are_compared_on_the_same_loss(
    arcface_torch: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ARCFACE_TORCH", str(arcface_torch))
    monkeypatch.setattr(learned, "can_measure", lambda device: False)
    rows = learned.run(learned.TINY, CPU)
    assert {(row.provider, row.metric) for row in rows} == {("arcface_kd", "seconds"), ("arcface_torch", "seconds")}
    assert "never slower than arcface_torch" in capsys.readouterr().out
    assert not distributed.is_initialized()


def test_a_folder_without_the_host_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ARCFACE_TORCH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"has no losses\.py; it should name recognition/arcface_torch"):
        learned.run(learned.TINY, CPU)
    assert not distributed.is_initialized()


def test_on_a_gpu_the_hosts_head_stands_on_nccl(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    opened: list[str] = []
    monkeypatch.setattr(distributed, "init_process_group", lambda backend, **_: opened.append(backend))
    with pytest.raises(FileNotFoundError):
        learned.arcface_torch_step(learned.TINY, torch.device("cuda"), tmp_path)
    assert opened == ["nccl"]


def test_a_step_does_not_wait_for_the_gpu() -> None:
    with make_believe_gpu() as record:
        step = learned.arcface_kd_step(learned.TINY, torch.device("cuda"))
        for _ in range(2):
            record.clear()
            step()
    assert record.launches
    assert not record.syncs


def test_heads_that_compute_something_else_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ARCFACE_TORCH", raising=False)
    monkeypatch.setattr(learned, "dense_twin_step", lambda sizes, device: lambda: 1.0)
    with pytest.raises(RuntimeError, match="do not compute the same"):
        learned.run(learned.TINY, CPU)
