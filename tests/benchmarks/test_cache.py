"""The cache's benchmark: three providers that train the same student, and sizes that are what they say."""

from pathlib import Path

import pytest
import torch
from easydict import EasyDict

from arcface_kd.config.kd import KDConfig
from arcface_kd.distillation.distiller import Distiller
from benchmarks import cache
from benchmarks.cache import TINY, epoch_of
from benchmarks.record import Row
from tests.host.trainer.faces import draw_faces

CPU = torch.device("cpu")


@pytest.mark.slow
def test_tiny(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ARCFACE_KD_REAL_DATA", raising=False)
    rows: list[Row] = cache.run(TINY, CPU)
    values = {(row.provider, row.size, row.metric): row.value for row in rows}
    where = "C=12 B=4 D=16"
    speed = {
        name: values[f"{name} thin_r10->thin_r10", where, "images_per_second"] for name in ("alone", "cached", "online")
    }
    assert values["cached thin_r10->thin_r10", where, "speed_over_alone"] == speed["cached"] / speed["alone"]
    assert values["cached thin_r10->thin_r10", where, "speed_over_online"] == speed["cached"] / speed["online"]
    assert values["cache", "MS1MV2 N=5822653 D=512", "gigabytes"] == pytest.approx(11.92, abs=0.01)
    printed = capsys.readouterr().out
    assert "costs at most 3%" in printed
    assert "11.9 GB" in printed


def test_an_epoch_trains_on_every_full_batch(tmp_path: Path) -> None:
    faces = draw_faces(tmp_path, identities=3, images=4)
    pair = cache.Pair("thin_r10", "thin_r10", 3, images=12, batch=5, rounds=1)
    config: EasyDict = cache.config_of(pair, 8, faces.folder)
    distiller = Distiller(KDConfig())
    seen: list[int] = []
    watch = distiller.watch

    def counting(student: torch.nn.Module) -> torch.nn.Module:
        student.register_forward_hook(lambda module, images, output: seen.append(len(output)))
        return watch(student)

    distiller.watch = counting  # type: ignore[method-assign]
    epoch = epoch_of(config, distiller, CPU)
    epoch()
    epoch()
    assert seen == [5, 5] * 2
