"""Runs of TCS in the compact trainer: the teacher is not asked, a plain network is left, a resumed run is the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
from easydict import EasyDict

from arcface_kd.backbones import get_backbone
from arcface_kd.checkpoints.shards import merge_head
from arcface_kd.config.kd import KDConfig
from arcface_kd.data.dataset import RecordDataset
from arcface_kd.data.loader import FaceLoader
from arcface_kd.distillation.distiller import Distiller
from arcface_kd.distillation.drop_ins import drop_ins
from arcface_kd.distillation.head import DistillationHead
from arcface_kd.distributed.ranks import RankGroup
from arcface_kd.errors import TeacherError
from arcface_kd.evaluation.report.scalars import read_scalars
from arcface_kd.teachers.cache.fill import fill_cache
from arcface_kd.training.trainer import TrainResult, train
from tests.distillation.test_cached_distillation import DIMENSION, Network, teacher_of
from tests.host.trainer.faces import Faces, draw_faces
from tests.reference.problems import ARCFACE
from tests.training import runs
from tests.training.runs import saved

STUDENT_DIMENSION = 24


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Faces:
    return draw_faces(tmp_path_factory.mktemp("faces"), identities=6, images=8)


def config_for(faces: Faces, output: Path, **keys: Any) -> EasyDict:
    own = {"network": "thin_r10", "embedding_size": STUDENT_DIMENSION, "batch_size": 12, "lr": 0.02}
    return runs.config_for(faces, output, **{**own, "val_targets": [], "save_all_states": True, **keys})


@pytest.fixture(scope="module")
def cache(faces: Faces, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A full cache of a teacher of 16 dimensions, where the student has 24."""
    folder = tmp_path_factory.mktemp("cache")
    fill_cache(config_for(faces, folder, kd_cache=str(folder / "rows")), teacher=teacher_of(Network(1)))
    return folder / "rows"


def options(**values: object) -> dict[str, dict[str, object]]:
    return {"tcs": {"variance": 0.99, "drop": 0.5, "rounds": 2, "drop_begin": 0.1, "drop_end": 0.8, **values}}


def distiller_for(cache: Path, network: Network | None = None, **values: object) -> Distiller:
    kd = KDConfig(methods=("tcs",), cache=str(cache), options=options(**values))
    return Distiller(kd, None if network is None else teacher_of(network))


@pytest.fixture(scope="module")
def run(faces: Faces, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    network = Network(1)
    distiller = distiller_for(cache, network)
    result = train(config_for(faces, tmp_path_factory.mktemp("run")), distiller=distiller)
    assert network.shown == 0, "the teacher is not asked"
    assert distiller.teacher is None, "nor kept"
    return result


def test_a_run_drops_axes_and_leaves_a_plain_network(faces: Faces, run: TrainResult) -> None:
    plain = get_backbone("thin_r10", num_features=STUDENT_DIMENSION)
    assert list(saved(run.output)) == list(plain.state_dict())
    plain.load_state_dict(saved(run.output), strict=True)
    images = torch.stack([RecordDataset(faces.folder)[at].image for at in range(16)]) / 127.5 - 1
    with torch.no_grad():
        embeddings, live = plain.eval()(images), run.student.eval()(images)
    torch.testing.assert_close(embeddings, live, rtol=1e-5, atol=1e-5)
    assert embeddings.shape == (16, STUDENT_DIMENSION)
    head = saved(run.output, "checkpoint_gpu_0.pt")["state_dict_softmax_fc"]
    mask, axes = head["methods.tcs.mask"], len(head["methods.tcs.axes"])
    assert 4 <= axes <= DIMENSION
    assert int(mask.sum()) == axes - round(axes / 2)
    assert torch.equal(embeddings[:, mask == 0], torch.zeros(16, STUDENT_DIMENSION - int(mask.sum())))
    assert (embeddings[:, mask > 0].abs().amax(0) > 0).all()
    scalars = read_scalars(run.output / "tensorboard")
    assert {"kd/ce", "kd/mimic", "kd/axes", "kd/mimic_distance"} <= set(scalars)
    assert scalars["kd/axes"].y[[0, -1]].tolist() == [axes, int(mask.sum())]


def test_its_class_centers_belong_to_its_embeddings(run: TrainResult, tmp_path: Path) -> None:
    assert merge_head(run.output, tmp_path / "head.pt") == (6, STUDENT_DIMENSION)
    mask = saved(run.output, "checkpoint_gpu_0.pt")["state_dict_softmax_fc"]["methods.tcs.mask"]
    centers = torch.load(tmp_path / "head.pt", weights_only=True)["weight"]
    assert centers[:, mask == 0].count_nonzero() == 0
    assert (centers[:, mask > 0] != 0).all()


def test_a_resumed_run_gives_the_same_bits(faces: Faces, cache: Path, run: TrainResult, tmp_path: Path) -> None:
    config = config_for(faces, tmp_path / "parts")
    runs.train_until(1, config, distiller=distiller_for(cache))
    half = saved(tmp_path / "parts", "checkpoint_gpu_0.pt")["state_dict_softmax_fc"]["methods.tcs.mask"]
    train(EasyDict(config, resume=True), distiller=distiller_for(cache))
    for name in ("model.pt", "checkpoint_gpu_0.pt"):
        one, other = saved(tmp_path / "parts", name), saved(run.output, name)
        if name != "model.pt":
            one, other = one["state_dict_softmax_fc"], other["state_dict_softmax_fc"]
        assert one.keys() == other.keys()
        for key in one:
            assert torch.equal(one[key], other[key]), key
    whole = saved(run.output, "checkpoint_gpu_0.pt")["state_dict_softmax_fc"]["methods.tcs.mask"]
    assert int(half.sum()) > int(whole.sum()), "the interruption fell between two rounds"
    losses = [read_scalars(folder / "tensorboard")["loss"].y.tolist() for folder in (tmp_path / "parts", run.output)]
    assert losses[0] == losses[1]


def test_a_random_basis_trains_too(faces: Faces, cache: Path, tmp_path: Path) -> None:
    config = config_for(faces, tmp_path / "run", num_epoch=1)
    distiller = distiller_for(cache, basis="random", dimension=4, drop=0)
    assert train(config, distiller=distiller).steps == 4
    head = saved(tmp_path / "run", "checkpoint_gpu_0.pt")["state_dict_softmax_fc"]
    assert head["methods.tcs.axes"].shape == (4, DIMENSION)
    assert int(head["methods.tcs.mask"].sum()) == 4


class TestStopsBeforeTheFirstStep:
    def refused(self, faces: Faces, tmp_path: Path, distiller: Distiller, said: str, **keys: Any) -> None:
        with pytest.raises(TeacherError, match=said):
            train(config_for(faces, tmp_path / "run", **keys), distiller=distiller)
        assert not (tmp_path / "run").exists()

    def test_without_a_cache(self, faces: Faces, tmp_path: Path) -> None:
        said = r"no cache of a teacher's embeddings at .*none: fill it beforehand with `arcface-kd cache CONFIG"
        for network in (None, Network(1)):
            self.refused(faces, tmp_path, distiller_for(tmp_path / "none", network), said)
        assert list(tmp_path.iterdir()) == []

    def test_with_one_that_is_not_full(self, faces: Faces, cache: Path, tmp_path: Path) -> None:
        rows = bytearray(cache.read_bytes())
        rows[: 5 * 2 * DIMENSION] = bytes(5 * 2 * DIMENSION)
        (tmp_path / "rows").write_bytes(rows)
        (tmp_path / "rows.json").write_bytes((cache.parent / "rows.json").read_bytes())
        self.refused(faces, tmp_path, distiller_for(tmp_path / "rows"), r"lacks 5 of 96 embeddings: fill it")

    def test_with_another_teacher_s_or_of_other_data(self, faces: Faces, cache: Path, tmp_path: Path) -> None:
        self.refused(faces, tmp_path, distiller_for(cache, Network(2)), "was made for another teacher")
        (tmp_path / "other").mkdir()
        other = draw_faces(tmp_path / "other", identities=6, images=8, seed=1)
        self.refused(other, tmp_path, distiller_for(cache), "was made for another data set")

    def test_with_a_loader_that_does_not_tell_the_records(self, faces: Faces, cache: Path, tmp_path: Path) -> None:
        config = config_for(faces, tmp_path / "run")
        made = drop_ins(lambda: config, distiller=distiller_for(cache), host_loader=lambda *arguments: None)
        made.get_dataloader(config.rec, 0, 12, True)
        made.get_model("thin_r10", num_features=STUDENT_DIMENSION)
        with pytest.raises(TeacherError, match=r"the loader does not say which these are: set dali=False"):
            made.PartialFC_V2(ARCFACE, STUDENT_DIMENSION, 6)


class _Augmented(RecordDataset):
    pass


def test_data_that_shows_images_in_other_ways_is_refused(faces: Faces, cache: Path) -> None:
    with pytest.raises(TeacherError, match="a _Augmented may show an image in other ways than plain and mirrored"):
        distiller_for(cache).use_cache(FaceLoader(_Augmented(faces.folder), batch_size=9, num_workers=0))


def test_a_row_that_is_lost_on_the_way_is_named(faces: Faces, cache: Path, tmp_path: Path) -> None:
    for name in ("rows", "rows.json"):
        (tmp_path / name).write_bytes((cache.parent / name).read_bytes())
    distiller = distiller_for(tmp_path / "rows", drop=0)
    loader = FaceLoader(RecordDataset(faces.folder), batch_size=9, num_workers=0)
    distiller.use_cache(loader)
    student = distiller.watch(get_backbone("thin_r10", num_features=STUDENT_DIMENSION))
    head = DistillationHead(distiller, ARCFACE, STUDENT_DIMENSION, 6, ranks=RankGroup(alone=True))
    with (tmp_path / "rows").open("r+b") as stream:
        stream.seek(2 * 2 * DIMENSION * 3)
        stream.write(bytes(2 * DIMENSION))
    images, labels = next(iter(loader))
    with pytest.raises(TeacherError, match=r"rows lacks embeddings of images \[3\]: fill it"):
        head(student(images), labels)
