"""TinyFace's search against loops, and its folders."""

import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from arcface_kd.data.formats.tinyface import read_tinyface
from arcface_kd.errors import DataError
from arcface_kd.evaluation.tinyface import embed_tinyface, judge_tinyface
from tests.data.tinyface_folders import write_tinyface
from tests.reference import ijb, tinyface


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tinyface(tmp_path / "aligned")


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.AvgPool2d(28), nn.Flatten(), nn.Linear(48, 12)).eval()


def test_ranks_are_those_of_the_loops(folder: Path) -> None:
    faces = read_tinyface(folder)
    models = [network(0), network(1)]
    own, other = (embed_tinyface(model, faces, batch_size=7) for model in models)
    plain, across = judge_tinyface(faces, own), judge_tinyface(faces, own, other)
    assert (plain["mated_searches"], plain["gallery_faces"]) == (18, 12 + 25)
    expected = tinyface.rank_rates(folder, ijb.embed_with(models[0]), (1, 5, 20))
    assert plain == {**plain, **{f"rank-{rank}": rate for rank, rate in expected.items()}}
    assert 0 < expected[1] < expected[5] <= expected[20]
    expected = tinyface.rank_rates(folder, ijb.embed_with(models[0]), (1, 5, 20), ijb.embed_with(models[1]))
    assert across == {**across, **{f"rank-{rank}": rate for rank, rate in expected.items()}}
    assert across != plain


def test_distractors_are_in_the_way(folder: Path) -> None:
    faces = read_tinyface(folder)
    model = network(0)
    with_them = judge_tinyface(faces, embed_tinyface(model, faces))["rank-5"]
    for path in sorted((folder / "Gallery_Distractor").iterdir())[1:]:
        path.unlink()
    faces = read_tinyface(folder)
    assert judge_tinyface(faces, embed_tinyface(model, faces))["rank-5"] > with_them  # type: ignore[operator]


def test_what_is_an_image_and_whose(folder: Path) -> None:
    """Upper case, several dots and no _; what systems leave behind is none, nor is a folder that is called as one."""
    plain = read_tinyface(folder)
    (folder / "Gallery_Match" / "9_4.png").rename(folder / "Gallery_Match" / "9.PNG")
    (folder / "Gallery_Match" / "9_3.png").unlink()
    (folder / "Probe" / "8_0.png").rename(folder / "Probe" / "8_0.v2.PNG")
    distractors = folder / "Gallery_Distractor"
    (distractors / "list.txt").write_text("1.png")
    for name in ("@eaDir/1.png/thumbnail.jpg", ".hidden.png", "Thumbs.db", "more.jpg/26.JPG"):
        (distractors / name).parent.mkdir(parents=True, exist_ok=True)
        (distractors / name).write_bytes((distractors / "0.png").read_bytes())
    met = read_tinyface(folder)
    assert "Probe/8_0.v2.PNG" in met.files
    assert "Gallery_Distractor/more.jpg/26.JPG" in met.files
    assert len(met.files) == len(plain.files)
    assert (met.persons == met.persons[met.files.index("Gallery_Match/9.PNG")]).sum() == 4
    assert len(embed_tinyface(network(0), met)) == len(met.files)


def test_folders_that_are_not_tinyface(folder: Path) -> None:
    (folder / "Probe" / "99_1.png").write_bytes((folder / "Probe" / "8_0.png").read_bytes())
    with pytest.raises(DataError, match=r"99_1\.png"):
        read_tinyface(folder)
    (folder / "Probe" / "99_1.png").unlink()
    cv2.imwrite(str(folder / "Probe" / "8_0.png"), np.zeros((20, 16, 3), np.uint8))
    with pytest.raises(DataError, match=r"8_0\.png.*20x16"):
        embed_tinyface(network(0), read_tinyface(folder))
    shutil.rmtree(folder / "Gallery_Distractor")
    with pytest.raises(DataError, match=r"Gallery_Distractor"):
        read_tinyface(folder)
