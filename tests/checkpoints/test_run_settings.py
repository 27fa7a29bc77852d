"""What makes two ranks, or two parts of a run, one and the same."""

from pathlib import Path

import pytest
import torch

from arcface_kd.checkpoints.run_settings import as_tensor, changes, from_tensor, require_same_run
from arcface_kd.data.dataset import open_dataset
from arcface_kd.data.fingerprint import outline
from arcface_kd.errors import CheckpointError
from tests.data.record_sets import insightface_records, write_records

BEGUN = {"seed": 1, "margin": (1.0, 0.5, 0.0), "teacher": "a" * 64, "data": None, "kd": "adadistill"}


def test_what_is_the_same_or_not_known_is_no_change() -> None:
    # Lists and tuples are one, and what one side does not know is not held against the other.
    assert changes(BEGUN, {**BEGUN, "margin": [1.0, 0.5, 0.0], "data": "b" * 64}) == []
    assert changes({}, BEGUN) == []
    assert changes({**BEGUN, "gone": 1}, {**BEGUN, "new": 2, "teacher": None}) == []
    require_same_run(BEGUN, dict(BEGUN))


def test_all_that_differs_is_named_in_one_line() -> None:
    with pytest.raises(CheckpointError) as caught:
        require_same_run(BEGUN, {**BEGUN, "seed": 2, "teacher": "c" * 64, "kd": "k" * 100})
    assert str(caught.value) == (
        "cannot resume with changed settings: seed was 1 and is now 2; teacher was aaaaaaaa... and "
        f"is now cccccccc...; kd was adadistill and is now {'k' * 77}...; set them back, or give another output"
    )


def test_a_state_of_tensors_keeps_them() -> None:
    kept = as_tensor(BEGUN)
    assert kept.dtype == torch.uint8
    assert changes(from_tensor(kept), BEGUN) == []
    assert from_tensor(kept) == {**BEGUN, "margin": [1.0, 0.5, 0.0]}


@pytest.mark.parametrize(
    "state",
    [
        *(torch.zeros(0), torch.tensor([91, 93], dtype=torch.uint8), torch.full((9,), 255, dtype=torch.uint8)),
        *(torch.full((100_000,), 91, dtype=torch.uint8), {"seed": 1}, None),
    ],
    ids=["nothing", "a list", "no text", "deep", "a mapping", "None"],
)
def test_a_damaged_state_is_refused(state: object) -> None:
    with pytest.raises(CheckpointError, match=r"does not hold the run's settings .*: it is damaged"):
        from_tensor(state)


def test_a_data_set_is_known_by_its_records(tmp_path: Path) -> None:
    first, same, other = (
        open_dataset(write_records(tmp_path / name, insightface_records(sizes)))
        for name, sizes in (("first", [3, 2]), ("same", [3, 2]), ("other", [2, 2]))
    )
    assert outline(first) == outline(same)
    assert outline(first) != outline(other)
    assert outline(open_dataset("synthetic")) != outline(first)
