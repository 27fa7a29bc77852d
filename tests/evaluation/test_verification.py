"""InsightFace's protocol against loops written out, against the host's own functions, and on its edges."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from arcface_kd.data.formats.verification_bin import VerificationSet, decode, read_bin, write_bin
from arcface_kd.errors import ConfigError, DataError
from arcface_kd.evaluation.embedding import embed, normalize
from arcface_kd.evaluation.verification import (
    FAR_LEVELS,
    evaluate,
    pair_distances,
    ten_fold_accuracy,
    ten_fold_val,
    verify,
)
from benchmarks.verification import host_verification
from tests.reference import ten_fold


def pairs(count: int, dimension: int = 16, seed: int = 0, noise: float = 0.8) -> tuple[np.ndarray, np.ndarray]:
    """Normalised float64 embeddings (2P, D) and kinds, ordered in blocks as in InsightFace's sets, with overlap."""
    generator = np.random.default_rng(seed)
    is_same = np.arange(count) // max(1, count // 20) % 2 == 0
    first = generator.normal(size=(count, dimension))
    other = np.where(is_same[:, None], first, generator.normal(size=(count, dimension)))
    second = other + noise * generator.normal(size=(count, dimension))
    embeddings = np.stack([first, second], axis=1).reshape(2 * count, dimension).astype(np.float32)
    return normalize(embeddings), is_same


def coarse_pairs(count: int, dimension: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings whose distances lie exactly on the grid of thresholds: 0, 2 and 4."""
    generator = np.random.default_rng(seed)
    rows = np.eye(3, max(dimension, 3))[generator.integers(0, 3, 2 * count)] * generator.choice(
        [-1.0, 1.0], (2 * count, 1)
    )
    is_same = generator.random(count) < 0.5
    is_same[:2] = [True, False]
    return rows, is_same


@given(
    distances=st.lists(st.integers(0, 40).map(lambda n: n / 10) | st.floats(0, 4), min_size=10, max_size=40),
    seed=st.integers(0, 1000),
)
@settings(max_examples=15, deadline=None)
def test_folds_are_those_of_the_loops(distances: list[float], seed: int) -> None:
    is_same = np.random.default_rng(seed).random(len(distances)) < 0.5
    accuracies, thresholds = ten_fold_accuracy(np.array(distances), is_same)
    expected, expected_thresholds = ten_fold.ten_fold_accuracy(np.array(distances), is_same)
    assert accuracies.tolist() == expected
    assert thresholds.tolist() == expected_thresholds


@pytest.mark.parametrize("far", [1.0, 0.5, 1 / 9, 1e-3])
@pytest.mark.parametrize("seed", range(2))
def test_val_is_that_of_the_loops(far: float, seed: int) -> None:
    generator = np.random.default_rng(seed)
    is_same = np.arange(43) % 2 == 0
    distances = np.round(generator.uniform(0, 4, 43), 1 + seed)
    met = ten_fold_val(distances, is_same, far)
    assert met is not None
    val, fars = ten_fold.ten_fold_val(distances, is_same, far)
    np.testing.assert_allclose(met, (val, fars), rtol=0, atol=1e-12)
    never = ten_fold_val(np.where(is_same, 0.5, 4.0), is_same, 1e-3)
    assert never is not None
    assert not np.any(never), "a threshold of 0 where the FAR is never reached"


@pytest.mark.parametrize(("count", "dimension"), [(1, 1), (1, 512), (255, 3), (257, 512), (600, 128)])
def test_distances_have_the_bits_of_one_pass(count: int, dimension: int) -> None:
    embeddings, _ = pairs(count, dimension)
    expected = np.sum(np.square(np.subtract(embeddings[0::2], embeddings[1::2])), 1)
    assert np.array_equal(pair_distances(embeddings), expected)


def test_a_pair_at_the_threshold_is_not_accepted() -> None:
    """All genuine distances are exactly 2: the first threshold that accepts them is 2.01."""
    embeddings = np.tile(np.eye(2), (20, 1))
    embeddings[1::8] = -np.eye(2)[0]
    is_same = np.array([True, True, True, True] * 5)
    is_same[::4] = False
    assert set(pair_distances(embeddings)) == {2.0, 4.0}
    result = verify(embeddings, is_same)
    assert result.accuracy == 1.0
    assert set(result.fold_thresholds) == {np.arange(0, 4, 0.01)[201]}


def test_result_of_overlapping_pairs() -> None:
    embeddings, is_same = pairs(200, 8, noise=1.5)
    result = verify(embeddings, is_same, far_levels=(0.5, 0.1, 0.05))
    similarity = -pair_distances(embeddings)
    for level, tar in result.tar.items():
        assert tar == ten_fold.tar_at_far(similarity[is_same], similarity[~is_same], level)
    assert result.auc == ten_fold.area_under_curve(similarity[is_same], similarity[~is_same])
    accuracies, _ = ten_fold.ten_fold_accuracy(-similarity, is_same)
    assert 0.6 < result.accuracy < 0.95
    assert result.accuracy == np.mean(accuracies)
    assert result.accuracy_std == np.std(accuracies)
    assert 0 < result.eer < 0.5
    assert result.fpr[0] == result.tpr[0] == 0
    assert result.fpr[-1] == result.tpr[-1] == 1
    embeddings[:2] = 0
    assert verify(embeddings, is_same).accuracy > 0.5, "zero vectors are allowed"
    in_halves = verify(embeddings, np.arange(200) < 100)
    assert (in_halves.val, in_halves.val_std, in_halves.val_far) == (None, None, None), "a fold of one kind"
    with pytest.raises(ConfigError, match="FAR level 0"):
        verify(embeddings, is_same, far_levels=[0])


def test_row_is_json() -> None:
    embeddings, is_same = pairs(60)
    result = verify(embeddings, is_same)
    row = json.loads(json.dumps(result.as_row(), allow_nan=False))
    assert row["accuracy"] == result.accuracy
    assert row["genuine_pairs"] == 30
    assert row["tar@far=1e-1"] == result.tar[0.1]
    assert row["tar@far=1e-6"] is None
    assert row["val@far=1e-3"] == result.val
    assert [key for key in row if key.startswith("tar@")] == [f"tar@far=1e-{k}" for k in range(1, 7)]
    assert len(FAR_LEVELS) == 6


ROWS, KINDS = pairs(20)
MARKED = np.eye(40, 16, -7) > 0


@pytest.mark.parametrize(
    ("embeddings", "is_same", "named"),
    [
        (*pairs(9), "9 pairs"),
        (*pairs(0), "0 pairs"),
        (ROWS, np.ones(20), "all 20 pairs.*the same identity"),
        (ROWS, np.zeros(20), "all 20 pairs.*different identities"),
        (ROWS, pairs(21)[1], r"\(40, 16\).*\(21,\)"),
        (ROWS.ravel(), KINDS, r"\(640,\).*\(20,\)"),
        (ROWS, KINDS[None], r"\(1, 20\)"),
        (np.where(MARKED, np.nan, ROWS), KINDS, r"NaN.*number 7 \(pair 3\)"),
        (np.where(MARKED, np.inf, ROWS), KINDS, r"infinite.*number 7 \(pair 3\)"),
        (ROWS * 23.0, KINDS, "40 of 40.*length 23.*normalize"),
    ],
)
def test_refusals(embeddings: np.ndarray, is_same: np.ndarray, named: str) -> None:
    with pytest.raises(DataError, match=named):
        verify(embeddings, is_same)


@pytest.fixture(scope="module")
def host(arcface_torch: Path) -> ModuleType:
    """InsightFace's own ``eval/verification.py``."""
    return host_verification(arcface_torch)


@pytest.mark.trainer
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("draw", [pairs, coarse_pairs])
def test_same_numbers_as_the_host(host: ModuleType, draw: Callable[..., Any], seed: int) -> None:
    for count, dimension in ((41, 2), (60, 16), (203, 512)):
        embeddings, is_same = draw(count, dimension, seed)
        met = verify(embeddings, is_same)
        _, _, accuracies = host.calculate_roc(np.arange(0, 4, 0.01), embeddings[0::2], embeddings[1::2], is_same)
        assert met.fold_accuracies.tolist() == accuracies.tolist()
        assert (met.accuracy, met.accuracy_std) == (np.mean(accuracies), np.std(accuracies))


@pytest.mark.trainer
@pytest.mark.parametrize("noise", [0.3, 0.8])
def test_same_val_as_the_host(host: ModuleType, noise: float) -> None:
    embeddings, is_same = pairs(200, noise=noise)
    _, _, _, *expected = host.evaluate(embeddings, is_same)
    met = verify(embeddings, is_same)
    assert [met.val, met.val_std, met.val_far] == pytest.approx(expected, abs=1e-12)
    assert met.val is not None
    assert met.val > 0


@pytest.mark.trainer
def test_same_embeddings_and_numbers_as_the_host_from_images(host: ModuleType) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.PReLU(4), nn.Flatten(), nn.Linear(900, 8)).eval()
    images = torch.randint(0, 256, (48, 3, 32, 32)).to(torch.uint8)
    is_same = np.arange(24) % 2 == 0
    views = [images.float(), images.flip(-1).float()]
    _, _, accuracy, deviation, _, theirs = host.test([views, is_same.tolist()], network, 7)
    ours = embed(network, images, batch_size=7, dtype=np.float64)
    assert np.array_equal(ours, host.sklearn.preprocessing.normalize(theirs[0] + theirs[1]))
    met = verify(ours, is_same)
    assert (met.accuracy, met.accuracy_std) == (accuracy, deviation)


@pytest.mark.trainer
@pytest.mark.real
@pytest.mark.slow
def test_same_numbers_as_the_host_on_real_faces(host: ModuleType, real_data: Path) -> None:
    faces = read_bin(real_data / "faces_real" / "lfw_dev.bin")
    torch.manual_seed(0)
    network = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(588, 128)).eval()
    images = decode(faces).float()
    _, _, accuracy, deviation, _, _ = host.test([[images, images.flip(-1)], faces.is_same], network, 128)
    met = evaluate(network, faces, batch_size=128)
    assert (met.accuracy, met.accuracy_std) == (accuracy, deviation)
    assert met.accuracy > 0.55


def test_evaluate_decodes_embeds_and_scores(tmp_path: Path) -> None:
    """Pairs of equal pictures against pairs of different ones: any network tells them apart."""
    generator = np.random.default_rng(0)
    cv2 = pytest.importorskip("cv2")
    payloads = []
    is_same = np.arange(20) % 2 == 0
    for same in is_same:
        first = generator.integers(0, 256, (14, 14, 3)).astype(np.uint8).repeat(8, 0).repeat(8, 1)
        other = generator.integers(0, 256, (14, 14, 3)).astype(np.uint8).repeat(8, 0).repeat(8, 1)
        for picture in (first, first if same else other):
            payloads.append(cv2.imencode(".png", picture)[1].tobytes())
    torch.manual_seed(0)
    network = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(588, 16))
    faces = VerificationSet(name="pictures", images=payloads, is_same=is_same)
    result = evaluate(network, faces, batch_size=8, far_levels=[0.1])
    write_bin(tmp_path / "faces.bin", faces.images, faces.is_same)
    assert evaluate(network, tmp_path / "faces.bin", batch_size=8, far_levels=[0.1]).as_row() == result.as_row()
    assert (result.accuracy, result.eer, result.tar) == (1.0, 0.0, {0.1: 1.0})
    assert result.auc == verify(embed(network, decode(faces), dtype=np.float64), is_same).auc
