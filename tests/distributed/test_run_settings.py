"""Ranks that were started differently."""

from arcface_kd.checkpoints.run_settings import require_agreement
from arcface_kd.config.kd import KDConfig
from arcface_kd.distillation.distiller import Distiller
from arcface_kd.distillation.head import DistillationHead
from arcface_kd.distillation.tensorboard_log import TensorBoardLog
from arcface_kd.distributed.ranks import RankGroup
from arcface_kd.errors import ConfigError
from tests.distributed.pool import RankPool
from tests.reference.problems import ARCFACE


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


def _log_at_other_steps(ranks: RankGroup) -> str:
    log = TensorBoardLog("nowhere", 10 + ranks.rank, False)
    try:
        DistillationHead(Distiller(KDConfig(())), ARCFACE, 4, 7, ranks=ranks, log=log)
    except ConfigError as error:
        return str(error)
    return ""


def test_ranks_that_log_at_other_steps_would_wait_for_each_other(ranks: RankPool) -> None:
    for said in ranks.run(2, _log_at_other_steps):
        assert "frequent is 10 on rank 0 and 11 on rank 1;" in said
