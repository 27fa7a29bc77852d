"""Runs of the compact trainer on several record sets: cache, class means, resume and verification know them."""

from pathlib import Path

import pytest
from easydict import EasyDict

from arcface_kd.errors import ArcfaceKDError, ConfigError, DataError, TeacherError
from arcface_kd.teachers.cache.fill import fill_cache
from arcface_kd.training.trainer import train
from tests.host.trainer.faces import Faces, draw_faces
from tests.training.runs import config_for, saved


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Faces:
    return draw_faces(tmp_path_factory.mktemp("others"), identities=6, images=4, seed=5)


def test_a_run_on_two_sets(faces: Faces, others: Faces, teacher_file: Path, tmp_path: Path) -> None:
    people = tmp_path / "people.csv"
    people.write_text("set,label,identity\n0,3,ann\n1,0,ann\n")
    config = config_for(
        faces,
        tmp_path / "run",
        rec=[str(faces.folder), str(others.folder)],
        rec_identities=str(people),
        num_classes=15,
        num_image=faces.num_image + others.num_image,
        kd="proxylesskd",
        kd_classifier="class-means",
        kd_teacher=str(teacher_file),
        kd_cache=str(tmp_path / "rows"),
        save_all_states=True,
        num_epoch=1,
    )
    report = fill_cache(config)
    assert report.images == config.num_image
    result = train(config)
    assert result.steps == config.num_image // config.batch_size
    assert list(result.verification) == ["pairs"]
    # Another order is other data to the cache, other people are another run.
    cases: list[tuple[dict[str, object], type[ArcfaceKDError]]] = [
        ({"rec": config.rec[::-1], "rec_identities": None, "num_classes": 16, "output": str(tmp_path)}, TeacherError),
        ({"rec_identities": None, "num_classes": 16, "resume": True}, ArcfaceKDError),
        ({"num_classes": 14, "output": str(tmp_path / "few")}, DataError),
        ({"rec": [], "output": str(tmp_path / "none")}, ConfigError),
    ]
    for keys, kind in cases:
        with pytest.raises(kind):
            train(EasyDict({**config, **keys}))
    people.write_text("set,label,identity\n0,3,ann\n1,1,ann\n")
    with pytest.raises(ArcfaceKDError, match="data"):
        train(EasyDict({**config, "resume": True, "num_epoch": 2}))
    people.write_text("set,label,identity\n0,3,ann\n1,0,ann\n")
    again = train(EasyDict({**config, "resume": True, "num_epoch": 2}))
    assert again.steps == 2 * result.steps
    assert saved(tmp_path / "run", "checkpoint_gpu_0.pt")["epoch"] == 2
