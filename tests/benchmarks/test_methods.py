"""The methods' benchmark: every installed method but SH-KD trains the same student."""

from importlib import metadata

import pytest
import torch

from arcface_kd import registry
from benchmarks import methods

INSTALLED = ("adadistill", "embedding", "gkd", "shkd")


@pytest.mark.slow
def test_tiny(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    entry_points = registry.entry_points

    def some(group: str) -> dict[str, metadata.EntryPoint]:
        found = entry_points(group)
        return {name: found[name] for name in found if group != registry.METHODS or name in INSTALLED}

    monkeypatch.setattr(registry, "entry_points", some)
    rows = methods.run(methods.TINY, torch.device("cpu"))
    values = {row.provider: row.value for row in rows}
    assert set(values) == {"alone", "adadistill+embedding", "adadistill", "embedding", "gkd"}
    assert values["alone"] == 1
    assert all(value > 0 for value in values.values())
    assert {row.metric for row in rows} == {"step_over_alone"}
    assert "thin_r10->thin_r10, C=8 B=4 D=16" in capsys.readouterr().out
