"""IJB's protocols on small sets, against loops over templates, media, faces, pairs and probes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from arcface_kd.data.formats.ijb import read_ijb
from arcface_kd.data.formats.image import decode_rgb
from arcface_kd.data.formats.record import unpack
from arcface_kd.data.formats.recordio import RecordReader
from arcface_kd.data.synthetic_faces import SyntheticFaces
from arcface_kd.evaluation.templates import (
    IJBResult,
    Templates,
    embed_templates,
    judge_templates,
    pair_scores,
    pooled,
)
from arcface_kd.teachers.base import load_teacher
from tests.data.ijb_folders import write_ijb
from tests.reference import ijb, ten_fold

SUBJECTS = (2, 3, 5, 7, 11, 13, 17, 19)


class Small(nn.Module):
    """A network whose embeddings have very different lengths, and that trains as others do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.AvgPool2d(14), nn.Flatten(), nn.Linear(192, 8, bias=False), nn.Dropout(0.5))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ijb") / "IJBT"
    write_ijb(path, SyntheticFaces(0).image, SUBJECTS)
    return path


def judged(folder: Path, model: nn.Module | None = None) -> IJBResult:
    faces = read_ijb(folder)
    return judge_templates(faces, embed_templates(Small() if model is None else model, faces, batch_size=32))


@pytest.mark.parametrize("batch_size", [5, 16])
def test_templates_are_those_of_the_loops(folder: Path, batch_size: int) -> None:
    model = Small().train()
    met = embed_templates(model, read_ijb(folder), batch_size=batch_size)
    assert model.training
    assert model.layers[3].training
    expected = ijb.templates(folder, "ijbt", ijb.embed_with(model))
    assert met.numbers.tolist() == sorted(expected)
    np.testing.assert_allclose(met.rows, [expected[number] for number in sorted(expected)], atol=2e-6)


def test_scores_are_those_of_the_loops(folder: Path) -> None:
    model = Small()
    met, pooled = judged(folder, model), ijb.templates(folder, "ijbt", ijb.embed_with(model))
    assert met.templates == len(pooled)
    assert met.verification is not None
    genuine, impostor = ijb.pairs(folder, "ijbt", pooled)
    pairs = met.verification.genuine_pairs, met.verification.impostor_pairs
    assert pairs == (len(genuine), len(impostor)) == (16, 112)
    for level in (1e-1, 1e-2):
        assert met.verification.tar[level] == ten_fold.tar_at_far(genuine, impostor, level)
    assert met.verification.auc == pytest.approx(ten_fold.area_under_curve(genuine, impostor), abs=1e-12)
    assert 0.5 < met.verification.auc < 1
    assert 0 < met.verification.eer < 0.5

    meta = folder / "meta"
    probes = ijb.persons(meta / "ijbt_1N_probe_mixed.csv")
    found = [ijb.searches(probes, ijb.persons(meta / f"ijbt_1N_gallery_G{k}.csv"), pooled) for k in (1, 2)]
    ranks = [rank for mated, _ in found for rank, _ in mated]
    assert met.identification is not None
    assert (met.identification.mated, met.identification.strangers) == (len(ranks), sum(len(s) for _, s in found))
    assert len(ranks) == 16
    for depth, share in met.identification.rank.items():
        assert share == np.mean([rank <= depth for rank in ranks])
    assert met.identification.rank[1] is not None
    assert met.identification.rank[1] < 1


def test_rows_are_json(folder: Path) -> None:
    rows = json.loads(json.dumps(judged(folder).as_rows(), allow_nan=False))
    assert list(rows) == ["1:1", "1:N"]
    assert rows["1:1"]["tar@far=1e-6"] is None
    assert set(rows["1:1"]) == {"genuine_pairs", "impostor_pairs", "auc", "eer"} | {
        f"tar@far=1e-{k}" for k in range(1, 7)
    }
    assert 0 < rows["1:N"]["rank-1"] <= rows["1:N"]["rank-5"] <= rows["1:N"]["rank-10"] <= 1
    assert rows["1:N"]["tpir@fpir=1e-3"] is None


def test_one_protocol_alone(tmp_path: Path) -> None:
    pattern = np.random.default_rng(0).integers(0, 256, (9, 112, 112, 3), dtype=np.uint8)
    write_ijb(tmp_path / "a", lambda identity, shot: pattern[identity], [1, 2, 3], one_to_many=False)
    only_pairs = judged(tmp_path / "a")
    assert only_pairs.identification is None
    assert list(only_pairs.as_rows()) == ["1:1"]
    write_ijb(tmp_path / "b", lambda identity, shot: pattern[identity], [1, 2, 3])
    (tmp_path / "b" / "meta" / "ijbt_template_pair_label.txt").unlink()
    only_searches = judged(tmp_path / "b")
    assert only_searches.verification is None
    assert only_searches.identification is not None
    assert only_searches.identification.rank[1] == 1.0
    assert list(only_searches.as_rows()) == ["1:N"]


def test_pooling_by_hand() -> None:
    """Two frames of one video weigh as much as one picture."""
    batches = [np.array([[2.0, 0], [0, 2], [3, 4]]), np.array([[0.0, 1]])]
    met = pooled(np.array([9, 9, 4, 9]), np.array([1, 1, 1, 2]), np.array([1.0, 1.0, 0.5, 1.0]), batches)
    assert met.numbers.tolist() == [4, 9]
    np.testing.assert_allclose(met.rows, np.array([[0.6, 0.8], [0.2**0.5, 0.8**0.5]]))


def test_pair_scores_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("arcface_kd.evaluation.templates._PAIRS_IN_CACHE", 3)
    rows = np.random.default_rng(0).normal(size=(4, 5))
    pairs = np.array([[30, 10], [20, 20], [10, 40], [40, 30]])
    numbers, other = np.array([10, 20, 30, 40]), np.random.default_rng(1).normal(size=(4, 5))
    for first, enrolled in ((rows, None), (other, Templates(other, numbers))):
        expected = [first[2] @ rows[0], first[1] @ rows[1], first[0] @ rows[3], first[3] @ rows[2]]
        np.testing.assert_allclose(pair_scores(Templates(rows, numbers), pairs, enrolled), expected)


def test_probes_against_another_models_gallery(folder: Path) -> None:
    faces, own = read_ijb(folder), embed_templates(Small(), read_ijb(folder))
    same = judge_templates(faces, own, own).as_rows()
    assert same == judge_templates(faces, own).as_rows()
    turned = Templates(own.rows @ np.linalg.qr(np.random.default_rng(0).normal(size=(8, 8)))[0], own.numbers)
    met = judge_templates(faces, own, turned).as_rows()
    assert judge_templates(faces, turned, turned).as_rows()["1:N"]["rank-1"] == same["1:N"]["rank-1"]
    for protocol, name in (("1:1", "auc"), ("1:N", "rank-1")):
        assert met[protocol][name] < same[protocol][name]  # type: ignore[operator]


@pytest.mark.real
@pytest.mark.slow
def test_real_faces(real_data: Path, tmp_path: Path) -> None:
    """A teacher of 99.4 % on LFW, on templates of real faces: loops agree, and people are told apart."""
    people: dict[int, list[bytes]] = {}
    with RecordReader(real_data / "faces_real" / "train.rec", real_data / "faces_real" / "train.idx") as reader:
        for key in reader.keys:
            header, payload = unpack(reader.read(int(key)))
            if header.flag == 0:
                people.setdefault(int(header.label), []).append(bytes(payload))
    chosen = [person for person, pictures in people.items() if len(pictures) >= 6][:8]
    write_ijb(
        tmp_path / "IJBR",
        lambda person, shot: decode_rgb(people[person][shot % len(people[person])]),
        chosen,
        name="ijbr",
    )
    teacher = load_teacher(
        real_data / "teachers" / "mobilefacenet_512.onnx", {"channels": "bgr", "mean": 127, "std": 128}
    )
    met = judged(tmp_path / "IJBR", teacher)
    pooled = ijb.templates(tmp_path / "IJBR", "ijbr", ijb.embed_with(teacher))
    genuine, impostor = ijb.pairs(tmp_path / "IJBR", "ijbr", pooled)
    assert met.verification is not None
    for level in (1e-1, 1e-2):
        assert met.verification.tar[level] == ten_fold.tar_at_far(genuine, impostor, level)
    assert met.verification.auc > 0.97
    assert met.identification is not None
    assert met.identification.rank[1] is not None
    assert met.identification.rank[1] > 0.9
