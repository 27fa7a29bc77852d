"""Models side by side: the numbers are those of each alone, the marks are right."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from arcface_kd.data.formats.pair_identities import write_pair_identities
from arcface_kd.data.formats.verification_bin import read_bin
from arcface_kd.errors import DataError
from arcface_kd.evaluation.report.comparison import (
    Comparison,
    Contestant,
    compare,
    data_of,
    model_names,
    read_runs,
)
from arcface_kd.evaluation.report.run_folder import read_run
from arcface_kd.evaluation.scoring import find_files
from arcface_kd.evaluation.verification import distinct_names, evaluate
from tests.evaluation.runs import write_run
from tests.host.trainer.faces import draw_faces


class Pooled(nn.Module):
    """Embeds an image by the means of its patches, with or without noise of its own."""

    def __init__(self, noise: float, phase: float = 0.0) -> None:
        super().__init__()
        self.noise, self.phase = noise, phase

    def forward(self, images: Tensor) -> Tensor:
        pooled = nn.functional.adaptive_avg_pool2d(images, 6).flatten(1)
        shaken = torch.sin(1e4 * pooled + self.phase) * self.noise
        return pooled + shaken


def contestant(name: str, noise: float, phase: float = 0.0) -> Contestant:
    return Contestant(name, lambda: Pooled(noise, phase).eval(), "alone", "pooled")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    faces = draw_faces(tmp_path_factory.mktemp("faces"), identities=2, images=2)
    return find_files([faces.folder])[0]


@pytest.fixture(scope="module")
def comparison(files: list[Path]) -> Comparison:
    models = [contestant("good", 0.0), contestant("twin", 0.0), contestant("bad", 5.0)]
    return compare(models, files, replicates=200)


def test_scores_are_those_of_each_model_alone(comparison: Comparison, files: list[Path]) -> None:
    for name, noise in (("good", 0.0), ("bad", 5.0)):
        wanted = evaluate(Pooled(noise), read_bin(files[0]))
        judgement = comparison.sets[0].judgements[name]
        assert judgement.result.as_row() == wanted.as_row()
        assert judgement.similarities.shape == (40,)
        assert (np.abs(judgement.similarities) <= 1 + 1e-12).all()
        assert judgement.scores["accuracy"].value == wanted.accuracy
        assert judgement.scores["tar@far=1e-1"].value == wanted.tar[1e-1]
        assert judgement.scores["tar@far=1e-3"].value is None
        for column in ("accuracy", "auc", "eer", "tar@far=1e-1"):
            score = judgement.scores[column]
            assert score.value is not None
            assert score.interval is not None
            assert score.interval.low <= score.value <= score.interval.high


def test_the_best_are_marked_and_only_those(comparison: Comparison) -> None:
    judgements = comparison.sets[0].judgements
    for column in ("accuracy", "auc", "eer"):
        scores = {name: judgement.scores[column] for name, judgement in judgements.items()}
        assert [name for name, score in scores.items() if score.best] == ["good", "twin"]
        assert not scores["bad"].close, "noise and patterns can be told apart"
    assert judgements["bad"].scores["eer"].value > judgements["good"].scores["eer"].value  # type: ignore[operator]


def test_models_that_the_pairs_cannot_tell_apart(files: list[Path]) -> None:
    models = [contestant("one", 2.0), contestant("other", 2.0, phase=1.5)]
    judgements = compare(models, files, replicates=200).sets[0].judgements
    scores = [judgements[name].scores["auc"] for name in ("one", "other")]
    assert scores[0].value != scores[1].value
    assert sorted((score.best, score.close) for score in scores) == [(False, True), (True, False)]


def test_a_teacher_is_judged_beside_the_students(files: list[Path]) -> None:
    teacher = replace(contestant("teacher", 0.0), is_teacher=True)
    compared = compare([contestant("worse", 5.0), teacher, contestant("better", 2.0)], files, replicates=50)
    assert compared.students == ["worse", "better"]
    for column in ("accuracy", "auc", "eer"):
        scores = {name: judged.scores[column] for name, judged in compared.sets[0].judgements.items()}
        assert [name for name, score in scores.items() if score.best] == ["better"]
        assert not scores["teacher"].close
        assert scores["teacher"].interval is not None


def test_hardest_pairs(comparison: Comparison) -> None:
    compared = comparison.sets[0]
    judgement, is_same = compared.judgements["bad"], compared.pairs.is_same
    genuine, impostor = (judgement.hardest(is_same, kind, count=3) for kind in (True, False))
    assert is_same[genuine].all()
    assert not is_same[impostor].any()
    values = judgement.similarities
    assert values[genuine].tolist() == sorted(values[is_same])[:3]
    assert values[impostor].tolist() == sorted(values[~is_same], reverse=True)[:3]
    assert len(judgement.hardest(is_same, True, count=10**6)) == is_same.sum()


def test_it_says_what_was_resampled(comparison: Comparison, files: list[Path], tmp_path: Path) -> None:
    assert comparison.sets[0].resampled.startswith("pairs: the set names no identities")
    named = tmp_path / "named.bin"
    named.write_bytes(files[0].read_bytes())
    is_same = comparison.sets[0].pairs.is_same
    # Everybody's genuine pairs are of A, the impostor pairs of A and B.
    names = [name for same in is_same for name in (("A", "A") if same else ("A", "B"))]
    write_pair_identities(named, names)
    met = compare([contestant("good", 0.0)], [named], replicates=20).sets[0]
    assert met.resampled.startswith("2 identities, as the file")


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for name in ("a/run", "b/run", "b/other"):
        write_run(tmp_path / name, {})
    runs = read_runs([tmp_path / "a/run", tmp_path / "b/run", tmp_path / "b/other"])
    assert [run.name for run in runs] == ["a/run", "b/run", "other"]
    with pytest.raises(DataError, match="is given twice"):
        read_runs([tmp_path / "a/run", tmp_path / "b" / ".." / "a" / "run"])


def test_names_are_told_apart_as_far_up_as_it_takes() -> None:
    paths = [Path(path) for path in ("/a/x/run", "/b/x/run", "/b/y/run", "/b/y/other", "/b/teacher")]
    assert distinct_names(paths, ["teacher"]) == ["a/x/run", "b/x/run", "y/run", "other", "b/teacher"]
    names = model_names(paths[:2], "/b/../a/x/run")
    assert names == {"/a/x/run": "a/x/run", "/b/x/run": "b/x/run", "/b/../a/x/run": "a/x/run"}


def test_the_data_are_the_runs_own(tmp_path: Path, files: list[Path]) -> None:
    folder = files[0].parent
    one = read_run(write_run(tmp_path / "one", {"rec": folder}))
    two = read_run(write_run(tmp_path / "two", {"rec": tmp_path / "elsewhere"}))
    nowhere = read_run(write_run(tmp_path / "three", {}))
    assert data_of([one, one]) == folder
    tree = read_run(write_run(tmp_path / "tree", {"rec": folder / "**"}))
    several = read_run(write_run(tmp_path / "several", {"rec": [str(folder), "photos/**"]}))
    assert data_of([tree, several]) == folder
    for runs in ([one, two], [two], [nowhere]):
        with pytest.raises(DataError, match="say with --data where to judge"):
            data_of(runs)
