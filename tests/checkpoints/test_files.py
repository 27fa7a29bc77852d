"""Checkpoints of several ranks: all of one step, wherever their saving is cut off."""

import itertools
import shutil
import struct
from pathlib import Path

import pytest
import torch

from arcface_kd.checkpoints.files import (
    HEAD,
    checkpoint_file,
    checkpoints_in_force,
    finish_saving,
    read_checkpoint,
    save_checkpoint,
)
from arcface_kd.checkpoints.shards import merge_head, open_shards
from arcface_kd.distributed.class_shard import ClassShard
from arcface_kd.distributed.ranks import RankGroup
from arcface_kd.errors import CheckpointError

RANKS, CLASSES = 3, 7


def state(rank: int, step: int, ranks: int = RANKS) -> dict[str, object]:
    shard = ClassShard(CLASSES, rank, ranks)
    head = {
        "class_range": torch.tensor([shard.start, shard.start + shard.size, CLASSES]),
        "step": torch.tensor(step),
        "methods.classifier.weight": torch.full((shard.size, 4), float(step)),
    }
    return {"epoch": step, "global_step": step, HEAD: head}


def write(path: Path, rank: int, step: int) -> None:
    torch.save(state(rank, step), path)


def waiting(folder: Path, rank: int) -> Path:
    return folder / f"checkpoint_gpu_{rank}.pt.next"


def steps(folder: Path) -> list[int]:
    return [read_checkpoint(path)["global_step"] for path in checkpoints_in_force(folder).values()]


def test_one_rank_has_nobody_to_wait_for(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, state(0, 4, 1), RankGroup(alone=True))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint_gpu_0.pt"]
    assert steps(tmp_path) == [4]


@pytest.mark.parametrize("written", range(RANKS))
def test_cut_off_before_all_are_written_the_old_ones_are_in_force(tmp_path: Path, written: int) -> None:
    for rank in range(RANKS):
        write(checkpoint_file(tmp_path, rank), rank, 5)
    for rank in range(written + 1):
        write(waiting(tmp_path, rank), rank, 10)
    assert steps(tmp_path) == [5, 5, 5]
    assert open_shards(tmp_path).class_centers(0, CLASSES).unique().tolist() == [5.0]
    finish_saving(tmp_path)
    assert len(list(tmp_path.iterdir())) == RANKS
    assert steps(tmp_path) == [5, 5, 5]


@pytest.mark.parametrize("moved", [c for n in (1, 2, 3) for c in itertools.combinations(range(RANKS), n)], ids=str)
def test_cut_off_while_they_move_the_new_ones_are_in_force(tmp_path: Path, moved: tuple[int, ...]) -> None:
    for rank in range(RANKS):
        write(checkpoint_file(tmp_path, rank), rank, 5)
        write(waiting(tmp_path, rank), rank, 10)
    for rank in moved:
        waiting(tmp_path, rank).replace(checkpoint_file(tmp_path, rank))
    assert steps(tmp_path) == [10, 10, 10]
    # Readers see them so before any run has gone on.
    assert merge_head(tmp_path, tmp_path / "head.pt") == (CLASSES, 4)
    assert torch.load(tmp_path / "head.pt", weights_only=True)["weight"].unique().tolist() == [10.0]
    finish_saving(tmp_path)
    finish_saving(tmp_path)
    assert not list(tmp_path.glob("*.next"))
    assert steps(tmp_path) == [10, 10, 10]


def test_the_first_saving_of_all_counts_when_one_is_in_place(tmp_path: Path) -> None:
    for rank in range(RANKS):
        write(waiting(tmp_path, rank), rank, 5)
    assert checkpoints_in_force(tmp_path) == {}
    whole = shutil.copytree(tmp_path, tmp_path / "begun")
    waiting(whole, 1).replace(checkpoint_file(whole, 1))
    assert steps(whole) == [5, 5, 5]
    finish_saving(tmp_path)
    assert not list(tmp_path.glob("*.pt*"))


def test_a_run_that_begins_anew_takes_away_what_waits(tmp_path: Path) -> None:
    write(checkpoint_file(tmp_path, 0), 0, 5)
    write(waiting(tmp_path, 1), 1, 5)
    finish_saving(tmp_path, keep=False)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint_gpu_0.pt"]


def test_a_flipped_bit_is_found_by_its_checksum(tmp_path: Path) -> None:
    path = checkpoint_file(tmp_path, 0)
    write(path, 0, 5)
    data = bytearray(path.read_bytes())
    place = data.find(torch.full((3, 4), 5.0).numpy().tobytes())
    assert place > 0
    data[place + 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"checkpoint_gpu_0\.pt cannot be read as .*: checksum of record"):
        read_checkpoint(path)
    # Another file under the same name is looked at anew.
    write(path, 0, 6)
    assert read_checkpoint(path)["global_step"] == 6


def test_an_archive_that_claims_several_disks_is_one_line(tmp_path: Path) -> None:
    path = checkpoint_file(tmp_path, 0)
    write(path, 0, 5)
    data = path.read_bytes()
    path.write_bytes(data[:-22] + b"PK\x06\x07" + struct.pack("<LQL", 0, 0, 2) + data[-22:])
    with pytest.raises(CheckpointError, match=r"checkpoint_gpu_0\.pt cannot be read as a checkpoint: damaged"):
        read_checkpoint(path)


def test_a_compressed_file_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    import zipfile

    write(tmp_path / "whole.pt", 0, 5)
    path = checkpoint_file(tmp_path, 0)
    with zipfile.ZipFile(tmp_path / "whole.pt") as whole, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
        for record in whole.infolist():
            content = whole.read(record) if not record.filename.endswith("/data/2") else bytes(1 << 26)
            bomb.writestr(record.filename, content)
    with pytest.raises(CheckpointError, match=r"is compressed, which torch\.save never does"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("global_step", torch.tensor([1, 2]), "holds a Tensor as global_step"),
        ("global_step", [1], "holds a list as global_step"),
        ("epoch", "3", "holds a str as epoch"),
        ("state_dict_backbone", [1], "holds a list as state_dict_backbone"),
        ("state_optimizer", None, "holds a NoneType as state_optimizer"),
        ("state_lr_scheduler", 5, "holds a int as state_lr_scheduler"),
        (HEAD, {1: torch.zeros(1)}, f"holds a {HEAD} whose entries are not named by text"),
        (HEAD, {"weight": torch.zeros(2, device="meta")}, "tensor 'weight' is not a plain dense tensor"),
        # torch 2.14 refuses some sparse tensors itself.
        (
            HEAD,
            {"weight": torch.eye(2).to_sparse()},
            "'weight' is not a plain dense tensor|[Ss]parse tensor inv",
        ),
        (HEAD, {"weight": torch.ones(1).expand(1 << 40)}, "has only 4 bytes in the file"),
        ("more", [({"deep": (torch.ones(1).expand(9),)},)], r"of shape \(9,\) has only 4 bytes in the file"),
    ],
    ids=str,
)
def test_entries_that_are_something_else_are_named(tmp_path: Path, entry: str, value: object, message: str) -> None:
    path = checkpoint_file(tmp_path, 0)
    torch.save({**state(0, 5, 1), entry: value}, path)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_checkpoint(path)
    assert str(caught.value).startswith(str(path))


def test_a_list_that_holds_itself_is_looked_at_once(tmp_path: Path) -> None:
    own: list[object] = []
    own.extend([own, own])
    torch.save({**state(0, 5, 1), "more": own}, checkpoint_file(tmp_path, 0))
    assert read_checkpoint(checkpoint_file(tmp_path, 0))["global_step"] == 5
