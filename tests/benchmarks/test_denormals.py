"""The benchmark of denormal weights, on a network of its own."""

import pytest
import torch

from benchmarks import denormals


def test_tiny(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ARCFACE_KD_REAL_DATA", raising=False)
    rows = denormals.run(denormals.TINY, torch.device("cpu"))
    assert [row.provider for row in rows] == ["as it is", "arcface_kd", "cleaned twin"]
    assert all(row.value > 0 and row.metric == "seconds" and row.size == "drawn B=2" for row in rows)
    # Half of 64 filters.
    assert "864 denormal weights" in capsys.readouterr().out
