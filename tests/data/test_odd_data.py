"""Data that is odd but lawful: it trains, or is refused by name."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from arcface_kd.backbones import get_backbone
from arcface_kd.config.kd import KDConfig
from arcface_kd.data.dataset import RecordDataset
from arcface_kd.data.formats.record import RecordHeader, pack
from arcface_kd.data.formats.recordio import RecordWriter
from arcface_kd.data.pack import write_identities
from arcface_kd.data.sampler import ViewSampler
from arcface_kd.distillation.distiller import Distiller
from arcface_kd.distillation.head import DistillationHead
from arcface_kd.distributed.ranks import RankGroup
from arcface_kd.errors import ConfigError, DataError
from arcface_kd.evaluation.report.scalars import read_scalars
from arcface_kd.training.trainer import TrainResult, train
from tests.data.record_sets import encoded, plain_records, write_records
from tests.host.trainer.faces import Faces
from tests.reference.problems import ARCFACE
from tests.training.runs import config_for

BLACK = cv2.imencode(".png", np.zeros((112, 112, 3), np.uint8))[1].tobytes()


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(7)
    path = tmp_path_factory.mktemp("teacher") / "teacher.pt"
    torch.save(get_backbone("thin_r10", num_features=16).state_dict(), path)
    return path


def train_on(folder: Path, teacher_file: Path, num_classes: int, num_image: int, **keys: Any) -> TrainResult:
    own = {"network": "thin_r10", "val_targets": [], "embedding_size": 16, "batch_size": 4, "kd": "adadistill"}
    faces = Faces(folder, num_classes, num_image)
    result = train(config_for(faces, folder / "run", **{**own, "kd_teacher": str(teacher_file), **keys}))
    losses = read_scalars(result.output / "tensorboard")["loss"].y
    assert np.isfinite(losses).all()
    assert all(value.isfinite().all() for value in result.student.state_dict().values())
    return result


def write(folder: Path, identities: Sequence[Sequence[bytes]]) -> Path:
    write_identities(folder, [len(each) for each in identities], [image for each in identities for image in each])
    return folder


def test_images_that_are_all_zero(tmp_path: Path, teacher_file: Path) -> None:
    folder = write(tmp_path / "faces", [[BLACK] * 4, [BLACK] * 4])
    assert train_on(folder, teacher_file, 2, 8).steps == 4


def test_one_image_many_times_under_one_and_under_several_identities(tmp_path: Path, teacher_file: Path) -> None:
    folder = write(tmp_path / "faces", [[encoded(1)] * 4, [encoded(1)] * 2 + [encoded(2)] * 2])
    assert train_on(folder, teacher_file, 2, 8).steps == 4


@pytest.mark.parametrize("kd", ["adadistill", None])
def test_one_identity_only(tmp_path: Path, teacher_file: Path, kd: str | None) -> None:
    folder = write(tmp_path / "faces", [[encoded(number) for number in range(8)]])
    result = train_on(folder, teacher_file, 1, 8, kd=kd)
    # Nothing to tell apart: the classification says nothing, whatever the student does.
    assert read_scalars(result.output / "tensorboard")["kd/ce"].y.tolist() == [0.0] * 4


@pytest.mark.parametrize("kd", ["adadistill", None])
def test_one_image_of_each_identity(tmp_path: Path, teacher_file: Path, kd: str | None) -> None:
    folder = write(tmp_path / "faces", [[encoded(number)] for number in range(8)])
    assert train_on(folder, teacher_file, 8, 8, kd=kd).steps == 4


@pytest.mark.parametrize("keys", [{}, {"kd": None}, {"kd": None, "sample_rate": 0.3}], ids=str)
def test_labels_with_gaps(tmp_path: Path, teacher_file: Path, keys: dict[str, Any]) -> None:
    folder = write_records(tmp_path / "faces", plain_records([0, 7, 7, 40, 41, 0, 7, 40]))
    assert train_on(folder, teacher_file, 50, 8, **keys).steps == 4
    # A class that nobody belongs to stays where it began, or where the softmax pushes it; none is refused.
    with pytest.raises(DataError, match="set num_classes to 42 or more"):
        train_on(folder, teacher_file, 41, 8)


def test_labels_of_nobody(tmp_path: Path, teacher_file: Path) -> None:
    folder = write_records(tmp_path / "faces", plain_records([-1, 0, 1, -1, 1, 0, -1, -1]))
    assert train_on(folder, teacher_file, 2, 8).steps == 4


def test_fewer_identities_than_ranks_are_refused_by_name() -> None:
    ranks = RankGroup(alone=True)
    ranks.world_size = 3
    with pytest.raises(ConfigError, match="2 classes cannot be split over 3 ranks; use fewer ranks"):
        DistillationHead(Distiller(KDConfig()), ARCFACE, 4, 2, ranks=ranks)


# 2**24, up to which a float32 tells whole numbers apart ---------------------------------------------------------------


def test_labels_from_2_24_on_are_refused(tmp_path: Path) -> None:
    for label in (1 << 24, (1 << 24) + 1):
        folder = write_records(tmp_path / str(label), plain_records([0, label]))
        with pytest.raises(DataError, match="a float32 tells whole numbers apart up to 16777216 only"):
            RecordDataset(folder, num_classes=1 << 25)
    folder = write_records(tmp_path / "last", plain_records([0, (1 << 24) - 1]))
    assert RecordDataset(folder, num_classes=1 << 25).label(1) == (1 << 24) - 1


def test_more_identities_than_labels_are_not_packed(tmp_path: Path) -> None:
    class Many(Sequence[int]):
        def __len__(self) -> int:
            return (1 << 24) + 1

        def __getitem__(self, index: Any) -> Any:
            return 0

    with pytest.raises(DataError, match="16777217 identities; a float32 label tells 16777216 apart"):
        write_identities(tmp_path / "faces", Many(), [])
    assert not (tmp_path / "faces").exists()


def test_more_records_than_a_float32_counts(tmp_path: Path) -> None:
    """A header that says how many there are can say it to within two; the index knows."""
    images = (1 << 24) + 1
    with RecordWriter(tmp_path / "train.rec", tmp_path / "train.idx") as writer:
        writer.write(0, pack(RecordHeader(0, np.array([images + 1, images + 2], dtype=np.float32), 0, 0), b""))
        # The same image again and again would be 50 GB; the two that are looked at lie at the ends of the index.
        writer.write(1, pack(RecordHeader(0, 0.0, 1, 0), encoded(1)))
        writer.write(images, pack(RecordHeader(0, 1.0, images, 0), encoded(2)))
        writer.write(images + 1, pack(RecordHeader(0, np.array([1, images + 1], dtype=np.float32), images + 1, 0), b""))
    faces = RecordDataset(tmp_path, num_classes=2)
    assert faces.keys.tolist() == [1, images]
    assert f"key {images} at byte" in faces.where(1)
    assert faces[1].label == 1


def test_an_order_of_more_records_than_a_float32_counts() -> None:
    size = (1 << 24) + 3
    sampler = ViewSampler(size, rank=1, world_size=2, shuffle=False, flip=False)
    last = -(-size // 2) - 1
    assert len(sampler) == last + 1
    assert next(iter(sampler)).index == 1


def test_classes_from_2_24_on_are_told_apart_by_a_head() -> None:
    """Labels are whole numbers from the loader on; a shard far up holds its own classes only."""
    shard = RankGroup(alone=True).shard((1 << 24) + 5)
    labels = torch.tensor([1 << 24, (1 << 24) + 1, (1 << 24) + 4])
    assert shard.local(labels)[0].tolist() == labels.tolist()
