"""Mutated files through every parser: no crash, no hang, no memory beyond a bound, nothing wrong accepted.

``ARCFACE_KD_FUZZ`` says how many files over all formats; the campaign of a release is 20,000.
"""

import os
import random
from pathlib import Path

import pytest

from tests.campaigns.parser_fuzz import FORMATS, campaign, mutated
from tests.forked import start, wait

FILES = int(os.environ.get("ARCFACE_KD_FUZZ", "2000"))
SEED = int(os.environ.get("ARCFACE_KD_FUZZ_SEED", "0"))

SHARES = {
    **{"records": 0.21, "pairs": 0.16, "images": 0.15, "cache": 0.12, "run": 0.08, "forged_run": 0.04},
    **{"state": 0.06, "forged_state": 0.04, "old_state": 0.04, "onnx": 0.04, "mxnet": 0.04},
    **{"components": 0.01, "names": 0.01},
}


def test_every_format_has_its_share() -> None:
    assert SHARES.keys() == FORMATS.keys()
    assert sum(SHARES.values()) == pytest.approx(1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FORMATS)
def test_mutated_files_end_in_a_message_or_in_the_truth(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    count = max(20, round(SHARES[kind] * FILES))
    process = start(campaign, kind, str(tmp_path / "work"), SEED, count, log=tmp_path / "log")
    (code,) = wait([process], 1200)
    progress = (tmp_path / "work" / "progress").read_text() if (tmp_path / "work" / "progress").exists() else "nothing"
    log = (tmp_path / "log").read_text()[-2000:]
    assert code in (0, 1), f"ended with {code} at {progress}: {log}"
    assert code == 0, (tmp_path / "work" / "faults").read_text()[:6000] or log
    with capsys.disabled():
        refused = (tmp_path / "work" / "refused").read_text()
        print(f"\n{kind}: {count} mutated files, {refused} of them refused by name (seed {SEED})")


def test_the_mutator_changes_files_and_repeats_itself() -> None:
    data = bytes(range(256)) * 4
    made = [mutated(data, random.Random(number)) for number in range(200)]
    assert made == [mutated(data, random.Random(number)) for number in range(200)]
    assert sum(content != data for content in made) > 190
    assert {len(content) > len(data) for content in made} == {True, False}
