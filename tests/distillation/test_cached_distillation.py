"""Distilling from the cache is distilling from the teacher: the same losses, step by step."""

import logging
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from easydict import EasyDict
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize
from torch.utils.checkpoint import checkpoint

from arcface_kd.config.kd import KDConfig
from arcface_kd.data.dataset import RecordDataset
from arcface_kd.data.loader import BatchViews, FaceLoader
from arcface_kd.data.sampler import ViewSampler
from arcface_kd.distillation import distiller as distiller_module
from arcface_kd.distillation.distiller import Distiller
from arcface_kd.distillation.drop_ins import drop_ins
from arcface_kd.distillation.head import DistillationHead
from arcface_kd.distillation.run_cache import few_sizes, look_up_or_fill
from arcface_kd.distributed.ranks import RankGroup
from arcface_kd.errors import TeacherError
from arcface_kd.evaluation.report.scalars import read_scalars
from arcface_kd.teachers.base import Teacher, load_teacher
from arcface_kd.teachers.cache.embedding_cache import EmbeddingCache
from arcface_kd.teachers.cache.fill import fill_cache
from arcface_kd.teachers.options import TeacherOptions
from arcface_kd.training.trainer import train
from tests.host.trainer.faces import Faces
from tests.make_believe_gpu import make_believe_gpu
from tests.reference.problems import ARCFACE
from tests.training.runs import config_for

DIMENSION = 16


class Network(nn.Module):
    """Embeds images by one matrix over their coarse pixels; the sums are taken in fp64, whatever the batch."""

    def __init__(self, seed: int, rounded: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.randn(3 * 64, DIMENSION, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        )
        self.rounded = rounded
        self.shown = 0

    def forward(self, images: Tensor) -> Tensor:
        self.shown += len(images)
        coarse = nn.functional.adaptive_avg_pool2d(images.double(), 8).flatten(1)
        embeddings = coarse @ self.weight
        # What a cache keeps of them: unit vectors in fp16.
        return normalize(embeddings.float()).half().float() if self.rounded else embeddings.float()


class Losses(NamedTuple):
    """A run's loss at each step, and what the teacher was said to say."""

    losses: list[float]
    teacher: Tensor
    views: list[tuple[int, bool]]


def teacher_of(network: Network) -> Teacher:
    made = load_teacher(network, TeacherOptions())
    network.shown = 0
    return made


def distil(
    faces: Faces,
    teacher: Teacher,
    cache: Path | None,
    *,
    epochs: range = range(2),
    workers: int = 0,
    resume: dict[str, Any] | None = None,
    options: dict[str, dict[str, object]] | None = None,
) -> Losses:
    """A few steps of AdaDistill; ``resume`` is loaded before and written after."""
    kd = KDConfig(methods=("adadistill",), cache=None if cache is None else str(cache), options=options or {})
    distiller = Distiller(kd, teacher)
    dataset = RecordDataset(faces.folder)
    loader = FaceLoader(dataset, batch_size=9, sampler=ViewSampler(len(dataset), seed=4), num_workers=workers)
    distiller.use_cache(loader)
    views: list[tuple[int, bool]] = []
    tell = loader.on_batch

    def listen(shown: BatchViews) -> None:
        views.extend(zip(shown.index.tolist(), shown.flipped.tolist(), strict=True))
        if tell is not None:
            tell(shown)

    loader.on_batch = listen
    student = distiller.watch(Network(seed=2))
    head = DistillationHead(distiller, ARCFACE, DIMENSION, faces.num_classes, ranks=RankGroup(alone=True))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9)
    parts: dict[str, Any] = {"student": student, "head": head, "optimizer": optimizer}
    for name, state in (resume or {}).items():
        parts[name].load_state_dict(state)
    said, losses = [], []
    take = distiller.take_teacher_embeddings

    def listen_to_the_teacher(rows: int) -> Tensor | None:
        embeddings = take(rows)
        assert embeddings is not None
        said.append(embeddings)
        return embeddings

    distiller.take_teacher_embeddings = listen_to_the_teacher  # type: ignore[method-assign]
    for epoch in epochs:
        loader.sampler.set_epoch(epoch)
        for images, labels in loader:
            loss = head(student(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    if resume is not None:
        resume.update({name: part.state_dict() for name, part in parts.items()})
    return Losses(losses, torch.cat(said), views)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_cache_says_what_the_teacher_says(faces: Faces, tmp_path: Path, workers: int) -> None:
    """Fp16 rounding aside, and with it put into the teacher, to the last bit."""
    online = distil(faces, teacher_of(Network(1)), None)
    rounded = distil(faces, teacher_of(Network(1, rounded=True)), None)
    assert {flipped for _, flipped in online.views} == {True, False}
    filling = distil(faces, teacher_of(Network(1)), tmp_path / "rows", workers=workers)
    filled = distil(faces, teacher_of(Network(1)), tmp_path / "rows", workers=workers)
    for cached in (filling, filled):
        assert cached.views == online.views
        assert (cached.teacher - online.teacher).abs().max() < 1e-3
        assert (cosine_similarity(cached.teacher, online.teacher) > 1 - 1e-5).all()
        torch.testing.assert_close(cached.losses, online.losses, rtol=2e-3, atol=2e-3)
        assert cached.losses == rounded.losses
    assert len(set(online.losses)) == len(online.losses)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_looks_up_and_no_step_does(
    faces: Faces, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = distil(faces, teacher_of(Network(1)), tmp_path / "rows")
    # In the thread or the processes that read images.
    monkeypatch.setattr(distiller_module, "look_up_or_fill", lambda cache, *given: look_up_or_fill(None, *given))  # type: ignore[arg-type]
    assert distil(faces, teacher_of(Network(1)), tmp_path / "rows", workers=workers).losses == wanted.losses


def test_a_loader_that_reads_another_runs_cache_is_not_believed(faces: Faces, tmp_path: Path) -> None:
    dataset = RecordDataset(faces.folder)
    loader = FaceLoader(dataset, batch_size=9, num_workers=1)
    said = []
    for seed in (1, 2):
        kd = KDConfig(methods=("adadistill",), cache=str(tmp_path / f"rows{seed}"))
        distiller = Distiller(kd, teacher_of(Network(seed)))
        distiller.use_cache(loader)
        student = distiller.watch(Network(seed=3))
        for _ in range(2):
            for images, _ in loader:
                student(images)
                said.append(distiller.take_teacher_embeddings(len(images)))
                wanted = normalize(Network(seed)(images)).detach()
                torch.testing.assert_close(said[-1], wanted, rtol=0, atol=1e-3)


def test_a_full_cache_leaves_the_teacher_alone(faces: Faces, tmp_path: Path) -> None:
    network = Network(1)
    distil(faces, teacher_of(network), tmp_path / "rows", epochs=range(12))
    once = network.shown
    # Both views of 48 images, however often they were seen; 45 of 48 are seen in an epoch.
    assert 90 <= once <= 96
    again = teacher_of(network)
    distil(faces, again, tmp_path / "rows", epochs=range(12))
    assert network.shown == 0


def test_other_orders_and_other_flips_read_the_same_rows(faces: Faces, tmp_path: Path) -> None:
    network = Network(1)
    distil(faces, teacher_of(network), tmp_path / "rows", epochs=range(12))
    cached = distil(faces, teacher_of(network), tmp_path / "rows", epochs=range(30, 33))
    rounded = distil(faces, teacher_of(Network(1, rounded=True)), None, epochs=range(30, 33))
    assert cached.losses == rounded.losses


def test_a_resumed_run_goes_on_as_if_nothing_had_been(faces: Faces, tmp_path: Path) -> None:
    whole = distil(faces, teacher_of(Network(1)), tmp_path / "whole", epochs=range(3))
    state: dict[str, Any] = {}
    first = distil(faces, teacher_of(Network(1)), tmp_path / "parts", epochs=range(1), resume=state)
    then = distil(faces, teacher_of(Network(1)), tmp_path / "parts", epochs=range(1, 3), resume=state, workers=1)
    assert first.losses + then.losses == whole.losses


def test_another_teacher_is_refused(faces: Faces, tmp_path: Path) -> None:
    distil(faces, teacher_of(Network(1)), tmp_path / "rows", epochs=range(1))
    with pytest.raises(TeacherError, match="was made for another teacher"):
        distil(faces, teacher_of(Network(3)), tmp_path / "rows", epochs=range(1))


def test_a_loop_that_leaves_the_loader_out_is_told(faces: Faces, tmp_path: Path) -> None:
    """Images that did not come from the loader have no rows: those of the last batch would be wrong."""
    distiller = Distiller(KDConfig(methods=("adadistill",), cache=str(tmp_path / "rows")), teacher_of(Network(1)))
    loader = FaceLoader(RecordDataset(faces.folder), batch_size=9, num_workers=0)
    distiller.use_cache(loader)
    student = distiller.watch(Network(2))
    images, _ = next(iter(loader))
    student(images)
    student(images)
    with pytest.raises(RuntimeError, match="the loader did not say which records these 9 images are"):
        distiller.take_teacher_embeddings(9)
    next(iter(loader))
    with pytest.raises(RuntimeError, match="which records these 4 images are"):
        student(images[:4])


def test_a_student_that_is_recomputed_in_the_backward_pass_needs_no_records_again(faces: Faces, tmp_path: Path) -> None:
    distiller = Distiller(KDConfig(methods=("embedding",), cache=str(tmp_path / "rows")), teacher_of(Network(1)))
    loader = FaceLoader(RecordDataset(faces.folder), batch_size=9, num_workers=0)
    distiller.use_cache(loader)
    student = distiller.watch(Network(2))
    head = DistillationHead(distiller, ARCFACE, DIMENSION, faces.num_classes)
    for images, labels in loader:
        head(checkpoint(student, images, use_reentrant=False), labels).backward()
    assert student.weight.grad is not None


class _Augmented(RecordDataset):
    pass


def test_an_augmentation_switches_the_cache_off_loudly(
    faces: Faces, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    network = Network(1)
    distiller = Distiller(KDConfig(methods=("adadistill",), cache=str(tmp_path / "rows")), teacher_of(network))
    loader = FaceLoader(_Augmented(faces.folder), batch_size=9, num_workers=0)
    with caplog.at_level(logging.WARNING):
        distiller.use_cache(loader)
    assert "kd_cache is off: a _Augmented may show an image in other ways" in caplog.text
    assert distiller.cache is None
    assert list(tmp_path.iterdir()) == []
    student = distiller.watch(Network(2))
    for _ in range(2):
        student(next(iter(loader))[0])
    assert network.shown == 18


def test_dali_switches_the_cache_off_loudly(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    distiller = Distiller(KDConfig(methods=("adadistill",), cache=str(tmp_path / "rows")), teacher_of(Network(1)))
    asked: list[Any] = []

    def host_loader(*arguments: Any) -> None:
        asked.append(arguments)

    made = drop_ins(dict, distiller=distiller, host_loader=host_loader)
    with caplog.at_level(logging.WARNING):
        made.get_dataloader("/nowhere", 0, 8, True, True)
    assert "kd_cache is off: DALI does not say" in caplog.text
    assert len(asked) == 1
    assert distiller.cache is None


@pytest.mark.slow
def test_the_trainer_reads_it(faces: Faces, tmp_path: Path) -> None:
    """Through the config's key, from the first epoch on and in the next run, with workers and after a resume."""
    keys = {"val_targets": [], "embedding_size": DIMENSION, "batch_size": 9, "lr": 0.01, "save_all_states": True}
    config = config_for(faces, tmp_path, num_epoch=3, **keys)

    def losses(name: str, network: Network, **keys: Any) -> list[float]:
        kd = KDConfig(methods=("adadistill",), cache=keys.pop("cache", None))
        train(EasyDict(config, output=str(tmp_path / name), **keys), distiller=Distiller(kd, teacher_of(network)))
        return read_scalars(tmp_path / name / "tensorboard")["loss"].y.tolist()

    cache, network = str(tmp_path / "rows"), Network(1)
    wanted = losses("online", Network(1, rounded=True))
    assert losses("filling", network, cache=cache) == wanted
    fill_cache(EasyDict(config, kd_cache=cache), teacher=teacher_of(network))
    assert losses("cached", network, cache=cache, num_workers=1) == wanted
    assert network.shown == 0
    losses("parts", network, cache=cache, num_epoch=1)
    # The schedule follows num_epoch, so a shorter run is another one from its second epoch on.
    resumed = losses("parts", network, cache=cache, resume=True)
    assert resumed[:5] == losses("short", Network(1, rounded=True), num_epoch=1)
    assert len(resumed) == 15
    assert network.shown == 0


def test_a_gpu_meets_few_sizes_of_what_a_cache_lacks() -> None:
    sizes = set()
    for count in range(1, 101):
        places = torch.randperm(100)[:count]
        padded = few_sizes(places, 100)
        assert torch.equal(padded[:count], places)
        assert set(padded.tolist()) == set(places.tolist())
        sizes.add(len(padded))
    assert sizes == {1, 2, 4, 8, 16, 32, 64, 100}


def test_what_a_cache_lacks_is_picked_on_the_gpu_without_a_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity = {"format": 1, "teacher": "0", "preprocessing": "0", "precision": "fp32", "data": "0", "images": 6}
    cache = EmbeddingCache(tmp_path / "rows", {**identity, "embedding_size": DIMENSION})
    index, flipped = torch.arange(6), torch.zeros(6, dtype=torch.bool)
    pixels = torch.randn(6, 3, 8, 8)
    expected = normalize(pixels.flatten(1)[:, :DIMENSION])
    cache.store(index[:3], flipped[:3], expected[:3])
    asked: list[int] = []

    def teacher(images: Tensor) -> Tensor:
        asked.append(len(images))
        return normalize(images.flatten(1)[:, :DIMENSION])

    with make_believe_gpu() as record:
        monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
        images = pixels.to("cuda")
        record.clear()
        met = look_up_or_fill(cache, teacher, images, BatchViews(index, flipped))  # type: ignore[arg-type]
        assert not record.mixes
        # What is kept in the file has to come to the host; nothing else does.
        assert [place.partition(" at ")[0] for place in record.syncs] == [f"a copy of (3, {DIMENSION}) to cpu"]
        assert met.is_cuda
        met = met.cpu()
    assert asked == [4]
    torch.testing.assert_close(met, expected, rtol=0, atol=1e-3)
