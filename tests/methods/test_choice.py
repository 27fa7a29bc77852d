"""Which method to take: the lines that fit some records, and the table that the documentation shows."""

from pathlib import Path

import numpy as np
import pytest

from arcface_kd.cli.main import main
from arcface_kd.methods.choice import CHOICES, Records, choices_for
from tests.data.record_sets import plain_records, write_records

DOCS = Path(__file__).parents[2] / "docs" / "methods" / "index.md"


@pytest.mark.parametrize(
    ("images", "unlabelled", "identities", "taken"),
    [
        (0, 50, 0, ["bank"]),
        (8, 0, 4, ["tcs"]),
        (60, 0, 4, ["embedding"]),
        (8, 90, 4, ["embedding"]),
        (40_000, 0, 20_000, ["adadistill", "arcdistill"]),
        (40_000, 9, 20_000, ["adadistill", "arcdistill", "adadistill+embedding"]),
    ],
)
def test_lines_that_fit(images: int, unlabelled: int, identities: int, taken: list[str]) -> None:
    labels = np.concatenate([np.arange(images) % max(1, identities), np.full(unlabelled, -1)])
    assert [choice.take.split()[1] for choice in choices_for(Records.of(labels))] == taken


def test_the_documentation_shows_the_same_table() -> None:
    text = DOCS.read_text(encoding="utf-8")
    for choice in CHOICES:
        assert f"| {choice.have} | `{choice.take}` | {choice.why} |" in text


def test_the_command_prints_the_line_for_the_images_at_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_records(tmp_path / "faces", plain_records([0, 0, 1]))
    write_records(tmp_path / "nobody", plain_records([-1, -1]))
    assert main(["methods", "--data", str(tmp_path / "nobody")]) == 0
    assert "--kd bank" in capsys.readouterr().out
    assert main(["methods", "--data", str(tmp_path / "faces"), str(tmp_path / "nobody")]) == 0
    told = capsys.readouterr().out
    assert "5 images, 2 identities, 2 images without a label" in told
    assert "embedding.labels=none" in told
    assert main(["methods", "--data", str(tmp_path / "none")]) != 0
