"""``arcface-kd eval``: every kind of model on every kind of set, and what it refuses before the work begins."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from arcface_kd.backbones import get_backbone
from arcface_kd.cli.main import main
from arcface_kd.data.formats.ijb import read_ijb
from arcface_kd.data.formats.verification_bin import decode, read_bin, write_bin
from arcface_kd.errors import DataError
from arcface_kd.evaluation.embedding import embed
from arcface_kd.evaluation.pair_views import downscaled
from arcface_kd.evaluation.score_table import table
from arcface_kd.evaluation.scoring import Score, find_sets, group_numbers, score
from arcface_kd.evaluation.templates import embed_templates, judge_templates
from arcface_kd.evaluation.verification import evaluate, verify
from arcface_kd.teachers.base import load_teacher
from tests.data.ijb_folders import write_ijb
from tests.data.tinyface_folders import write_tinyface
from tests.host.trainer.faces import draw_faces
from tests.teachers.onnx_models import face_network, saved, weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``faces`` with pairs.bin, ``IJBT``, a run ``run``, the same student as a file, and an ONNX file."""
    path = tmp_path_factory.mktemp("eval")
    (path / "faces").mkdir()
    draw_faces(path / "faces", identities=2, images=2)
    pattern = np.random.default_rng(0).integers(0, 256, (9, 112, 112, 3), dtype=np.uint8)
    write_ijb(path / "IJBT", lambda identity, shot: pattern[identity], [1, 2, 3])
    (path / "run").mkdir()
    torch.manual_seed(0)
    state = get_backbone("thin_r18", num_features=16).state_dict()
    torch.save(state, path / "run" / "model.pt")
    torch.save(state, path / "student.pt")
    torch.save(get_backbone("thin_r18", num_features=8).state_dict(), path / "narrow.pt")
    (path / "other.onnx").write_bytes(face_network().SerializeToString())
    return path


def test_all_kinds_of_models_on_all_kinds_of_sets(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = [str(folder / name) for name in ("run", "student.pt", "other.onnx")]
    sets = [str(folder / name) for name in ("faces", "IJBT")]
    out = tmp_path / "results.json"
    options = ["teacher.channels=bgr", "teacher.mean=127", "teacher.std=128"]
    assert main(["eval", *models, "--data", *sets, "--kd-option", *options, "--out", str(out)]) == 0
    rows = json.loads(out.read_text())
    assert [(row["set"], row["model"], row["protocol"]) for row in rows] == [
        *[("pairs", model, "pairs") for model in models],
        *[("ijbt", model, protocol) for model in models for protocol in ("1:1", "1:N")],
        *[("one image", model, "cost") for model in models],
    ]
    assert [row["file_bytes"] for row in rows[-3:]] == [
        (folder / name).stat().st_size for name in ("run/model.pt", "student.pt", "other.onnx")
    ]
    assert all(0 < row["p50_ms"] <= row["p95_ms"] for row in rows[-3:])
    # Options are for files; what a run trained has one input.
    rgb, bgr = "rgb, (x - 127.5) / 127.5, 112x112", "bgr, (x - 127) / 128, 112x112"
    assert {row["model"]: row["input"] for row in rows} == dict(zip(models, (rgb, bgr, bgr), strict=True))

    expected = evaluate(
        load_teacher(models[2], {"channels": "bgr", "mean": 127, "std": 128}), read_bin(folder / "faces" / "pairs.bin")
    )
    met = next(row for row in rows if row["model"] == models[2] and row["protocol"] == "pairs")
    assert {name: met[name] for name in expected.as_row()} == expected.as_row()
    faces = read_ijb(folder / "IJBT")
    ijb = judge_templates(faces, embed_templates(load_teacher(models[0]), faces)).as_rows()["1:N"]
    met = next(row for row in rows if row["model"] == models[0] and row["protocol"] == "1:N")
    assert {name: met[name] for name in ijb} == ijb

    printed = capsys.readouterr().out
    assert f"{100 * rows[0]['accuracy']:.3f} +- {100 * rows[0]['accuracy_std']:.3f}" in printed
    assert "TAR@FAR=1e-1" in printed
    assert "TAR@FAR=1e-6" not in printed
    assert [line.endswith(bgr) for line in printed.splitlines()[2:5]] == [False, True, True]
    assert "rank-10" in printed


def test_other_ways_to_judge(folder: Path, tmp_path: Path) -> None:
    """Low resolution, groups of two files of one name, TinyFace, and a gallery of another model."""
    (tmp_path / "b").mkdir()
    whole = read_bin(folder / "faces" / "pairs.bin")
    write_bin(tmp_path / "b" / "pairs.bin", whole.images[:40], whole.is_same[:20])
    tiny = write_tinyface(tmp_path / "tiny", persons=2, distractors=2)
    student, other = (str(saved(tmp_path, face_network(arrays=weights(seed)), f"{seed}.onnx")) for seed in (0, 1))
    words = ["--data", str(folder / "faces"), str(tiny), str(folder / "IJBT"), "--low-res", "14,56"]
    words += ["--groups", f"two={folder / 'faces' / 'pairs.bin'},{tmp_path / 'b' / 'pairs.bin'}"]
    out = tmp_path / "results.json"
    assert main(["eval", student, other, *words, "--gallery-model", other, "--out", str(out)]) == 0
    rows = json.loads(out.read_text())

    views = [None, "14 px, one side", "14 px, both sides", "56 px, one side", "56 px, both sides"]
    sources = [(other, None), (student, None), (student, other)]
    pairs = {(row["set"], row["model"], row["gallery"], row["low_res"]): row for row in rows if "accuracy" in row}
    assert list(pairs) == [
        (name, model, gallery, view)
        for name in ("faces/pairs", "b/pairs", "two")
        for model, gallery in sources
        for view in views
    ]
    for name, protocols in (("tiny", ["tinyface"]), ("ijbt", ["1:1", "1:N"])):
        found = [(row["protocol"], row["model"], row["gallery"]) for row in rows if row["set"] == name]
        assert found == [(protocol, *source) for source in sources for protocol in protocols]
    for model, gallery in sources:
        for view in views:
            accuracies = [pairs[name, model, gallery, view]["accuracy"] for name in ("faces/pairs", "b/pairs")]
            assert pairs["two", model, gallery, view]["accuracy"] == pytest.approx(np.mean(accuracies))

    images = decode(whole)
    embedded = embed(load_teacher(student), downscaled(images, 14), dtype=np.float64)
    embedded[0::2] = embed(load_teacher(other), images, dtype=np.float64)[0::2]
    met, wanted = pairs["faces/pairs", student, other, "14 px, one side"], verify(embedded, whole.is_same)
    assert (met["accuracy"], met["auc"], met["eer"]) == (wanted.accuracy, wanted.auc, wanted.eer)


def test_groups_are_summed_up_as_published() -> None:
    """ArcFace's row on RFW in Wang and Deng, "Mitigating Bias in Face Recognition", CVPR 2020."""
    met = group_numbers([0.9737, 0.9568, 0.9455, 0.9387])
    assert {name: round(float(value or 0), 4) for name, value in met.items()} == {
        "sets": 4,
        "accuracy": 0.9537,
        "accuracy_std": 0.0153,
        "worst_over_best_error": 2.3308,
    }
    assert group_numbers([1.0, 0.9])["worst_over_best_error"] is None


def test_the_table_keeps_its_columns_in_line() -> None:
    numbers = {"genuine_pairs": 1200, "accuracy": 0.5, "accuracy_std": 0.01, "eer": 0.25, "tar@far=1e-3": None}
    lines = table(
        [
            Score("a", "lfw", "pairs", "", numbers),
            Score("longer", "cfp", "pairs", "", {**numbers, "tar@far=1e-3": 1.0, "accuracy": 1.0}),
        ]
    ).splitlines()
    assert lines[1:] == [
        "set  model   genuine pairs  accuracy          EER     TAR@FAR=1e-3",
        "lfw  a       1,200          50.000 +- 1.000   25.000  -",
        "cfp  longer  1,200          100.000 +- 1.000  25.000  100.000",
    ]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["run", "--data", "nowhere"], ["nowhere is no folder", "*.bin"]),
        (["run", "--data", "run"], ["holds no set", "meta/*_face_tid_mid.txt"]),
        (["nowhere.pt", "--data", "faces"], ["nowhere.pt does not exist"]),
        (["run", "run", "--data", "faces"], ["given twice"]),
        (["run", "--data", "faces", "--kd-option", "teacher.std=128"], ["leave the options out"]),
        (["student.pt", "--data", "faces", "--kd-option", "student.projection=linear"], ["student.projection"]),
        (["student.pt", "--data", "faces", "--kd-option", "teacher.stdd=128"], ["did you mean 'teacher.std'"]),
        (["run", "--data", "faces", "--out", "{folder}/none/results.json"], ["there is no folder", "none"]),
        (["run", "--data", "faces", "--batch-size", "0"], ["batch size 0"]),
        (["run"], ["--data", "--groups"]),
        (["run", "--data", "faces", "--low-res", "14,x"], ["--low-res", "14,x"]),
        (["run", "--data", "faces", "--low-res", "28,112"], ["28,112"]),
        (["run", "--groups", "two=faces/pairs.bin"], ["two=faces/pairs.bin"]),
        (["run", "--groups", "two=faces/pairs.bin,run/../faces/pairs.bin"], ["two=faces/pairs.bin,run/.."]),
        (["run", "--groups", "=a.bin,b.bin"], ["'=a.bin,b.bin'"]),
        (["run", "--groups", "two=a.bin,b.bin", "--groups", "two=c.bin,d.bin"], ["'two=c.bin,d.bin'"]),
        (["run", "--groups", "two=~/of_nobody/a.bin,b.bin"], [f"{Path.home()}/of_nobody/a.bin"]),
        (["run", "--data", "faces", "--gallery-model", "narrow.pt"], ["16 dimensions", "narrow.pt in 8;"]),
    ],
)
def test_refusals_end_in_one_line(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    named: list[str],
) -> None:
    monkeypatch.chdir(folder)
    assert main(["eval", *[word.format(folder=folder) for word in words]]) == 2
    error = capsys.readouterr().err
    assert error.startswith("arcface-kd: ")
    assert error.count("\n") == 1
    for word in named:
        assert word in error


def test_a_model_that_embeds_nothing_useful_is_named(folder: Path, tmp_path: Path) -> None:
    class Broken(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            rows = images.flatten(1)[:, :4]
            return rows if len(images) == 2 else rows * float("nan")

    with pytest.raises(DataError, match=r"mine on pairs: 80 of 80 embeddings hold NaN"):
        list(score({"mine": load_teacher(Broken())}, find_sets([folder / "faces"])))
    with pytest.raises(DataError, match=r"mine on ijbt: face 0 is embedded as NaN"):
        list(score({"mine": load_teacher(Broken())}, find_sets([folder / "IJBT"])))


@pytest.mark.parametrize(("genuine", "impostor", "named"), [(4, 4, "8 pairs: ten-fold"), (20, 0, "same identity")])
def test_pairs_that_cannot_be_judged_are_found_before_the_work_begins(
    folder: Path, tmp_path: Path, genuine: int, impostor: int, named: str
) -> None:
    whole = read_bin(folder / "faces" / "pairs.bin")
    pairs = [*np.flatnonzero(whole.is_same)[:genuine], *np.flatnonzero(~whole.is_same)[:impostor]]
    images = [whole.images[2 * pair + side] for pair in pairs for side in (0, 1)]
    write_bin(tmp_path / "odd.bin", images, whole.is_same[pairs])
    with pytest.raises(DataError, match=rf"odd\.bin: .*{named}"):
        find_sets([folder / "faces", tmp_path])


def test_what_was_judged_before_an_error_is_shown(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "IJBT", tmp_path / "IJBT")
    next((tmp_path / "IJBT" / "loose_crop").iterdir()).write_bytes(b"no image")
    assert main(["eval", str(folder / "run"), "--data", str(folder / "faces"), str(tmp_path / "IJBT")]) == 2
    said = capsys.readouterr()
    assert [line.split()[0] for line in said.out.splitlines()] == ["verification", "set", "pairs"]
    assert str(tmp_path / "IJBT" / "loose_crop") in said.err
    assert said.err.count("\n") == 1


def test_a_file_stands_for_itself(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "faces" / "pairs.bin", tmp_path / "alone")
    assert [found.name for found in find_sets([tmp_path / "alone", folder / "IJBT"])] == ["alone", "ijbt"]
    with pytest.raises(DataError, match=r"student.pt is no verification set"):
        find_sets([folder / "student.pt"])
