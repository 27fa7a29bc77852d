"""Runs on faces without labels: folders of any depth, records of -1, beside labelled ones; and what refuses them."""

from pathlib import Path
from typing import Any

import pytest
from easydict import EasyDict

from arcface_kd.checkpoints.shards import open_shards
from arcface_kd.data.dataset import RecordDataset
from arcface_kd.errors import ConfigError
from arcface_kd.evaluation.report.scalars import read_scalars
from arcface_kd.teachers.cache.fill import fill_cache
from arcface_kd.training.trainer import train
from tests.data.record_sets import record, write_records
from tests.host.trainer.faces import Faces
from tests.training.runs import config_for, saved

PHOTOS = 32


@pytest.fixture(scope="module")
def unlabelled(faces: Faces, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The same faces as a flat folder, a tree and records."""
    folder = tmp_path_factory.mktemp("photos")
    images = [RecordDataset(faces.folder).image_bytes(index) for index in range(PHOTOS)]
    for place, image in enumerate(images):
        for name in (f"flat/{place:02}.jpg", f"tree/{place % 3}/{'deep/' * (place % 2)}{place}.jpg"):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image)
    write_records(folder / "records", [(key, record(key, -1.0, image)) for key, image in enumerate(images)])
    return {name: str(folder / name) for name in ("flat", "tree", "records")}


def _config(faces: Faces, teacher: Path, output: Path, rec: Any, kd: str | None, **keys: Any) -> EasyDict:
    given: dict[str, Any] = {"num_classes": 0, "num_image": PHOTOS, "num_epoch": 1, "val_targets": []}
    if kd:
        given |= {"kd_teacher": str(teacher), "kd_cache": f"{output}.cache", "kd_classifier": "class-means"}
    return config_for(faces, output, rec=rec, kd=kd, **{**given, **keys})


@pytest.mark.parametrize(
    ("place", "kd"),
    [("flat", "embedding"), ("tree", "bank+embedding"), ("records", "rkd"), ("records", "embedding+rkd+bank")],
)
def test_a_run_without_labels(
    faces: Faces, teacher_file: Path, unlabelled: dict[str, str], place: str, kd: str, tmp_path: Path
) -> None:
    config = _config(faces, teacher_file, tmp_path / "run", unlabelled[place], kd, save_all_states=True)
    if "bank" in kd:
        fill_cache(config)
    assert train(config).steps == PHOTOS // 16
    terms = {name for name in read_scalars(tmp_path / "run" / "tensorboard") if name.startswith("kd/gradient_share")}
    assert {name.rpartition("/")[2].partition("_")[0] for name in terms} == set(kd.split("+"))
    # As a second rank would have left it; the resumed run has one.
    (tmp_path / "run" / "checkpoint_gpu_1.pt").write_bytes((tmp_path / "run" / "checkpoint_gpu_0.pt").read_bytes())
    assert open_shards(tmp_path / "run").world_size == 2
    assert train(EasyDict({**config, "resume": True, "num_epoch": 2})).steps == 2 * PHOTOS // 16
    assert open_shards(tmp_path / "run").world_size == 1


@pytest.mark.parametrize("kd", [None, "adadistill", "ekd", "gkd+embedding", "tcs"])
@pytest.mark.parametrize("num_classes", [0, 3])
def test_what_needs_labels_refuses_them_by_name(
    faces: Faces, teacher_file: Path, unlabelled: dict[str, str], kd: str | None, num_classes: int, tmp_path: Path
) -> None:
    config = _config(faces, teacher_file, tmp_path / "run", unlabelled["flat"], kd, num_classes=num_classes)
    with pytest.raises(ConfigError, match=f"{(kd or 'without --kd').removesuffix('+embedding')} needs labels"):
        train(config)
    assert not (tmp_path / "run").exists()


def test_classes_of_nobody_are_refused(
    faces: Faces, teacher_file: Path, unlabelled: dict[str, str], tmp_path: Path
) -> None:
    config = _config(faces, teacher_file, tmp_path / "run", unlabelled["records"], "embedding", num_classes=3)
    with pytest.raises(ConfigError, match="num_classes=0"):
        train(config)


def test_labelled_and_unlabelled_sets_together(
    faces: Faces, teacher_file: Path, unlabelled: dict[str, str], tmp_path: Path
) -> None:
    """The classifier moves for the labelled rows, the distance is that of all rows."""
    rec = [str(faces.folder), unlabelled["flat"], f"{unlabelled['tree']}/**", unlabelled["records"]]
    keys = {"num_classes": faces.num_classes, "num_image": faces.num_image + 3 * PHOTOS, "save_all_states": True}
    options = ["bank.labels=classify", "bank.of=classes", "bank.mined=1"]
    kd = "adadistill+embedding+bank"
    config = _config(faces, teacher_file, tmp_path / "run", rec, kd, batch_size=8, kd_option=options, **keys)
    fill_cache(config)
    assert train(config).steps == config.num_image // 8
    met = read_scalars(tmp_path / "run" / "tensorboard")
    for term in ("embedding", "bank", "mined"):
        assert (met[f"kd/gradient_share/{term}"].y > 0).all()
    assert (met["kd/ce"].y >= 0).all()
    assert saved(tmp_path / "run", "checkpoint_gpu_0.pt")["epoch"] == 1
