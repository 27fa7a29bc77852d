"""A run's head state read by other numbers of ranks, and joined into one file. No process group is needed for it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from arcface_kd.checkpoints.files import HEAD, checkpoint_file, read_checkpoint
from arcface_kd.checkpoints.head_state import fit_head_state, place_momentum, reshard_momentum
from arcface_kd.checkpoints.run_settings import as_tensor
from arcface_kd.checkpoints.shards import merge_head, open_shards
from arcface_kd.distributed.class_shard import ClassShard
from arcface_kd.errors import CheckpointError

DIMENSION = 4
ENTRY = "methods.classifier.weight"
CENTERS = "methods.adadistill.centers.weight"


def whole(num_classes: int, seed: int = 0) -> Tensor:
    return torch.randn(num_classes, DIMENSION, generator=torch.Generator().manual_seed(seed))


def head_state(shard: ClassShard, step: int, entry: str) -> dict[str, Tensor]:
    stop = shard.start + shard.size
    return {
        "class_range": torch.tensor([shard.start, stop, shard.num_classes]),
        "step": torch.tensor(step),
        entry: whole(shard.num_classes)[shard.start : stop].clone(),
    }


def save_run(folder: Path, num_classes: int, world_size: int, step: int = 7, entry: str = ENTRY, **more: Any) -> None:
    """What the ranks of a run leave: here without a backbone."""
    folder.mkdir(exist_ok=True)
    for rank in range(world_size):
        shard = ClassShard(num_classes, rank, world_size)
        state: dict[str, Any] = head_state(shard, step, entry)
        if entry == "weight":  # as arcface_torch's PartialFC saves it
            state = {"weight": state["weight"]}
        torch.save({"epoch": 1, "global_step": step, HEAD: state, **more}, checkpoint_file(folder, rank))


def fit(folder: Path | None, state: dict[str, Tensor], shard: ClassShard) -> dict[str, Tensor]:
    return dict(fit_head_state(state, shard, (ENTRY,), folder))


@pytest.mark.parametrize("num_classes", [4, 5, 11, 12])
@pytest.mark.parametrize("new", [1, 2, 3, 4])
@pytest.mark.parametrize("old", [1, 2, 3, 4])
def test_every_number_of_ranks_gets_its_classes(tmp_path: Path, old: int, new: int, num_classes: int) -> None:
    save_run(tmp_path, num_classes, old)
    for rank in range(new):
        shard = ClassShard(num_classes, rank, new)
        given = dict(read_checkpoint(checkpoint_file(tmp_path, min(rank, old - 1)))[HEAD])
        wanted = head_state(shard, 7, ENTRY)
        met = fit(tmp_path, given, shard)
        assert met.keys() == wanted.keys()
        assert all(torch.equal(met[name], wanted[name]) for name in wanted)


def test_as_many_ranks_as_before_take_their_own_state_as_it_is(tmp_path: Path) -> None:
    save_run(tmp_path, 11, 3)
    shard = ClassShard(11, 1, 3)
    given = head_state(shard, 7, ENTRY)
    assert fit_head_state(given, shard, (ENTRY,), tmp_path) is given
    assert fit_head_state(given, shard, (ENTRY,), None) is given
    assert fit_head_state(given, shard, (ENTRY,), tmp_path / "no_such_folder") is given


def test_only_the_rows_that_are_wanted_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_run(tmp_path, 12, 4)
    shards = open_shards(tmp_path)
    touched: list[int] = []
    own = type(shards)._shard

    def watched(self: Any, rank: int, size: int, keys: tuple[Any, ...]) -> Tensor:
        touched.append(rank)
        return own(self, rank, size, keys)

    monkeypatch.setattr(type(shards), "_shard", watched)
    assert torch.equal(shards.rows(4, 8, HEAD, ENTRY), whole(12)[4:8])
    assert touched == [1, 2]


def test_rows_do_not_hold_on_to_the_file(tmp_path: Path) -> None:
    """arcface_torch writes over its checkpoints in place, under a mapping that is still there."""
    save_run(tmp_path, 6, 1)
    rows = open_shards(tmp_path).rows(1, 4, HEAD, ENTRY)
    assert rows.untyped_storage().nbytes() == 3 * DIMENSION * 4
    checkpoint_file(tmp_path, 0).write_bytes(b"")
    assert torch.equal(rows, whole(6)[1:4])


def test_files_that_an_earlier_run_on_more_ranks_has_left_are_not_read(tmp_path: Path) -> None:
    save_run(tmp_path, 12, 4, step=5)
    save_run(tmp_path, 12, 2, step=9)
    assert open_shards(tmp_path).world_size == 2
    met = fit(tmp_path, head_state(ClassShard(12, 0, 2), 9, ENTRY), ClassShard(12))
    assert torch.equal(met[ENTRY], whole(12))


def test_more_ranks_than_before_may_each_be_given_a_copy_of_the_first_file(tmp_path: Path) -> None:
    """Where the host looks for a file of its own for each rank."""
    save_run(tmp_path, 12, 2)
    for rank in (2, 3):
        checkpoint_file(tmp_path, rank).write_bytes(checkpoint_file(tmp_path, 0).read_bytes())
    for rank in range(4):
        given = dict(read_checkpoint(checkpoint_file(tmp_path, rank))[HEAD])
        assert torch.equal(fit(tmp_path, given, ClassShard(12, rank, 4))[ENTRY], whole(12)[3 * rank : 3 * rank + 3])


def test_a_file_that_an_earlier_run_has_left_is_not_taken_for_this_rank_s_own(tmp_path: Path) -> None:
    """4 ranks, then 3, then 4 again: rank 3 finds a file that fits its classes, but of the first run."""
    save_run(tmp_path, 12, 4, step=5)
    save_run(tmp_path, 12, 3, step=9)
    left = dict(read_checkpoint(checkpoint_file(tmp_path, 3))[HEAD])
    with pytest.raises(CheckpointError, match=r"state is of step 5, those in .* of step 9: remove .* from 3 on"):
        fit(tmp_path, left, ClassShard(12, 3, 4))


def test_files_of_torch_before_1_6_are_read_without_a_mapping(tmp_path: Path) -> None:
    save_run(tmp_path, 6, 2)
    for rank in range(2):
        path = checkpoint_file(tmp_path, rank)
        torch.save(torch.load(path), path, _use_new_zipfile_serialization=False)
    assert torch.equal(open_shards(tmp_path).rows(0, 6, HEAD, ENTRY), whole(6))


# ---- what does not belong together


def test_no_checkpoint_at_all_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"checkpoint_gpu_0\.pt is missing"):
        open_shards(tmp_path)
    with pytest.raises(CheckpointError, match=r"classes 0 to 5, this rank takes 0 to 11, .*no run folder is known"):
        fit(None, head_state(ClassShard(12, 0, 2), 7, ENTRY), ClassShard(12))
    with pytest.raises(CheckpointError, match=r"other ranks' checkpoints are not there: .*"):
        fit(tmp_path, head_state(ClassShard(12, 0, 2), 7, ENTRY), ClassShard(12))


@pytest.mark.parametrize(
    ("num_classes", "world_size", "step", "said"),
    [
        (12, 3, 7, r"checkpoint_gpu_1\.pt holds classes 4 to 7 of 12; wanted classes from 6 on, of 12"),
        (14, 2, 7, r"checkpoint_gpu_1\.pt holds classes 7 to 13 of 14; wanted classes from 6 on, of 12"),
        (12, 2, 8, r"checkpoint_gpu_1\.pt was written at step 8, checkpoint_gpu_0\.pt at step 7"),
    ],
)
def test_a_file_of_another_run_is_named(
    tmp_path: Path, num_classes: int, world_size: int, step: int, said: str
) -> None:
    save_run(tmp_path / "run", 12, 2)
    save_run(tmp_path / "other", num_classes, world_size, step)
    checkpoint_file(tmp_path / "other", 1).replace(checkpoint_file(tmp_path / "run", 1))
    with pytest.raises(CheckpointError, match=said):
        open_shards(tmp_path / "run")


@pytest.mark.parametrize("content", [b"", b"no checkpoint at all", b"PK\x03\x04 half a zip file", None], ids=str)
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes | None) -> None:
    save_run(tmp_path, 2000, 2)
    path = checkpoint_file(tmp_path, 1)
    path.write_bytes(path.read_bytes()[:-3000] if content is None else content)
    with pytest.raises(CheckpointError, match=r"checkpoint_gpu_1\.pt cannot be read as a checkpoint: .") as error:
        open_shards(tmp_path)
    assert "\n" not in str(error.value)


class _Evil:
    """Would run code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return eval, ("open('harmed', 'w').close()",)


def test_a_file_that_would_run_code_is_refused_and_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_run(tmp_path, 12, 1, extra=_Evil())
    with pytest.raises(CheckpointError, match=r"checkpoint_gpu_0\.pt cannot be read as a checkpoint"):
        open_shards(tmp_path)
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize("content", [[1, 2], {"weight": torch.ones(2)}, {HEAD: torch.ones(2)}])
def test_a_torch_file_that_is_no_checkpoint_is_named(tmp_path: Path, content: object) -> None:
    torch.save(content, checkpoint_file(tmp_path, 0))
    with pytest.raises(CheckpointError, match=r"checkpoint_gpu_0\.pt holds no state_dict_softmax_fc"):
        open_shards(tmp_path)


@pytest.mark.parametrize(
    "met",
    [
        [0, 5, 5],
        None,
        "abc",
        torch.tensor(5),
        torch.tensor([0, 5]),
        torch.tensor([0, 5, 5, 5]),
        torch.tensor([[0, 5, 5]]),
        torch.tensor([0.0, 5.0, 5.0]),
        torch.tensor([0j, 5, 5]),
        torch.tensor([False, True, True]),
    ],
    ids=str,
)
def test_a_class_range_that_is_none_is_named(tmp_path: Path, met: object) -> None:
    save_run(tmp_path, 5, 1)
    path = tmp_path / "checkpoint_gpu_0.pt"
    content = torch.load(path, weights_only=True)
    content["state_dict_softmax_fc"]["class_range"] = met
    torch.save(content, path)
    with pytest.raises(
        CheckpointError, match=r"checkpoint_gpu_0\.pt holds a class_range that is not three whole numbers"
    ):
        open_shards(tmp_path)
    with pytest.raises(CheckpointError, match="head holds a class_range that is not three whole numbers"):
        fit(None, content["state_dict_softmax_fc"], ClassShard(5, 0, 1))


@pytest.mark.parametrize("centers", [torch.ones(5), torch.ones(5, 4, 1), torch.ones(5, 4).int()], ids=str)
def test_what_are_no_class_centers_is_not_joined(tmp_path: Path, centers: Tensor) -> None:
    save_run(tmp_path, 5, 1)
    path = tmp_path / "checkpoint_gpu_0.pt"
    content = torch.load(path, weights_only=True)
    content["state_dict_softmax_fc"][ENTRY] = centers
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"wanted class centers \(classes, dimension\) in floating point"):
        merge_head(tmp_path, tmp_path / "head.pt")
    assert not (tmp_path / "head.pt").exists()


def test_a_shard_with_fewer_rows_than_classes_is_named(tmp_path: Path) -> None:
    save_run(tmp_path, 12, 2)
    broken = torch.load(checkpoint_file(tmp_path, 1))
    broken[HEAD][ENTRY] = broken[HEAD][ENTRY][:-1].clone()
    torch.save(broken, checkpoint_file(tmp_path, 1))
    with pytest.raises(
        CheckpointError, match=r"checkpoint_gpu_1\.pt holds \(5, 4\) as .* for 6 classes: it is damaged"
    ):
        open_shards(tmp_path).rows(0, 12, HEAD, ENTRY)


def test_shards_of_another_dimension_or_format_are_named(tmp_path: Path) -> None:
    for change in (lambda w: w[:, :2].clone(), lambda w: w.double()):
        save_run(tmp_path, 12, 2)
        other = torch.load(checkpoint_file(tmp_path, 1))
        other[HEAD][ENTRY] = change(other[HEAD][ENTRY])
        torch.save(other, checkpoint_file(tmp_path, 1))
        with pytest.raises(CheckpointError, match=r"checkpoint_gpu_1\.pt holds \(6, .\) of .*other ranks"):
            open_shards(tmp_path).rows(0, 12, HEAD, ENTRY)


def test_a_method_that_one_rank_lacks_is_named(tmp_path: Path) -> None:
    save_run(tmp_path, 12, 2)
    save_run(tmp_path / "other", 12, 2, entry=CENTERS)
    checkpoint_file(tmp_path / "other", 1).replace(checkpoint_file(tmp_path, 1))
    with pytest.raises(
        CheckpointError, match=r"checkpoint_gpu_1\.pt holds no state_dict_softmax_fc\.methods\.classifier"
    ):
        open_shards(tmp_path).rows(0, 12, HEAD, ENTRY)


def test_a_head_of_other_classes_or_another_trainer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"the checkpoint's head has 12 classes, the run 13"):
        fit(tmp_path, head_state(ClassShard(12), 7, ENTRY), ClassShard(13))
    with pytest.raises(CheckpointError, match=r"head has weight and no class_range: .*began without --kd"):
        fit(tmp_path, {"weight": whole(12)}, ClassShard(12))


# ---- momentum


@pytest.mark.parametrize("new", [1, 2, 3])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_optimiser_s_state_follows_its_classes(tmp_path: Path, name: str, new: int) -> None:
    """Two ranks train a classifier shard and a replicated parameter; the next run has their momentum."""

    def rank_of(shard: ClassShard) -> tuple[nn.Parameter, nn.Parameter, torch.optim.Optimizer]:
        shared = nn.Parameter(torch.ones(3, DIMENSION))
        own = nn.Parameter(whole(11)[shard.start : shard.start + shard.size].clone())
        groups = [{"params": [shared]}, {"params": [own]}]
        if name == "sgd":
            return shared, own, torch.optim.SGD(groups, lr=0.1, momentum=0.9)
        return shared, own, torch.optim.AdamW(groups, lr=0.1)

    def train(shard: ClassShard, parts: tuple[nn.Parameter, nn.Parameter, torch.optim.Optimizer], step: int) -> None:
        shared, own, optimizer = parts
        shared.grad = torch.full_like(shared, float(step))
        own.grad = whole(11, seed=step)[shard.start : shard.start + shard.size].clone()
        optimizer.step()

    old = [ClassShard(11, rank, 2) for rank in range(2)]
    for rank, shard in enumerate(old):
        parts = rank_of(shard)
        for step in (1, 2):
            train(shard, parts, step)
        state = {**head_state(shard, 2, ENTRY), ENTRY: parts[1].detach()}
        torch.save(
            {"global_step": 2, HEAD: state, "state_optimizer": parts[2].state_dict(), "shared": parts[0].detach()},
            checkpoint_file(tmp_path, rank),
        )
    everything = ClassShard(11)
    uninterrupted = rank_of(everything)
    for step in (1, 2, 3):
        train(everything, uninterrupted, step)
    resumed = []
    for rank in range(new):
        shard = ClassShard(11, rank, new)
        checkpoint = read_checkpoint(checkpoint_file(tmp_path, min(rank, 1)))
        parts = rank_of(shard)
        with torch.no_grad():
            parts[0].copy_(checkpoint["shared"])
            parts[1].copy_(fit_head_state(checkpoint[HEAD], shard, (ENTRY,), tmp_path)[ENTRY])
        momentum = reshard_momentum([parts[1]], [parts[1]], shard, tmp_path)
        parts[2].load_state_dict(checkpoint["state_optimizer"])
        # Between the two, other optimisers may step.
        place_momentum(torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=1.0), momentum)
        assert momentum
        place_momentum(parts[2], momentum)
        assert not momentum
        train(shard, parts, 3)
        assert torch.equal(parts[0], uninterrupted[0])
        resumed.append(parts[1].detach())
    assert torch.equal(torch.cat(resumed), uninterrupted[1].detach())


def test_an_optimiser_that_was_not_resumed_gets_no_momentum(tmp_path: Path) -> None:
    own = nn.Parameter(whole(11))
    optimizer = torch.optim.SGD([own], lr=0.1, momentum=0.9)
    own.grad = torch.ones_like(own)
    optimizer.step()
    save_run(tmp_path, 11, 1, state_optimizer=optimizer.state_dict())
    fresh = torch.optim.SGD([own], lr=0.1, momentum=0.9)
    place_momentum(fresh, reshard_momentum([own], [own], ClassShard(11), tmp_path))
    fresh.step()
    assert torch.equal(fresh.state[own]["momentum_buffer"], own.grad)


@pytest.mark.parametrize("saved", [True, False])
def test_checkpoints_without_momentum_are_no_fault(tmp_path: Path, saved: bool) -> None:
    own = nn.Parameter(whole(11))
    optimizer = torch.optim.SGD([own], lr=0.1, momentum=0.9)
    state: dict[str, Any] = {"state_optimizer": optimizer.state_dict()} if saved else {}
    save_run(tmp_path, 11, 2, **state)
    assert not any(reshard_momentum([own], [own], ClassShard(11), tmp_path).values())
    own.grad = torch.ones_like(own)
    optimizer.step()
    assert torch.equal(own.detach(), whole(11) - 0.1)


def test_momentum_of_other_rows_is_named(tmp_path: Path) -> None:
    """The head's parameters are not the last ones of the optimiser that was saved."""
    own, last = nn.Parameter(whole(11)), nn.Parameter(torch.ones(3, DIMENSION))
    optimizer = torch.optim.SGD([own, last], lr=0.1, momentum=0.9)
    own.grad, last.grad = torch.ones_like(own), torch.ones_like(last)
    optimizer.step()
    save_run(tmp_path, 11, 1, state_optimizer=optimizer.state_dict())
    with pytest.raises(CheckpointError, match=r"\(3, 4\) as state_optimizer\.state\.1\.momentum_buffer for 11 classes"):
        reshard_momentum([own], [own], ClassShard(11), tmp_path)


# ---- one file


@pytest.mark.parametrize("entry", [ENTRY, CENTERS, "weight"])
@pytest.mark.parametrize(("num_classes", "world_size"), [(5, 1), (11, 3), (12, 4), (9, 4)])
def test_shards_of_ours_and_of_the_host_are_joined(
    tmp_path: Path, num_classes: int, world_size: int, entry: str
) -> None:
    save_run(tmp_path, num_classes, world_size, entry=entry)
    assert merge_head(tmp_path, tmp_path / "head.pt") == (num_classes, DIMENSION)
    merged = torch.load(tmp_path / "head.pt", weights_only=True)
    assert merged.keys() == {"weight", "num_classes"}
    assert merged["num_classes"] == num_classes
    assert torch.equal(merged["weight"], whole(num_classes))


def test_a_state_names_its_class_centers(tmp_path: Path) -> None:
    """Whatever a package of one's own calls them; none where it says that there are none."""
    entry = "methods.own.table"
    for named, joined in ((entry, True), (None, False)):
        state = {**head_state(ClassShard(5), 7, entry), "_extra_state": as_tensor({"class_centers": named})}
        torch.save({HEAD: state}, checkpoint_file(tmp_path, 0))
        if joined:
            assert merge_head(tmp_path, tmp_path / "head.pt") == (5, DIMENSION)
        else:
            with pytest.raises(CheckpointError, match="the head of own holds no class centers"):
                merge_head(tmp_path, tmp_path / "head.pt")


@pytest.mark.parametrize("entry", [ENTRY, "weight"])
def test_nothing_is_written_when_a_shard_is_missing(tmp_path: Path, entry: str) -> None:
    save_run(tmp_path, 12, 3, entry=entry)
    checkpoint_file(tmp_path, 1).unlink()
    with pytest.raises(CheckpointError, match=r"checkpoint_gpu_1\.pt is missing; .*save_all_states=True"):
        merge_head(tmp_path, tmp_path / "head.pt")
    assert not (tmp_path / "head.pt").exists()


def test_files_of_the_host_that_an_earlier_run_has_left_are_named(tmp_path: Path) -> None:
    save_run(tmp_path, 12, 4, step=5, entry="weight")
    save_run(tmp_path, 12, 3, step=9, entry="weight")
    with pytest.raises(CheckpointError, match=r"checkpoint_gpu_3\.pt was written at step 5, .* at step 9"):
        merge_head(tmp_path, tmp_path / "head.pt")


def test_files_of_the_host_that_are_cut_in_another_way_are_named(tmp_path: Path) -> None:
    save_run(tmp_path, 12, 2, entry="weight")
    save_run(tmp_path / "other", 20, 2, entry="weight")
    checkpoint_file(tmp_path / "other", 1).replace(checkpoint_file(tmp_path, 1))
    with pytest.raises(CheckpointError, match=r"checkpoint_gpu_0\.pt holds 6 classes where rank 0 of 2 has 8 of 16"):
        merge_head(tmp_path, tmp_path / "head.pt")


def test_a_head_without_class_centers_is_named(tmp_path: Path) -> None:
    state = {"class_range": torch.tensor([0, 5, 5]), "step": torch.tensor(1)}
    torch.save({HEAD: state}, checkpoint_file(tmp_path, 0))
    with pytest.raises(CheckpointError, match="no class centers that could be joined"):
        merge_head(tmp_path, tmp_path / "head.pt")
    torch.save({HEAD: {"bias": torch.ones(3)}}, checkpoint_file(tmp_path, 0))
    with pytest.raises(CheckpointError, match="holds no classifier"):
        merge_head(tmp_path, tmp_path / "head.pt")
