"""The teacher's classifier: every file it may come from, class means, and what does not fit the records."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from easydict import EasyDict
from torch import Tensor, nn
from torch.nn.functional import normalize

from arcface_kd.backbones import get_backbone
from arcface_kd.checkpoints.shards import merge_head
from arcface_kd.cli.main import main
from arcface_kd.config.arcface_torch import BASE
from arcface_kd.config.kd import CLASS_MEANS, KDConfig
from arcface_kd.data.dataset import RecordDataset
from arcface_kd.data.loader import FaceLoader
from arcface_kd.distillation.distiller import Distiller
from arcface_kd.distillation.head import DistillationHead
from arcface_kd.distillation.teacher_classifier import class_means, read_classifier
from arcface_kd.distributed.class_shard import ClassShard
from arcface_kd.distributed.ranks import RankGroup
from arcface_kd.errors import CheckpointError, TeacherError
from arcface_kd.methods.proxylesskd import ProxylessKD
from arcface_kd.teachers.base import Teacher, load_teacher
from arcface_kd.teachers.cache.embedding_cache import EmbeddingCache
from arcface_kd.teachers.cache.fill import fill_cache
from arcface_kd.training.trainer import train
from tests.data.record_sets import insightface_records, write_records
from tests.host.trainer.faces import Faces, draw_faces
from tests.reference.problems import ARCFACE
from tests.teachers.checkpoint_files import prefixed
from tests.training.runs import config_for

CLASSES, DIMENSION = 11, 5
WHOLE = ClassShard(CLASSES)


@pytest.fixture
def matrix() -> Tensor:
    return torch.randn(CLASSES, DIMENSION, generator=torch.Generator().manual_seed(0))


def shards_of(matrix: Tensor, ranks: int) -> list[Tensor]:
    parts = [ClassShard(len(matrix), rank, ranks) for rank in range(ranks)]
    return [matrix[part.start : part.start + part.size].clone() for part in parts]


def save_host_run(folder: Path, matrix: Tensor, ranks: int) -> Path:
    folder.mkdir(exist_ok=True)
    for rank, part in enumerate(shards_of(matrix, ranks)):
        state = {"epoch": 1, "global_step": 7, "state_dict_backbone": {}, "state_dict_softmax_fc": {"weight": part}}
        torch.save(state, folder / f"checkpoint_gpu_{rank}.pt")
    return folder


def save_older_run(folder: Path, matrix: Tensor, ranks: int, pattern: str) -> Path:
    folder.mkdir(exist_ok=True)
    for rank, part in enumerate(shards_of(matrix, ranks)):
        torch.save(part if "rank" in pattern else {"weight": part}, folder / pattern.format(rank))
    return folder


def heads_beside_backbones(matrix: Tensor) -> dict[str, object]:
    """Classifiers in one file with what they were trained on, known networks and others."""
    known = get_backbone("thin_r18", num_features=DIMENSION).state_dict()
    other = {"fc.weight": torch.ones(DIMENSION, 3), "fc.bias": torch.ones(DIMENSION)}
    states = {
        "FaceX-Zoo": {**prefixed(known, "backbone."), "head.weight": matrix},
        "AdaFace": {**prefixed(known, "model."), "head.kernel": matrix.T, "head.t": torch.ones(1)},
        "MagFace": {**prefixed(known, "features.module."), "module.fc.weight": matrix.T},
        "unknown backbone": {**prefixed(other, "backbone."), "module.fc.weight": matrix},
        "odd name": {"head.proxies": matrix, "head.scale": torch.ones(())},
    }
    beside: dict[str, object] = {name: {"state_dict": state, "epoch": 3} for name, state in states.items()}
    return {
        **beside,
        "turned": matrix.T.contiguous(),
        "containers": {"net": known, "fc": {"weight": matrix}, "optimizer": {"state": {0: {"m": matrix}}}},
        "averaged": {"state_dict": {"head.weight": matrix}, "state_dict_ema": {"head.weight": matrix + 1}},
    }


def every_source(folder: Path, matrix: Tensor) -> dict[str, Path]:
    folder.mkdir()
    torch.save(matrix, folder / "bare.pt")
    torch.save(matrix, folder / "old_format.pt", _use_new_zipfile_serialization=False)
    torch.save({"weight": matrix, "num_classes": CLASSES}, folder / "merged.pt")
    torch.save({"module.weight": matrix.double()}, folder / "wrapped.pt")
    torch.save({"kernel": matrix.T.contiguous()}, folder / "295672header.pth")
    for name, content in heads_beside_backbones(matrix).items():
        torch.save(content, folder / f"{name}.pt")
    run = save_host_run(folder / "run", matrix, 3)
    rank = save_older_run(folder / "rank", matrix, 2, "rank_{}_softmax_weight.pt")
    colon = save_older_run(folder / "colon", matrix, 3, "rank:{}_softmax_weight.pt")
    softmax = save_older_run(folder / "softmax", matrix, 4, "softmax_fc_gpu_{}.pt")
    torch.save(matrix, rank / "rank_0_softmax_weight_mom.pt")
    return {
        "bare": folder / "bare.pt",
        "old format": folder / "old_format.pt",
        "merged": folder / "merged.pt",
        "wrapped": folder / "wrapped.pt",
        "adadistill": folder / "295672header.pth",
        **{name: folder / f"{name}.pt" for name in heads_beside_backbones(matrix)},
        "run": run,
        "run's file": run / "checkpoint_gpu_1.pt",
        "rank": rank,
        "rank's file": rank / "rank_1_softmax_weight.pt",
        "colon": colon,
        "softmax": softmax,
        "softmax's file": softmax / "softmax_fc_gpu_0.pt",
    }


def test_every_source_gives_every_rank_its_classes(matrix: Tensor, tmp_path: Path) -> None:
    for name, source in every_source(tmp_path / "files", matrix).items():
        for ranks in (1, 2, 5):
            shards = [read_classifier(source, ClassShard(CLASSES, rank, ranks)) for rank in range(ranks)]
            assert torch.equal(torch.cat(shards), matrix), (name, ranks)
            assert all(shard.dtype == torch.float32 and shard.is_contiguous() for shard in shards)


def test_a_run_of_this_package_and_its_merged_head(tmp_path: Path) -> None:
    faces = draw_faces(tmp_path, identities=6, images=4)
    keys = {"num_epoch": 1, "val_targets": [], "embedding_size": 8, "batch_size": 8, "save_all_states": True}
    train(config_for(faces, tmp_path / "run", **keys))
    state = torch.load(tmp_path / "run" / "checkpoint_gpu_0.pt", weights_only=True)["state_dict_softmax_fc"]
    whole = ClassShard(6)
    assert torch.equal(read_classifier(tmp_path / "run", whole), state["methods.classifier.weight"])
    merge_head(tmp_path / "run", tmp_path / "head.pt")
    assert torch.equal(read_classifier(tmp_path / "head.pt", whole), state["methods.classifier.weight"])


def _zero_row(matrix: Tensor) -> Tensor:
    matrix[4] = 0
    return matrix


def _nan_row(matrix: Tensor) -> Tensor:
    matrix[4, 2] = torch.nan
    return matrix


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (lambda m: m[:-1], r"has 10 classes, the run has num_classes=11: the teacher was trained on other records"),
        (lambda m: torch.cat([m, m]), "has 22 classes"),
        (lambda m: {"kernel": m[:-1]}, "has 5 classes"),
        (
            lambda m: {"head.weight": m, "margin.weight": m + 1},
            r"which .* classifier: 'head\.weight' .*'margin\.weight'",
        ),
        (lambda m: {"weight": m[0]}, r"'weight': tensor \(5,\)"),
        (lambda m: m.long(), r"tensor \(11, 5\) of int64"),
        (lambda m: {"kernel": 3}, "'kernel': int"),
        (lambda m: [m], "no classifier but a list"),
        (_zero_row, "class 4 is zero, NaN or inf"),
        (_nan_row, "class 4 is zero, NaN or inf"),
    ],
    ids=range(10),
)
def test_a_file_that_does_not_fit_is_refused(matrix: Tensor, tmp_path: Path, content: Any, said: str) -> None:
    torch.save(content(matrix), tmp_path / "head.pt")
    with pytest.raises(TeacherError, match=said) as refused:
        read_classifier(tmp_path / "head.pt", WHOLE)
    assert "\n" not in str(refused.value)


def _without_the_middle(run: Path) -> None:
    (run / "rank_1_softmax_weight.pt").unlink()


def _of_two_runs(run: Path) -> None:
    torch.save(torch.ones(2, DIMENSION), run / "rank_0_softmax_weight.pt")
    torch.save(torch.ones(6, DIMENSION), run / "rank_1_softmax_weight.pt")


def _of_two_widths(run: Path) -> None:
    torch.save(torch.ones(4, DIMENSION + 1), run / "rank_1_softmax_weight.pt")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_without_the_middle, r"of ranks \[0, 2\]: some are missing"),
        (_of_two_runs, "files of several runs are mixed"),
        (_of_two_widths, "files of several runs are mixed"),
    ],
)
def test_shards_that_do_not_belong_together(matrix: Tensor, tmp_path: Path, damage: Any, said: str) -> None:
    run = save_older_run(tmp_path / "run", matrix, 3, "rank_{}_softmax_weight.pt")
    damage(run)
    with pytest.raises(CheckpointError, match=said):
        read_classifier(run, WHOLE)


def test_what_is_no_classifier(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match=r"nothing\.pt does not exist"):
        read_classifier(tmp_path / "nothing.pt", WHOLE)
    with pytest.raises(TeacherError, match="no classifier in the folder"):
        read_classifier(tmp_path, WHOLE)
    (tmp_path / "text.pt").write_text("weights")
    with pytest.raises(TeacherError, match=r"text\.pt is .*; wanted a PyTorch checkpoint"):
        read_classifier(tmp_path / "text.pt", WHOLE)
    torch.save(EasyDict(weight=np.zeros(3)), tmp_path / "objects.pt")
    with pytest.raises(TeacherError, match="'weight': Python object"):
        read_classifier(tmp_path / "objects.pt", WHOLE)
    run = save_host_run(tmp_path / "run", torch.ones(CLASSES, 2), 2)
    (run / "checkpoint_gpu_1.pt").write_bytes(b"no checkpoint")
    with pytest.raises(CheckpointError, match=r"checkpoint_gpu_1\.pt cannot be read"):
        read_classifier(run / "checkpoint_gpu_0.pt", WHOLE)


# Class means ---------------------------------------------------------------------------------------------------------

COUNTS = [4, 1, 6, 3, 2]


def cached(folder: Path, counts: list[int] = COUNTS) -> tuple[EmbeddingCache, RecordDataset, Tensor]:
    """Records, a full cache of random unit vectors, and those vectors (images, 2, D)."""
    dataset = RecordDataset(write_records(folder / "records", insightface_records(counts)))
    identity = {"images": len(dataset), "embedding_size": DIMENSION}
    cache = EmbeddingCache(folder / "rows", identity)
    rows = normalize(torch.randn(len(dataset), 2, DIMENSION, generator=torch.Generator().manual_seed(3)), dim=2)
    for flipped in (0, 1):
        cache.store(torch.arange(len(dataset)), torch.full((len(dataset),), bool(flipped)), rows[:, flipped])
    return cache, dataset, rows


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_class_means_are_the_directions_of_the_classes(
    tmp_path: Path, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("arcface_kd.distillation.teacher_classifier._IMAGES_AT_ONCE", 3)
    cache, dataset, rows = cached(tmp_path)
    labels = torch.tensor([dataset.label(index) for index in range(len(dataset))])
    wanted = torch.stack([normalize(rows[labels == label].reshape(-1, DIMENSION).mean(0), dim=0) for label in range(5)])
    parts = [class_means(cache, dataset, ClassShard(5, rank, ranks)) for rank in range(ranks)]
    torch.testing.assert_close(torch.cat(parts), wanted, rtol=0, atol=1e-3)
    torch.testing.assert_close(torch.cat(parts).norm(dim=1), torch.ones(5))


def test_class_means_of_a_cache_with_gaps_are_refused(tmp_path: Path) -> None:
    _, dataset, rows = cached(tmp_path)
    gaps = EmbeddingCache(tmp_path / "gaps", {"images": len(dataset), "embedding_size": DIMENSION})
    gaps.store(torch.arange(15), torch.zeros(15, dtype=torch.bool), rows[:15, 0])
    with pytest.raises(TeacherError, match=r"lacks 17 of 32 embeddings .* `arcface-kd cache CONFIG"):
        class_means(gaps, dataset, ClassShard(5))


def test_a_class_without_images_has_no_mean(tmp_path: Path) -> None:
    cache, dataset, _ = cached(tmp_path)
    with pytest.raises(TeacherError, match="class 5 has no images in the records"):
        class_means(cache, dataset, ClassShard(6))


# In a run ------------------------------------------------------------------------------------------------------------


class Coarse(nn.Module):
    """Embeds a drawn face by its coarse colours, which are what tells its identities apart."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        return nn.functional.adaptive_avg_pool2d(images, 6).flatten(1)

    fingerprint = "coarse"


IDENTITIES = 16


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Faces:
    return draw_faces(tmp_path_factory.mktemp("faces"), identities=IDENTITIES, images=8)


@pytest.fixture
def teacher() -> Teacher:
    return load_teacher(Coarse())


def made_by(teacher: Teacher, faces: Faces) -> Tensor:
    """The classifier that the teacher would have: its class means."""
    dataset = RecordDataset(faces.folder)
    images = torch.stack([dataset[index].image for index in range(len(dataset))]).float() / 127.5 - 1
    sums = torch.zeros(IDENTITIES, teacher.embedding_size)
    return normalize(sums.index_add_(0, torch.from_numpy(dataset.labels()), normalize(teacher(images))))


def head_of(
    faces: Faces, teacher: Teacher | None, classifier: str | Path, cache: Path | None = None, **keys: Any
) -> DistillationHead:
    kd = KDConfig(
        methods=("proxylesskd",), cache=None if cache is None else str(cache), classifier=str(classifier), **keys
    )
    distiller = Distiller(kd, teacher)
    distiller.use_cache(FaceLoader(RecordDataset(faces.folder), batch_size=8, num_workers=0))
    return DistillationHead(distiller, ARCFACE, 108, IDENTITIES, ranks=RankGroup(alone=True))


def test_class_means_in_a_run_ask_the_teacher_nothing(faces: Faces, teacher: Teacher, tmp_path: Path) -> None:
    config = {**BASE, "rec": str(faces.folder), "num_workers": 0, "kd_cache": str(tmp_path / "rows")}
    fill_cache(config, teacher=teacher)
    network: Any = teacher.network
    network.calls = 0
    head = head_of(faces, teacher, CLASS_MEANS, tmp_path / "rows")
    weight = head.methods["proxylesskd"].get_buffer("centers.weight")
    # Drawn faces and their mirror images are alike.
    assert ((weight * made_by(teacher, faces)).sum(1) > 0.99).all()
    network.calls = 0
    student = head._distiller.watch(nn.Sequential(nn.AdaptiveAvgPool2d(6), nn.Flatten()))
    loss = head(student(torch.rand(4, 3, 112, 112)), torch.arange(4))
    assert loss.isfinite()
    assert network.calls == 0


@pytest.mark.parametrize("filled", [IDENTITIES * 8, 40, 0], ids=["all", "some", "none"])
def test_the_order_of_classes_is_checked_from_the_cache_as_far_as_it_goes(
    faces: Faces, teacher: Teacher, tmp_path: Path, filled: int
) -> None:
    dataset = RecordDataset(faces.folder)
    torch.save(made_by(teacher, faces), tmp_path / "head.pt")
    kd = KDConfig(("margindistillation",), cache=str(tmp_path / "rows"), classifier=str(tmp_path / "head.pt"))
    distiller = Distiller(kd, teacher)
    distiller.use_cache(FaceLoader(dataset, batch_size=8, num_workers=0))
    assert distiller.cache is not None
    if filled:
        images = torch.stack([dataset[index].image for index in range(filled)]).float() / 127.5 - 1
        distiller.cache.store(torch.arange(filled), torch.zeros(filled, dtype=torch.bool), teacher(images))
    network: Any = teacher.network
    network.calls = 0
    DistillationHead(distiller, ARCFACE, 108, IDENTITIES, ranks=RankGroup(alone=True))
    assert network.calls == -(-(len(dataset) - filled) // 32)


def test_class_means_want_a_filled_cache(faces: Faces, teacher: Teacher, tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match="with --kd-teacher and --kd-cache"):
        head_of(faces, teacher, CLASS_MEANS)
    with pytest.raises(TeacherError, match="with --kd-teacher and --kd-cache"):
        head_of(faces, None, CLASS_MEANS, tmp_path / "rows")
    with pytest.raises(TeacherError, match="lacks 256 of 256 embeddings"):
        head_of(faces, teacher, CLASS_MEANS, tmp_path / "rows")


def save(classifier: Tensor, path: Path) -> Path:
    torch.save(classifier, path)
    return path


def test_a_classifier_that_fits_the_records(
    faces: Faces, teacher: Teacher, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    classifier = made_by(teacher, faces)
    with caplog.at_level(logging.INFO):
        head = head_of(faces, teacher, save(classifier, tmp_path / "head.pt"))
    assert "of 128 images their own class" in caplog.text
    method = head.methods["proxylesskd"]
    assert isinstance(method, ProxylessKD)
    assert torch.equal(method.centers.weight, classifier)
    assert not (tmp_path / "rows").exists()


def test_a_cache_that_no_method_reads_is_not_made(faces: Faces, teacher: Teacher, tmp_path: Path) -> None:
    head_of(faces, teacher, save(made_by(teacher, faces), tmp_path / "head.pt"), tmp_path / "rows")
    assert not (tmp_path / "rows").exists()


@pytest.mark.parametrize(
    "shuffle",
    [
        lambda c: c.flip(0),
        lambda c: c.roll(1, 0),
        lambda c: torch.cat([c[:8], c[9:], c[:1]]),
        lambda c: torch.cat([c[:14], c[15:], c[:1]]),
        lambda c: torch.randn(c.shape, generator=torch.Generator().manual_seed(1)),
    ],
    ids=["reversed", "shifted", "shifted-behind-8", "shifted-behind-14", "another-teacher"],
)
def test_another_order_of_classes_is_refused(faces: Faces, teacher: Teacher, tmp_path: Path, shuffle: Any) -> None:
    with pytest.raises(TeacherError, match="does not fit the records: of 16 images of classes"):
        head_of(faces, teacher, save(shuffle(made_by(teacher, faces)), tmp_path / "head.pt"))


def test_another_dimension_is_refused(faces: Faces, teacher: Teacher, tmp_path: Path) -> None:
    file = save(torch.randn(IDENTITIES, 64), tmp_path / "head.pt")
    with pytest.raises(TeacherError, match="has 64 dimensions, the teacher 108"):
        head_of(faces, teacher, file)


def test_a_cache_that_stands_for_the_teacher_checks_the_classifier(
    faces: Faces, teacher: Teacher, tmp_path: Path
) -> None:
    cache = str(tmp_path / "rows")
    fill_cache({**BASE, "rec": str(faces.folder), "num_workers": 0, "kd_cache": cache}, teacher=teacher)

    def head(classifier: Tensor) -> DistillationHead:
        file = str(save(classifier, tmp_path / "head.pt"))
        distiller = Distiller(KDConfig(("bank",), cache=cache, classifier=file, options={"bank": {"of": "classes"}}))
        distiller.use_cache(FaceLoader(RecordDataset(faces.folder), batch_size=8, num_workers=0))
        return DistillationHead(distiller, ARCFACE, 108, IDENTITIES, ranks=RankGroup(alone=True))

    fitting = made_by(teacher, faces)
    head(fitting)
    with pytest.raises(TeacherError, match="does not fit the records"):
        head(fitting.flip(0))
    with pytest.raises(TeacherError, match="has 64 dimensions, the teacher 108"):
        head(torch.randn(IDENTITIES, 64))


def test_without_a_teacher_the_order_is_not_checked_and_that_is_said(
    faces: Faces, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = save(torch.randn(IDENTITIES, 108), tmp_path / "head.pt")
    with caplog.at_level(logging.WARNING):
        head_of(faces, None, file)
    assert f"the order of the classes of {file} is not checked: the run has no teacher" in caplog.text


CONFIG = """
from easydict import EasyDict as edict

config = edict()
config.rec = {rec!r}
config.num_classes = 16
config.num_image = 128
config.num_epoch = 1
config.warmup_epoch = 0
config.batch_size = 32
config.num_workers = 0
config.val_targets = []
config.embedding_size = 16
config.network = "thin_r10"
config.save_all_states = True
config.output = {output!r}
"""


@pytest.mark.slow
def test_the_flag_in_a_run(faces: Faces, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A teacher is trained, its classifier is inherited; then class means take its place."""
    config = tmp_path / "small.py"
    config.write_text(CONFIG.format(rec=str(faces.folder), output=str(tmp_path / "student")))
    teacher = tmp_path / "teacher"
    assert main(["train", str(config), "--set", f"output={teacher}", "num_epoch=12", "lr=0.05"]) == 0
    words = ["train", str(config), "--kd", "arcdistill", "--kd-teacher", str(teacher / "model.pt")]
    assert main([*words, "--kd-classifier", str(teacher)]) == 0
    assert main(["cache", *words[1:], "--out", str(tmp_path / "rows"), "--kd-classifier", CLASS_MEANS]) == 0
    assert main([*words, "--kd-classifier", CLASS_MEANS, "--kd-cache", str(tmp_path / "rows")]) == 0
    assert (tmp_path / "student" / "model.pt").is_file()
    capsys.readouterr()
    wrong = read_classifier(teacher, ClassShard(16)).flip(0)
    assert main([*words, "--kd-classifier", str(save(wrong, tmp_path / "wrong.pt"))]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"arcface-kd: the teacher's classifier {tmp_path / 'wrong.pt'} does not fit the records")
