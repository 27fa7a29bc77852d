"""Methods joined by ``+``: their terms add up, each is logged with its share, options reach the one they name."""

from pathlib import Path

import pytest
import torch

from arcface_kd.config.kd import KDConfig
from arcface_kd.distillation.distiller import Distiller
from arcface_kd.distillation.head import DistillationHead
from arcface_kd.distillation.tensorboard_log import TensorBoardLog
from arcface_kd.distributed.ranks import RankGroup
from arcface_kd.errors import ConfigError
from arcface_kd.evaluation.report.scalars import read_scalars
from arcface_kd.teachers.base import load_teacher
from arcface_kd.teachers.options import TeacherOptions
from arcface_kd.training.trainer import train
from tests.distillation.test_distiller import CLASSES, LABELS, Embedder, images
from tests.host.trainer.faces import Faces
from tests.networks import untrained_file
from tests.reference.problems import ARCFACE
from tests.training.runs import config_for


def _scalars(folder: Path) -> dict[str, float]:
    return {name.removeprefix("kd/"): float(values.y[-1]) for name, values in read_scalars(folder).items()}


def _step(kd: str, folder: Path, **options: dict[str, object]) -> tuple[float, dict[str, float]]:
    """The loss of one step and what it leaves in the log."""
    teacher = load_teacher(Embedder(5, 1, [], "teacher"), TeacherOptions(size=8))
    folder.mkdir()
    torch.save(torch.randn(CLASSES, 5, generator=torch.Generator().manual_seed(3)), folder / "head.pt")
    config = KDConfig(tuple(kd.split("+")), options=options, classifier=str(folder / "head.pt"))
    distiller = Distiller(config, teacher)
    student = distiller.watch(Embedder(5, 2, [], "student"))
    log = TensorBoardLog(folder / "log", 1, writes=True)
    head = DistillationHead(distiller, ARCFACE, 5, CLASSES, seed=4, ranks=RankGroup(alone=True), log=log)
    loss = head(student(images()), LABELS)
    loss.backward()
    return loss.item(), _scalars(folder / "log")


@pytest.mark.parametrize(
    ("kd", "terms"),
    [
        ("adadistill+embedding", {"adadistill": ["ce"], "embedding": ["embedding"]}),
        ("rkd+ekd", {"rkd": ["rkd_distance", "rkd_angle"], "ekd": ["ekd_positive", "ekd_negative"]}),
        ("gkd+embedding", {"gkd": ["ce", "primary_kd", "binary_kd"], "embedding": ["embedding"]}),
        ("kd+rkd", {"kd": ["ce", "kd"], "rkd": ["rkd_distance", "rkd_angle"]}),
        ("margindistillation+rkd", {"margindistillation": ["ce"], "rkd": ["rkd_distance", "rkd_angle"]}),
        ("embedding+adadistill+rkd", {"embedding": ["embedding"], "adadistill": ["ce"], "rkd": ["rkd_distance"]}),
    ],
)
def test_terms_are_those_of_each_method_alone_and_shares_are_of_all(
    kd: str, terms: dict[str, list[str]], tmp_path: Path
) -> None:
    total, together = _step(kd, tmp_path / "together")
    for method, names in terms.items():
        _, alone = _step(method, tmp_path / method)
        for name in names:
            assert together[name] == pytest.approx(alone[name], rel=1e-5)
            assert together[f"gradient_norm/{name}"] == pytest.approx(alone[f"gradient_norm/{name}"], rel=1e-4)
    shares = {name.removeprefix("gradient_share/"): value for name, value in together.items() if "share" in name}
    assert sum(shares.values()) == pytest.approx(1, rel=1e-5)
    assert sum(together[name] for name in shares) == pytest.approx(total, rel=1e-5)


def test_an_option_reaches_the_method_it_names(tmp_path: Path) -> None:
    _, heavy = _step("adadistill+embedding", tmp_path / "heavy", embedding={"weight": "64"})
    _, light = _step("adadistill+embedding", tmp_path / "light", embedding={"weight": "1"})
    assert heavy["embedding"] == pytest.approx(64 * light["embedding"], rel=1e-5)
    assert heavy["ce"] == light["ce"]
    assert heavy["gradient_share/embedding"] > light["gradient_share/embedding"]


@pytest.mark.parametrize("kd", ["margindistillation+adadistill", "proxylesskd+adadistill", "gkd+kd"])
def test_two_classifications_exclude_each_other_in_one_line(kd: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"^{kd.replace('+', ' and ')} both bring a classification loss .*$"):
        _step(kd, tmp_path / "run")


@pytest.mark.parametrize("kd", ["adadistill", "proxylesskd", "kd", "gkd", "thkd", "embedding", "rkd", "ekd+adadistill"])
def test_every_method_that_classifies_takes_adafaces_margin(kd: str, tmp_path: Path) -> None:
    """The images' norms are far below the mean that it begins with: all qualities are low, and not zero."""
    _, plain = _step(kd, tmp_path / "plain")
    _, adaface = _step(kd, tmp_path / "adaface", head={"margin": "adaface"})
    assert adaface["ce"] != plain["ce"]
    assert adaface["gradient_norm/ce"] > 0


@pytest.mark.parametrize(
    ("kd", "options"),
    [
        ("arcdistill", {"head": {"margin": "adaface"}}),
        ("margindistillation", {"head": {"margin": "adaface"}}),
        ("cosdistill", {"head": {"margin": "adaface"}, "cosdistill": {"margin": 0.4}}),
        ("embedding", {"head": {"margin": "adaface"}, "embedding": {"labels": "none"}}),
        ("adadistill", {"adadistill": {"geometry": 3}}),
    ],
)
def test_adafaces_margin_where_it_would_have_no_effect(
    kd: str, options: dict[str, dict[str, object]], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"head\.margin=adaface"):
        _step(kd, tmp_path / "run", **options)


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untrained_file(tmp_path_factory.mktemp("teacher"), "thin_r10", 24)


@pytest.mark.parametrize(
    ("kd", "options", "terms"),
    [
        ("adadistill+embedding", ["embedding.weight=64"], {"ce", "embedding"}),
        ("embedding", ["embedding.labels=none"], {"embedding"}),
    ],
)
def test_the_compact_trainer_trains_a_student_towards_the_teacher(
    faces: Faces, teacher_file: Path, kd: str, options: list[str], terms: set[str], tmp_path: Path
) -> None:
    keys = {"val_targets": [], "embedding_size": 24, "num_epoch": 4, "lr": 0.02, "network": "thin_r10"}
    train(config_for(faces, tmp_path, kd=kd, kd_teacher=str(teacher_file), kd_option=options, **keys))
    scalars = read_scalars(tmp_path / "tensorboard")
    assert {name for name in scalars if name.startswith("kd/gradient_share/")} == {
        f"kd/gradient_share/{term}" for term in terms
    }
    cosine = scalars["kd/embedding_cosine"].y
    assert cosine[-3:].mean() > cosine[:3].mean() + 0.2
