"""The methods' benchmark: every installed method trains the same student."""

import pytest
import torch

from arcface_kd import registry
from benchmarks import methods


@pytest.mark.slow
def test_tiny(capsys: pytest.CaptureFixture[str]) -> None:
    rows = methods.run(methods.TINY, torch.device("cpu"))
    values = {row.provider: row.value for row in rows}
    installed = set(registry.entry_points(registry.METHODS))
    assert set(values) == {"alone", "adadistill+embedding"} | installed - {"shkd"}
    assert values["alone"] == 1
    assert all(value > 0 for value in values.values())
    assert {row.metric for row in rows} == {"step_over_alone"}
    assert "thin_r18->thin_r18, C=8 B=4 D=16" in capsys.readouterr().out
