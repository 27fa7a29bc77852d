"""Bad records on several ranks: the same number of steps everywhere, and one rank that tells of all."""

import logging
from pathlib import Path

from arcface_kd.data.loader import get_dataloader
from arcface_kd.data.sampler import ViewSampler
from arcface_kd.distributed.ranks import RankGroup
from tests.data.record_damage import no_image, offset_of
from tests.data.record_sets import insightface_records, write_records
from tests.distributed.pool import RankPool

IMAGES = 13


def _skip_on_ranks(ranks: RankGroup, folder: str) -> tuple[list[int], int, list[str]]:
    told: list[str] = []

    class Listener(logging.Handler):
        def emit(self, entry: logging.LogRecord) -> None:
            told.append(entry.getMessage())

    listener = Listener()
    logging.getLogger("arcface_kd.data.bad_records").addHandler(listener)
    try:
        # The ranks disagree on the seed on purpose: rank 0's counts.
        seed = 2048 + ranks.rank
        loader = get_dataloader(folder, 0, 2, seed=seed, num_workers=0, on_bad_record="skip", drop_last=False)
        seen: list[int] = []
        loader.on_batch = lambda views: seen.extend(views.index.tolist())
        batches = sum(1 for _ in loader)
    finally:
        logging.getLogger("arcface_kd.data.bad_records").removeHandler(listener)
    return seen, batches, told


def test_every_rank_takes_the_same_steps_and_rank_0_tells_of_all(tmp_path: Path, ranks: RankPool) -> None:
    folder = write_records(tmp_path / "faces", insightface_records([3, 4, 2, 4]))
    for key in (3, 8, 9):
        no_image(folder, key)
    results = ranks.run(4, _skip_on_ranks, str(folder))
    assert {batches for _, batches, _ in results} == {2}
    asked = {
        rank: [view.index for view in ViewSampler(IMAGES, rank=rank, world_size=4, seed=2048)] for rank in range(4)
    }
    for rank, (seen, _, told) in enumerate(results):
        assert seen == [{2: 3, 7: 9, 8: 9}.get(index, index) for index in asked[rank]]
        own = {index for index in asked[rank] if index in (2, 7, 8)} | ({8} if 7 in asked[rank] else set())
        skipped = [line for line in told if line.startswith("skipped: ")]
        if rank == 0:
            assert len(skipped) == 3
            assert all(
                any(f"key {key} at byte {offset_of(folder, key)}" in line for line in skipped) for key in (3, 8, 9)
            )
            assert told[-1].startswith("3 bad records (")
        else:
            assert len(skipped) == len(told) == len(own)
