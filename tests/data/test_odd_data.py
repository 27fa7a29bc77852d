"""Data that is odd but lawful: it trains, or is refused by name."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from arcface_kd.config.kd import KDConfig
from arcface_kd.data.dataset import RecordDataset
from arcface_kd.data.formats.record import RecordHeader, pack
from arcface_kd.data.formats.recordio import RecordWriter
from arcface_kd.data.pack import write_identities
from arcface_kd.distillation.distiller import Distiller
from arcface_kd.distillation.head import DistillationHead
from arcface_kd.distributed.ranks import RankGroup
from arcface_kd.errors import ConfigError, DataError
from arcface_kd.evaluation.report.scalars import read_scalars
from arcface_kd.training.trainer import train
from tests.data.record_sets import encoded, record, write_records
from tests.host.trainer.faces import Faces
from tests.networks import untrained_file
from tests.reference.problems import ARCFACE
from tests.training.runs import config_for

BLACK = cv2.imencode(".png", np.zeros((112, 112, 3), np.uint8))[1].tobytes()


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untrained_file(tmp_path_factory.mktemp("teacher"), "thin_r10", 16)


def numbered(count: int) -> list[bytes]:
    return [encoded(number) for number in range(count)]


GAPS, NOBODY = [0, 7, 7, 40, 41, 0, 7, 40], [-1, 0, 1, -1, 1, 0, -1, -1]
# Images and labels: a class that no image belongs to stays where it began, or where the softmax pushes it.
ODD: dict[str, tuple[list[bytes], list[int], dict[str, Any]]] = {
    "images that are all zero": ([BLACK] * 8, [0, 1] * 4, {}),
    "one image of several people": ([encoded(1)] * 6 + [encoded(2)] * 2, [0] * 4 + [1] * 4, {}),
    "one person": (numbered(8), [0] * 8, {}),
    "one person, no teacher": (numbered(8), [0] * 8, {"kd": None}),
    "one image of each": (numbered(8), list(range(8)), {}),
    "one image of each, no teacher": (numbered(8), list(range(8)), {"kd": None}),
    "labels with gaps": (numbered(8), GAPS, {"num_classes": 50}),
    "labels with gaps, no teacher": (numbered(8), GAPS, {"num_classes": 50, "kd": None}),
    "labels with gaps, sampled": (numbered(8), GAPS, {"num_classes": 50, "kd": None, "sample_rate": 0.3}),
    "labels of nobody": (numbered(8), NOBODY, {}),
}


@pytest.mark.parametrize("odd", ODD)
def test_odd_data_train(tmp_path: Path, teacher_file: Path, odd: str) -> None:
    images, labels, keys = ODD[odd]
    records = [(key, record(key, float(label), images[key])) for key, label in enumerate(labels)]
    faces = Faces(write_records(tmp_path / "faces", records), max(labels) + 1, 8)
    own = {
        "val_targets": [],
        "embedding_size": 16,
        "batch_size": 4,
        "kd": "adadistill",
        "kd_teacher": str(teacher_file),
    }
    result = train(config_for(faces, tmp_path / "run", **{**own, **keys}))
    assert result.steps == 4
    scalars = read_scalars(result.output / "tensorboard")
    assert np.isfinite(scalars["loss"].y).all()
    assert all(value.isfinite().all() for value in result.student.state_dict().values())
    if labels == [0] * 8:
        # Nothing to tell apart: the classification says nothing, whatever the student does.
        assert scalars["kd/ce"].y.tolist() == [0.0] * 4


def test_fewer_identities_than_ranks_are_refused_by_name() -> None:
    ranks = RankGroup(alone=True)
    ranks.world_size = 3
    with pytest.raises(ConfigError, match="2 classes cannot be split over 3 ranks; use fewer ranks"):
        DistillationHead(Distiller(KDConfig()), ARCFACE, 4, 2, ranks=ranks)


# 2**24, up to which a float32 tells whole numbers apart ---------------------------------------------------------------


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


def test_classes_from_2_24_on_are_told_apart_by_a_head() -> None:
    """Labels are whole numbers from the loader on; a shard far up holds its own classes only."""
    shard = RankGroup(alone=True).shard((1 << 24) + 5)
    labels = torch.tensor([1 << 24, (1 << 24) + 1, (1 << 24) + 4])
    assert shard.local(labels)[0].tolist() == labels.tolist()
