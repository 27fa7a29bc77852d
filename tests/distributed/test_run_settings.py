"""Ranks that were started differently."""

from arcface_kd.checkpoints.run_settings import require_agreement
from arcface_kd.distributed.ranks import RankGroup
from arcface_kd.errors import ConfigError
from tests.distributed.pool import RankPool


def _agree(ranks: RankGroup, odd_rank: int) -> str:
    try:
        require_agreement({"lr": 0.1, "kd": None, "batch_size": 8 if ranks.rank == odd_rank else 4}, ranks)
    except ConfigError as error:
        return str(error)
    return ""


def test_ranks_that_were_started_differently_all_say_so(ranks: RankPool) -> None:
    assert ranks.run(3, _agree, -1) == ["", "", ""]
    assert ranks.run(3, _agree, 2) == 3 * [
        "the ranks were started differently: batch_size is 4 on rank 0 and 8 on rank 2; start all of them alike"
    ]
