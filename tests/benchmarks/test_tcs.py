"""The benchmark of TCS: three providers that train the same student, each measured for speed and memory."""

import pytest
import torch

from benchmarks import tcs
from benchmarks.peak_memory import can_measure
from benchmarks.record import Row

CPU = torch.device("cpu")


@pytest.mark.slow
def test_tiny(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcs, "peak_mb", lambda step, *_: 1.0 + len(str(step)))
    rows: list[Row] = tcs.run(tcs.TINY, CPU)
    values = {(row.provider, row.metric): row.value for row in rows}
    assert {row.size for row in rows} == {"C=12 B=4 D=16"}
    whose = "thin_r10->thin_r10"
    for other in ("alone", "online"):
        ratio = values[f"tcs {whose}", "images_per_second"] / values[f"{other} {whose}", "images_per_second"]
        assert values[f"tcs {whose}", f"speed_over_{other}"] == ratio
        if can_measure(CPU):
            ratio = values[f"tcs {whose}", "peak_mb"] / values[f"{other} {whose}", "peak_mb"]
            assert values[f"tcs {whose}", f"memory_over_{other}"] == ratio
    printed = capsys.readouterr().out
    assert "at least at 95% of the student alone" in printed
    assert ("at most 5% more memory" in printed) == can_measure(CPU)
