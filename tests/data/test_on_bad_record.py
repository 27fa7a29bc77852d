"""``--on-bad-record`` from the command line to the loss: training, the cache and the class means over a damaged set."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from easydict import EasyDict
from torch import Tensor, nn

from arcface_kd.cli.main import main
from arcface_kd.config.kd import KDConfig
from arcface_kd.data.dataset import open_dataset
from arcface_kd.data.fingerprint import fingerprint
from arcface_kd.distillation.distiller import Distiller
from arcface_kd.distillation.drop_ins import drop_ins
from arcface_kd.distillation.teacher_classifier import class_means
from arcface_kd.distributed.class_shard import ClassShard
from arcface_kd.errors import BadRecordError, TeacherError
from arcface_kd.teachers.base import Teacher, load_teacher
from arcface_kd.teachers.cache.embedding_cache import EmbeddingCache, identity_of
from arcface_kd.teachers.cache.fill import fill_cache
from arcface_kd.teachers.options import TeacherOptions
from arcface_kd.training.trainer import train
from tests.data.record_damage import no_image, too_many_labels
from tests.host.trainer.faces import Faces, draw_faces
from tests.training import runs

BAD_KEYS = (4, 9)


class Coarse(nn.Module):
    """Embeds images by one matrix over their coarse pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3 * 8 * 8, 16, generator=torch.Generator().manual_seed(0)))

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.weight


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Faces:
    return draw_faces(tmp_path_factory.mktemp("faces"), identities=4, images=6)


@pytest.fixture
def damaged(whole: Faces, tmp_path: Path) -> Faces:
    folder = shutil.copytree(whole.folder, tmp_path / "damaged")
    no_image(folder, BAD_KEYS[0])
    too_many_labels(folder, BAD_KEYS[1])
    return whole._replace(folder=folder)


@pytest.fixture
def teacher() -> Teacher:
    return load_teacher(Coarse(), TeacherOptions(size=8))


def config_for(faces: Faces, output: Path, **keys: Any) -> EasyDict:
    return runs.config_for(faces, output, **{"val_targets": [], "embedding_size": 16, "batch_size": 6, **keys})


def test_the_command_ends_in_one_line(damaged: Faces, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "small.py"
    keys = {key: value for key, value in config_for(damaged, tmp_path / "run").items() if value is not None}
    file.write_text(f"from easydict import EasyDict\nconfig = EasyDict({keys!r})\n")
    assert main(["train", str(file)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("arcface-kd: ")
    assert "record with key" in captured.err
    assert captured.err.count("\n") == 1
    assert main(["train", str(file), "--on-bad-record", "skip"]) == 0


@pytest.mark.parametrize("cached", [False, True])
def test_training_takes_as_many_steps_and_the_log_tells(
    damaged: Faces, teacher: Teacher, tmp_path: Path, cached: bool
) -> None:
    cache = tmp_path / "rows" if cached else None
    kd = KDConfig(methods=("adadistill",), cache=None if cache is None else str(cache), on_bad_record="skip")
    distiller = Distiller(kd, teacher)
    result = train(config_for(damaged, tmp_path / "run"), distiller=distiller)
    assert result.steps == 2 * (24 // 6)
    log = (tmp_path / "run" / "training.log").read_text()
    for key in BAD_KEYS:
        assert log.count(f"skipped: {damaged.folder / 'train.rec'}: record with key {key} at byte ") == 1
    assert log.count("2 bad records were skipped in this epoch") == 2
    if cache is not None:
        assert distiller.cache is not None
        known = distiller.cache.known(0, 24)
        # Of each record that was shown one view at least; of those that were not, none.
        assert known.any(1).tolist() == [index + 1 not in BAD_KEYS for index in range(24)]


def test_cached_embeddings_are_those_of_the_record_that_is_shown(
    damaged: Faces, teacher: Teacher, tmp_path: Path
) -> None:
    config = config_for(damaged, tmp_path / "run", kd_on_bad_record="skip")
    kd = KDConfig(methods=("adadistill",), cache=str(tmp_path / "rows"), on_bad_record="skip")
    made = drop_ins(lambda: config, distiller=Distiller(kd, teacher))
    loader = made.get_dataloader(config.rec, 0, 6, num_workers=0)
    student = made.distiller.watch(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    for epoch in (0, 0):
        # The second time all rows come from the cache.
        loader.sampler.set_epoch(epoch)
        for images, _ in loader:
            student(images)
            seen = made.distiller.take_teacher_embeddings(len(images))
            assert seen is not None
            assert (seen - nn.functional.normalize(teacher(images))).abs().max() < 1e-3


def test_the_cache_lacks_what_cannot_be_read(damaged: Faces, teacher: Teacher, tmp_path: Path) -> None:
    with pytest.raises(BadRecordError, match="record with key"):
        fill_cache(config_for(damaged, tmp_path, kd_cache=str(tmp_path / "rows")), teacher=teacher)
    keys = {"kd_cache": str(tmp_path / "rows"), "kd_on_bad_record": "skip"}
    config = config_for(damaged, tmp_path, num_classes=None, **keys)
    report = fill_cache(config, teacher=teacher)
    assert (report.missing, report.unreadable) == (48, 4)
    assert "44 of 48 rows were missing and are there now" in str(report)
    assert str(report).endswith("; 4 rows of bad records are still missing")
    again = fill_cache(config, teacher=teacher)
    assert (again.missing, again.unreadable) == (4, 4)
    faces = open_dataset(damaged.folder, on_bad_record="skip")
    cache = EmbeddingCache(tmp_path / "rows", identity_of(teacher, fingerprint(faces), len(faces)))
    assert np.flatnonzero(~cache.known(0, 24).all(1)).tolist() == [key - 1 for key in BAD_KEYS]
    # The mean of a class goes without them, as long as nothing else is missing.
    shard = ClassShard(4)
    means = class_means(cache, faces, shard)
    rows, _ = cache.look_up(torch.arange(18, 24).repeat(2), torch.tensor([False] * 6 + [True] * 6))
    assert torch.allclose(means[3], nn.functional.normalize(rows.mean(0), dim=0), atol=1e-5)
    assert means.isfinite().all()
    faces.on_bad_record = "stop"
    with pytest.raises(BadRecordError, match=f"key {BAD_KEYS[1]} "):
        class_means(cache, faces, shard)


def test_class_means_do_not_pass_over_what_was_never_embedded(damaged: Faces, teacher: Teacher, tmp_path: Path) -> None:
    faces = open_dataset(damaged.folder, on_bad_record="skip")
    cache = EmbeddingCache(tmp_path / "rows", identity_of(teacher, fingerprint(faces), len(faces)))
    with pytest.raises(TeacherError, match="lacks 46 of 46 embeddings"):
        class_means(cache, faces, ClassShard(4))


def test_dali_says_that_it_decides_itself(tmp_path: Path, caplog: pytest.LogCaptureFixture, whole: Faces) -> None:
    config = config_for(whole, tmp_path, kd_on_bad_record="skip")
    made = drop_ins(lambda: config, host_loader=lambda *arguments: arguments)
    made.get_dataloader("there", 0, 4, True)
    assert "kd_on_bad_record=skip is off: DALI decides" in caplog.text
