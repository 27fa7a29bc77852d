"""The order of an epoch, its mirrored images, its batches and the host's function, against what the host does."""

import gc
import math
import runpy
import sys
import threading
import time
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arcface_kd.data import loader as loader_module
from arcface_kd.data.dataset import RecordDataset, View
from arcface_kd.data.loader import FaceLoader, _normalise, get_dataloader
from arcface_kd.data.sampler import ViewSampler, flips
from arcface_kd.errors import ConfigError, DataError
from tests.data.batches import epoch_of
from tests.data.record_sets import encoded, insightface_records, one_line, plain_records, record, write_records

# The order and the flips --------------------------------------------------------------------------------------------


def host_order(size: int, rank: int, world_size: int, seed: int, epoch: int, shuffle: bool) -> list[int]:
    """What the host's DistributedSampler does: permute, repeat to a multiple of the ranks, take every n-th."""
    shuffled = torch.randperm(size, generator=torch.Generator().manual_seed(epoch + seed)).tolist()
    indices = shuffled if shuffle else list(range(size))
    each = math.ceil(size / world_size)
    while len(indices) < each * world_size:
        indices = indices + indices
    return indices[: each * world_size][rank::world_size]


@settings(max_examples=80, deadline=None)
@given(
    size=st.integers(1, 60),
    world_size=st.integers(1, 70),
    seed=st.integers(0, 2**31),
    epoch=st.integers(0, 40),
    shuffle=st.booleans(),
)
def test_the_order_is_the_hosts(size: int, world_size: int, seed: int, epoch: int, shuffle: bool) -> None:
    for rank in {0, world_size // 2, world_size - 1}:
        sampler = ViewSampler(size, rank=rank, world_size=world_size, seed=seed, shuffle=shuffle)
        sampler.set_epoch(epoch)
        views = list(sampler)
        assert [view.index for view in views] == host_order(size, rank, world_size, seed, epoch, shuffle)
        assert len(views) == len(sampler)
        assert all(type(view) is View and type(view.index) is int and type(view.flipped) is bool for view in views)


@pytest.mark.trainer
def test_the_order_is_that_of_the_hosts_own_sampler(arcface_torch: Path) -> None:
    host = runpy.run_path(str(arcface_torch / "utils" / "utils_distributed_sampler.py"))
    for epoch, rank in product(range(3), range(3)):
        theirs = host["DistributedSampler"](list(range(50)), num_replicas=3, rank=rank, seed=2048)
        mine = ViewSampler(50, rank=rank, world_size=3, seed=2048)
        theirs.set_epoch(epoch)
        mine.set_epoch(epoch)
        assert [view.index for view in mine] == list(theirs)


def test_a_long_order_goes_through_pieces() -> None:
    sampler = ViewSampler(40_000, seed=5)
    views = list(sampler)
    assert sorted(view.index for view in views) == list(range(40_000))
    expected = flips(np.array([view.index for view in views]), seed=5, epoch=0)
    assert [view.flipped for view in views] == expected.tolist()


def scalar_flip(index: int, seed: int, epoch: int) -> bool:
    """Splitmix64 in Python's own whole numbers."""
    word = (1 << 64) - 1

    def mix(value: int) -> int:
        value = (value + 0x9E3779B97F4A7C15) & word
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & word
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & word
        return value ^ (value >> 31)

    return mix(mix(index) ^ mix(mix(seed & word) ^ (epoch & word))) >> 63 == 1


@settings(max_examples=80, deadline=None)
@given(
    indices=st.lists(st.integers(0, 2**40), min_size=1, max_size=20),
    seed=st.integers(-(2**63), 2**63),
    epoch=st.integers(0, 2**31),
)
def test_flips_are_those_of_the_scalar_hash(indices: list[int], seed: int, epoch: int) -> None:
    expected = [scalar_flip(index, seed, epoch) for index in indices]
    assert flips(np.array(indices), seed=seed, epoch=epoch).tolist() == expected


def test_flips_are_fair_and_fresh_every_epoch_and_seed() -> None:
    indices = np.arange(100_000)
    drawn = [flips(indices, seed=seed, epoch=epoch) for seed in (0, 1, 2048) for epoch in (0, 1, 2)]
    for place, one in enumerate(drawn):
        # Six standard deviations of a fair coin.
        assert abs(one.mean() - 0.5) < 6 * 0.5 / np.sqrt(len(indices))
        others = [*(np.roll(one, shift) for shift in (1, 2, 128)), *drawn[:place]]
        assert all(abs((one == other).mean() - 0.5) < 0.01 for other in others)


def test_flips_do_not_depend_on_ranks() -> None:
    def seen(world_size: int) -> set[View]:
        samplers = [ViewSampler(100, rank=rank, world_size=world_size, seed=3) for rank in range(world_size)]
        for sampler in samplers:
            sampler.set_epoch(7)
        return {view for sampler in samplers for view in sampler}

    assert seen(1) == seen(3) == seen(8)


def test_plain_views() -> None:
    assert [view[:2] for view in ViewSampler(3, shuffle=False, flip=False)] == [(0, False), (1, False), (2, False)]


@pytest.mark.parametrize(("size", "rank", "world_size"), [(5, 1, 1), (5, -1, 2), (5, 0, 0), (0, 0, 1)])
def test_impossible_samplers_are_refused(size: int, rank: int, world_size: int) -> None:
    with pytest.raises(ConfigError, match=r"rank|nothing to sample from"):
        ViewSampler(size, rank=rank, world_size=world_size)


# Batches ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def faces(tmp_path: Path) -> RecordDataset:
    return RecordDataset(write_records(tmp_path, insightface_records([3, 4, 4])))


def host_images(faces: RecordDataset, views: list[View]) -> torch.Tensor:
    """ToTensor and Normalize of the host's transform, image by image."""
    half = torch.full((3, 1, 1), 0.5)
    return torch.stack(
        [faces[view].image.contiguous().to(torch.float32).div(255).sub(half).div(half) for view in views]
    )


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("drop_last", [True, False])
def test_batches_are_the_hosts(faces: RecordDataset, workers: int, drop_last: bool) -> None:
    sampler = ViewSampler(len(faces), seed=11)
    loader = FaceLoader(faces, batch_size=4, sampler=sampler, num_workers=workers, drop_last=drop_last)
    assert loader.faces is faces
    assert loader.sampler is sampler
    for epoch in (0, 1, 0):
        loader.sampler.set_epoch(epoch)
        views = list(sampler)
        batches = epoch_of(loader)
        assert [len(labels) for _, labels, _ in batches] == ([4, 4] if drop_last else [4, 4, 3])
        assert len(loader) == len(batches)
        for number, (images, labels, seen) in enumerate(batches):
            mine = views[4 * number : 4 * number + 4]
            expected = host_images(faces, mine)
            kinds = [tensor.dtype for tensor in (images, labels, seen.index, seen.flipped)]
            assert kinds == [torch.float32, torch.int64, torch.int64, torch.bool]
            assert images.is_contiguous()
            assert torch.equal(images, expected)
            assert labels.tolist() == [faces.label(view.index) for view in mine]
            assert list(zip(seen.index.tolist(), seen.flipped.tolist(), strict=True)) == [view[:2] for view in mine]


def test_every_pixel_value_is_the_hosts_to_the_bit() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3).reshape(1, 16, 16, 3)
    values = pixels.permute(0, 3, 1, 2)
    expected = values.to(torch.float32).div(255).sub(torch.tensor(0.5)).div(torch.tensor(0.5))
    assert torch.equal(_normalise(pixels), expected)
    assert expected.aminmax() == (-1, 1)


def test_spawned_workers(faces: RecordDataset) -> None:
    plain = epoch_of(FaceLoader(faces, batch_size=4, num_workers=0))
    loader = FaceLoader(faces, batch_size=4, num_workers=1)
    loader.multiprocessing_context = "spawn"
    for (mine, *_), (theirs, *_) in zip(epoch_of(loader), plain, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_iteration_may_be_left_early(faces: RecordDataset, workers: int) -> None:
    loader = FaceLoader(faces, batch_size=2, num_workers=workers, drop_last=False)
    whole = [labels.tolist() for _, labels in loader]
    for stop in (0, 1, 3):
        for number, _ in enumerate(loader):
            if number == stop:
                break
    assert [labels.tolist() for _, labels in loader] == whole


def test_the_next_batch_is_read_while_the_present_one_is_used(faces: RecordDataset) -> None:
    read: list[int] = []

    class Watched(RecordDataset):
        def pixels(self, view: View) -> tuple[int, np.ndarray]:
            read.append(view.index)
            return super().pixels(view)

    watched = Watched(faces.reader.rec_path.parent)
    batches = iter(FaceLoader(watched, batch_size=2, num_workers=0))
    next(batches)
    deadline = time.monotonic() + 30
    while len(read) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert read == [0, 1, 2, 3]
    next(batches)
    del batches
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("face-loader")]


def test_an_iteration_may_be_collected_in_its_own_thread(faces: RecordDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    faults: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", faults.append)
    given_up, collected = threading.Event(), threading.Event()

    class Collecting(RecordDataset):
        def pixels(self, view: View) -> tuple[int, np.ndarray]:
            if view.index == 2:
                given_up.wait(30)
                gc.collect()
                collected.set()
            return super().pixels(view)

    others = threading.enumerate()
    gc.disable()
    try:
        batches = iter(FaceLoader(Collecting(faces.reader.rec_path.parent), batch_size=2, num_workers=0))
        next(batches)
        (reader,) = (thread for thread in threading.enumerate() if thread not in others)
        cycle: list[object] = [batches]
        cycle.append(cycle)
        del batches, cycle
        given_up.set()
        assert collected.wait(30)
    finally:
        gc.enable()
    reader.join(30)
    assert not reader.is_alive()
    assert not faults


def test_loading_leaves_the_runs_random_numbers_alone(faces: RecordDataset) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    for workers in (0, 1):
        epoch_of(FaceLoader(faces, batch_size=4, num_workers=workers))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_record_is_one_clear_line(tmp_path: Path, workers: int) -> None:
    records = [*plain_records([0, 1, 2]), (3, record(3, 0.0, encoded(3)[:500])), *plain_records([0] * 4, first_key=4)]
    faces = RecordDataset(write_records(tmp_path, records))
    loader = FaceLoader(faces, batch_size=2, num_workers=workers)
    seen: list[torch.Tensor] = []
    loader.on_batch = lambda views: seen.append(views.index)

    for _ in range(2):
        seen.clear()
        with pytest.raises(DataError) as caught:
            list(loader)
        assert one_line(caught.value).startswith(f"{faces.where(3)}: ")
        assert [index.tolist() for index in seen] == [[0, 1]]


def test_a_fault_of_ours_in_a_worker_is_not_hidden(faces: RecordDataset) -> None:
    class Faulty(RecordDataset):
        def pixels(self, view: View) -> tuple[int, np.ndarray]:
            raise ZeroDivisionError("a fault")

    for workers in (0, 1):
        loader = FaceLoader(Faulty(faces.reader.rec_path.parent), batch_size=2, num_workers=workers)
        with pytest.raises(ZeroDivisionError, match="a fault"):
            next(iter(loader))


@pytest.mark.parametrize(
    ("batch_size", "workers", "named"), [(0, 0, "batch_size"), (2, -1, "num_workers"), (12, 0, "11 records")]
)
def test_impossible_loaders_are_refused(faces: RecordDataset, batch_size: int, workers: int, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        FaceLoader(faces, batch_size=batch_size, num_workers=workers)


@pytest.mark.gpu
def test_batches_on_a_gpu_equal_those_on_the_cpu(faces: RecordDataset) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    here = epoch_of(FaceLoader(faces, batch_size=2, num_workers=0))
    there = epoch_of(FaceLoader(faces, batch_size=2, num_workers=1, device=torch.device("cuda", 0)))
    for (images, labels, views), (theirs, their_labels, their_views) in zip(here, there, strict=True):
        assert theirs.is_cuda
        assert torch.equal(images, theirs.cpu())
        assert torch.equal(labels, their_labels.cpu())
        assert torch.equal(views.index, their_views.index)


# The host's function ------------------------------------------------------------------------------------------------


def test_the_drop_in_is_called_as_the_host_calls_it(faces: RecordDataset) -> None:
    folder = str(faces.reader.rec_path.parent)
    loader = get_dataloader(folder, 0, 4, False, False, 9, 0)
    loader.sampler.set_epoch(2)
    seen = [view for *_, views in epoch_of(loader) for view in views.index.tolist()]
    assert seen == host_order(11, 0, 1, 9, 2, True)[:8]
    again = get_dataloader(root_dir=folder, local_rank=0, batch_size=4, num_workers=0)
    assert again.sampler.seed == 2048
    assert len(get_dataloader(folder, 0, 4, num_workers=0, drop_last=False)) == 3
    drawn = {get_dataloader(folder, 0, 4, seed=None, num_workers=0).sampler.seed for _ in range(4)}
    assert len(drawn) > 1


def test_classes_and_dali_are_checked(faces: RecordDataset) -> None:
    folder = str(faces.reader.rec_path.parent)
    with pytest.raises(DataError, match=r"num_classes is 2.*set num_classes to 3"):
        get_dataloader(folder, 0, 2, num_workers=0, num_classes=2)
    with pytest.raises(ConfigError, match="dali"):
        get_dataloader(folder, 0, 2, True)
    # As in the host.
    images, labels = next(iter(get_dataloader("synthetic", 0, 3, True, num_workers=0)))
    assert images.shape == (3, 3, 112, 112)
    assert labels.tolist() == [1, 1, 1]


@pytest.mark.parametrize("rank", [0, 1])
def test_what_is_odd_about_the_data_is_told_once(
    faces: RecordDataset, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, rank: int
) -> None:
    folder = faces.reader.rec_path.parent
    (folder / "property").write_text("of somebody else")
    ranks = SimpleNamespace(rank=rank, world_size=2, gather_objects=lambda seed: [seed] * 2)
    monkeypatch.setattr(loader_module, "RankGroup", lambda: ranks)
    get_dataloader(str(folder), 0, 1, num_workers=0)
    assert len(caplog.records) == 1 - rank
