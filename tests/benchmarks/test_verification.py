"""The benchmark of scoring: the loops in the place of InsightFace, the rows, and InsightFace's own module."""

from pathlib import Path

import pytest
import torch

from benchmarks import verification
from benchmarks.verification import TINY, host_verification, some_pairs

CPU = torch.device("cpu")


def test_against_the_loops(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("ARCFACE_TORCH", raising=False)
    rows = {(row.provider, row.metric): row for row in verification.run(TINY, CPU)}
    seconds = [rows[f"{provider}, accuracy", "seconds"].value for provider in ("arcface_kd", "loops")]
    assert rows["arcface_kd, accuracy", "speed_over_loops"].value == seconds[1] / seconds[0]
    assert len(rows) == 3
    assert {row.size for row in rows.values()} == {f"P={TINY.looped_pairs} D={TINY.dimension}"}
    printed = capsys.readouterr().out
    assert "ARCFACE_TORCH is not set" in printed
    assert "at least 20 times as fast as loops" in printed
    assert "held    accuracies of the folds equal those of loops to the last bit: equal" in printed


@pytest.mark.trainer
def test_against_insightface(
    arcface_torch: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ARCFACE_TORCH", str(arcface_torch))
    rows = {(row.provider, row.metric) for row in verification.run(TINY, CPU)}
    assert rows == {
        *(
            (f"{who}, {what}", "seconds")
            for who in ("arcface_kd", "insightface")
            for what in ("accuracy", "whole protocol")
        ),
        *((f"arcface_kd, {what}", "speed_over_insightface") for what in ("accuracy", "whole protocol")),
    }
    assert "held    accuracies of the folds equal those of insightface" in capsys.readouterr().out


@pytest.mark.trainer
def test_the_host_s_module_leaves_no_trace(arcface_torch: Path) -> None:
    import sys

    before = sys.modules.get("mxnet")
    module = host_verification(arcface_torch)
    assert module.calculate_roc
    assert sys.modules.get("mxnet") is before


def test_pairs_are_of_both_kinds_and_overlap() -> None:
    embeddings, is_same = some_pairs(200, 16)
    assert embeddings.shape == (400, 16)
    assert is_same.sum() == 100
    accuracy = verification.verify(embeddings, is_same).accuracy
    assert 0.55 < accuracy < 0.99
