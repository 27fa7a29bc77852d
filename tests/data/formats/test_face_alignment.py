"""The five-point alignment against least squares written out, insightface's own, and a face put back in its place."""

import warnings

import cv2
import numpy as np
import pytest

from arcface_kd.data.formats.face_alignment import CROP, TEMPLATE, align, fit_similarity
from tests.data.ijb_folders import loosen
from tests.reference import ijb


def some_landmarks(count: int) -> np.ndarray:
    random = np.random.default_rng(0)
    return TEMPLATE * random.uniform(0.3, 5, (count, 1, 1)) + random.normal(0, 8, (count, 5, 2)) + 40


def test_is_the_least_squares_similarity() -> None:
    landmarks = some_landmarks(20)
    for points, met in zip(landmarks, fit_similarity(landmarks), strict=True):
        np.testing.assert_allclose(met, ijb.similarity(points), rtol=1e-9, atol=1e-9)


def test_is_insightface_s_alignment() -> None:
    face_align = pytest.importorskip("insightface.utils.face_align")
    landmarks = some_landmarks(20).astype(np.float32)
    with warnings.catch_warnings():
        # insightface calls scikit-image by a name that is on its way out.
        warnings.simplefilter("ignore")
        theirs = np.stack([face_align.estimate_norm(points) for points in landmarks])
    # insightface keeps the template in float32.
    np.testing.assert_allclose(fit_similarity(landmarks), theirs, rtol=1e-5, atol=1e-4)


def test_a_turned_face_comes_back() -> None:
    random = np.random.default_rng(1)
    face = cv2.GaussianBlur(random.integers(0, 256, (CROP, CROP, 3), dtype=np.uint8), (0, 0), 4)
    picture, landmarks = loosen(face, random)
    met = align(picture, fit_similarity(landmarks[None])[0])
    assert met.shape == (CROP, CROP, 3)
    assert np.abs(met.astype(int) - face)[8:-8, 8:-8].mean() < 1.5


def test_beyond_the_picture_it_is_black() -> None:
    met = align(np.full((20, 20, 3), 255, np.uint8), np.array([[1.0, 0, 50], [0, 1.0, 50]]))
    assert met[60, 60].tolist() == [255] * 3
    assert met[10, 10].tolist() == [0] * 3


def test_landmarks_on_one_point_give_nothing_finite() -> None:
    assert not np.isfinite(fit_similarity(np.ones((1, 5, 2)))).any()
