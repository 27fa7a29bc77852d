"""A teacher whose embeddings are all alike is warned of, online and before a cache is filled; a good one is not."""

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from arcface_kd.config.kd import KDConfig
from arcface_kd.data.dataset import FaceDataset, RecordDataset
from arcface_kd.data.loader import FaceLoader
from arcface_kd.distillation.distiller import Distiller
from arcface_kd.errors import BadRecordError
from arcface_kd.teachers import load_teacher
from arcface_kd.teachers.cache.fill import fill_cache
from arcface_kd.teachers.collapse import warn_of_collapse
from tests.host.trainer.faces import Faces, draw_faces


class Network(nn.Module):
    """Coarse pixels through a matrix; ``offset`` moves all embeddings away from 0, as a wrong input does."""

    def __init__(self, offset: float) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(48, 16, generator=torch.Generator().manual_seed(0)))
        self.offset, self.shown = offset, 0

    def forward(self, images: Tensor) -> Tensor:
        self.shown += len(images)
        coarse = nn.functional.adaptive_avg_pool2d(images, 4).flatten(1)
        return (coarse - coarse.mean(1, keepdim=True)) @ self.matrix + self.offset


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Faces:
    return draw_faces(tmp_path_factory.mktemp("faces"), identities=12, images=2)


@pytest.mark.parametrize(("offset", "warned"), [(0.0, False), (100.0, True)])
@pytest.mark.parametrize("cached", [False, True])
def test_a_run(
    offset: float, warned: bool, cached: bool, faces: Faces, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    network = Network(offset)
    data = RecordDataset(faces.folder)
    loader = FaceLoader(data, batch_size=8, num_workers=0)
    teacher = load_teacher(network)
    network.shown = 0
    with caplog.at_level(logging.WARNING):
        Distiller(KDConfig(("adadistill",), cache=str(tmp_path / "c") if cached else None), teacher).use_cache(loader)
    assert ("are all alike" in caplog.text) is warned
    assert network.shown == 12


@pytest.mark.parametrize(("offset", "warned"), [(0.0, False), (100.0, True)])
def test_a_loop_with_a_loader_of_its_own(offset: float, warned: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Its first batch is judged, and no other."""
    distiller = Distiller(KDConfig(("adadistill",)), load_teacher(Network(offset), {"size": 8}))
    student = distiller.watch(nn.Flatten()).train()
    images = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    for expected in (warned, False):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            student(images)
        assert ("are all alike" in caplog.text) is expected


def test_filling_a_cache_warns_and_a_full_cache_is_not_looked_at(
    faces: Faces, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    network = Network(100.0)
    teacher = load_teacher(network)
    config = {"rec": str(faces.folder), "num_classes": 12, "num_workers": 0, "kd_cache": str(tmp_path / "c")}
    with caplog.at_level(logging.WARNING):
        fill_cache(config, teacher=teacher)
        assert "the teacher's embeddings of 12 different faces are all alike" in caplog.text
        caplog.clear()
        network.shown = 0
        fill_cache(config, teacher=teacher)
    assert network.shown == 0
    assert caplog.text == ""


class Colours(FaceDataset):
    """Plain images of one colour each, the first of them damaged."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def where(self, index: int) -> str:
        return str(index)

    def _load(self, index: int) -> tuple[int, bytes]:
        raise BadRecordError(index, "damaged")


@pytest.mark.parametrize("count", [0, 5, 30])
def test_what_cannot_be_judged_is_left_alone(count: int, caplog: pytest.LogCaptureFixture) -> None:
    network = Network(100.0)
    teacher = load_teacher(network)
    network.shown = 0
    with caplog.at_level(logging.WARNING):
        warn_of_collapse(teacher, Colours(count))
    assert network.shown == 0
    assert caplog.text == ""
