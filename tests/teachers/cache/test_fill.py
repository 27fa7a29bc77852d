"""Filling a cache beforehand: exact rows, resuming, ranks, errors in one line."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from easydict import EasyDict
from torch import Tensor, nn
from torch.nn.functional import normalize

from arcface_kd.backbones import get_backbone
from arcface_kd.cli.main import main
from arcface_kd.config.arcface_torch import BASE
from arcface_kd.config.kd import KDConfig
from arcface_kd.data.dataset import RecordDataset, View
from arcface_kd.data.fingerprint import fingerprint
from arcface_kd.data.loader import _normalise
from arcface_kd.distillation.distiller import Distiller
from arcface_kd.errors import ArcfaceKDError, ConfigError, DataError, TeacherError
from arcface_kd.teachers import checkpoint
from arcface_kd.teachers.base import Teacher, load_teacher
from arcface_kd.teachers.cache.embedding_cache import EmbeddingCache, identity_of
from arcface_kd.teachers.cache.fill import fill_cache
from tests.host.trainer.faces import Faces, draw_faces

DIMENSION = 12


class Counting(nn.Module):
    """Embeds images by one matrix over their coarse pixels, and counts them."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3 * 8 * 8, DIMENSION, generator=generator))
        self.shown = 0

    def forward(self, images: Tensor) -> Tensor:
        self.shown += len(images)
        return images.flatten(1) @ self.weight


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Faces:
    return draw_faces(tmp_path_factory.mktemp("faces"), identities=5, images=7)


@pytest.fixture
def network() -> Counting:
    return Counting()


@pytest.fixture
def teacher(network: Counting) -> Teacher:
    teacher = load_teacher(network, {"size": 8})
    network.shown = 0
    return teacher


def config_for(faces: Faces, file: Path | None, **keys: Any) -> EasyDict:
    made = {**BASE, "rec": str(faces.folder), "num_classes": 5, "batch_size": 8, "num_workers": 0}
    return EasyDict({**made, "kd_cache": None if file is None else str(file), **keys})


def opened(file: Path, faces: Faces, teacher: Teacher) -> EmbeddingCache:
    dataset = RecordDataset(faces.folder)
    return EmbeddingCache(file, identity_of(teacher, fingerprint(dataset), len(dataset)))


def said_of_all(faces: Faces, teacher: Teacher) -> Tensor:
    """(images, 2, D) unit embeddings, one image at a time, as training sees them."""
    dataset = RecordDataset(faces.folder)
    rows = []
    for index in range(len(dataset)):
        for flipped in (False, True):
            _, pixels = dataset.pixels(View(index, flipped))
            rows.append(normalize(teacher(_normalise(torch.from_numpy(pixels.copy())[None]))))
    return torch.cat(rows).view(len(dataset), 2, -1)


def rows_of(cache: EmbeddingCache) -> Tensor:
    index = torch.arange(cache.images).repeat_interleave(2)
    rows, known = cache.look_up(index, torch.tensor([False, True]).repeat(cache.images))
    assert known.all()
    return rows.view(cache.images, 2, -1)


@pytest.mark.parametrize("workers", [0, 2])
def test_every_view_of_every_image_is_the_teachers(
    faces: Faces, teacher: Teacher, network: Counting, tmp_path: Path, workers: int
) -> None:
    report = fill_cache(config_for(faces, tmp_path / "rows", num_workers=workers), teacher=teacher)
    assert (report.images, report.embedding_size, report.missing) == (35, DIMENSION, 70)
    assert network.shown == 70
    wanted = said_of_all(faces, teacher)
    assert (rows_of(opened(tmp_path / "rows", faces, teacher)) - wanted).abs().max() < 5e-4
    assert (wanted[:, 0] - wanted[:, 1]).abs().amax(1).min() > 2e-3, "mirrored images must not embed as the plain ones"


def test_only_what_is_missing_is_embedded(faces: Faces, teacher: Teacher, network: Counting, tmp_path: Path) -> None:
    cache = opened(tmp_path / "rows", faces, teacher)
    wanted = said_of_all(faces, teacher)
    there = np.random.default_rng(0).random((35, 2)) < 0.6
    index, flipped = (torch.from_numpy(part) for part in there.nonzero())
    cache.store(index, flipped, wanted[index, flipped])
    network.shown = 0
    report = fill_cache(config_for(faces, tmp_path / "rows"), teacher=teacher)
    assert report.missing == network.shown == 70 - there.sum()
    assert (rows_of(cache) - wanted).abs().max() < 5e-4
    again = fill_cache(config_for(faces, tmp_path / "rows"), teacher=teacher)
    assert again.missing == 0
    assert network.shown == report.missing
    assert "1.7 kB, 35 images, two views, 12 numbers; nothing was missing" in str(again)


def test_a_run_that_stops_at_a_bad_image_is_resumed(
    faces: Faces, teacher: Teacher, network: Counting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = RecordDataset._decode

    def damaged(self: RecordDataset, index: int) -> tuple[int, np.ndarray]:
        if index == 20:
            raise DataError("record 21 is damaged")
        return whole(self, index)

    monkeypatch.setattr(RecordDataset, "_decode", damaged)
    with pytest.raises(DataError, match="record 21"):
        fill_cache(config_for(faces, tmp_path / "rows"), teacher=teacher)
    assert opened(tmp_path / "rows", faces, teacher).filled() == network.shown == 32
    monkeypatch.undo()
    assert fill_cache(config_for(faces, tmp_path / "rows"), teacher=teacher).missing == 70 - 32
    assert network.shown == 70


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        ({"kd_cache": None}, ConfigError, "--out FILE"),
        ({"rec": None}, ConfigError, "sets no rec"),
        ({"rec": "/nowhere"}, DataError, "/nowhere"),
        ({"rec": "synthetic"}, DataError, "SyntheticDataset"),
        ({"dali": True}, ConfigError, "set dali=False"),
        ({"num_classes": 3}, DataError, "num_classes is 3"),
        ({"batch_size": 0}, ConfigError, "batch_size is 0"),
        ({"kd_cache": "/nowhere/rows"}, TeacherError, "/nowhere/rows"),
    ],
    ids=str,
)
def test_bad_input_ends_in_one_line(
    faces: Faces, teacher: Teacher, tmp_path: Path, keys: dict[str, Any], error: type[ArcfaceKDError], message: str
) -> None:
    with pytest.raises(error) as refused:
        fill_cache(config_for(faces, tmp_path / "rows", **keys), teacher=teacher)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.fixture
def teacher_file(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    torch.save(get_backbone("thin_r10", num_features=16).state_dict(), tmp_path / "teacher.pt")
    return tmp_path / "teacher.pt"


@pytest.fixture
def config(faces: Faces, tmp_path: Path) -> Path:
    keys = {"rec": str(faces.folder), "num_classes": 5, "num_image": 35, "num_epoch": 1, "batch_size": 8}
    keys |= {"num_workers": 0, "val_targets": [], "embedding_size": 16, "network": "thin_r10", "kd": "adadistill"}
    path = tmp_path / "small.py"
    path.write_text(f"from easydict import EasyDict\nconfig = EasyDict({keys!r})\n")
    return path


def test_the_command(
    config: Path, teacher_file: Path, faces: Faces, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["cache", str(config), "--kd-teacher", str(teacher_file), "--out", str(tmp_path / "rows")]
    assert main(words) == 0
    printed = capsys.readouterr()
    assert "2.2 kB, 35 images, two views, 16 numbers; 70 of 70 rows were missing" in printed.out
    assert "35/35" in printed.err
    assert "image/s" in printed.err
    assert main([*words, "--set", "batch_size=3"]) == 0
    assert "nothing was missing" in capsys.readouterr().out
    assert opened(tmp_path / "rows", faces, load_teacher(teacher_file)).filled() == 70
    assert main([*words, "--kd-option", "teacher.channels=bgr"]) == 2
    assert "another preprocessing" in capsys.readouterr().err
    assert main([*words[:2], "--out", str(tmp_path / "other")]) == 2
    assert "--kd-teacher FILE" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_a_cache_filled_without_a_gpu_is_taken_beside_one(
    faces: Faces, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, cache = tmp_path / "teacher.pt", tmp_path / "rows"
    torch.manual_seed(0)
    torch.save(get_backbone("thin_r10", num_features=DIMENSION).eval().state_dict(), path)
    config = config_for(faces, cache, kd="adadistill", kd_teacher=str(path))
    assert fill_cache(config).missing == 70
    # The default beside a GPU.
    monkeypatch.setattr(checkpoint, "default_precision", lambda: "fp16")
    assert fill_cache(config).missing == 0
    teacher = Distiller(KDConfig.from_config(config)).teacher
    assert teacher is not None
    assert teacher.precision == "fp32"
    config.kd_option = ["teacher.precision=fp16"]
    with pytest.raises(TeacherError, match="precision"):
        fill_cache(config)
