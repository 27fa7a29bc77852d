"""Faces cut out by five landmarks, as InsightFace aligns them: the input that every network here was trained on."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

CROP = 112

TEMPLATE = np.array(
    [(38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041)]
)
"""Where both eyes, the nose and the mouth's corners lie in a crop of 112 x 112 (insightface ``face_align``)."""


def fit_similarity(landmarks: NDArray[Any]) -> NDArray[Any]:
    """The similarities (N, 2, 3) that bring landmarks (N, 5, 2) closest to the template, by least squares.

    Landmarks are left and right eye as the camera sees them, nose, corners of the mouth, in pixels. With points as
    complex numbers a similarity is ``z -> a z + b``, so that the fit has a closed form; it is Umeyama's (TPAMI 1991)
    without a mirror image, which landmarks of a face do not ask for. Landmarks that all lie on one point give values
    that are not finite.
    """
    points = np.asarray(landmarks, dtype=np.float64)
    source = points[..., 0] + 1j * points[..., 1]
    target = TEMPLATE[:, 0] + 1j * TEMPLATE[:, 1]
    middle = source.mean(axis=1, keepdims=True)
    centred = source - middle
    with np.errstate(divide="ignore", invalid="ignore"):
        turn = (centred.conj() * (target - target.mean())).sum(axis=1) / (np.abs(centred) ** 2).sum(axis=1)
        shift = target.mean() - turn * middle[:, 0]
    rows = [[turn.real, -turn.imag, shift.real], [turn.imag, turn.real, shift.imag]]
    return np.moveaxis(np.array(rows), -1, 0)


def align(pixels: NDArray[np.uint8], similarity: NDArray[Any]) -> NDArray[Any]:
    """Cut a face, uint8 (112, 112, 3), out of a picture (H, W, 3), bilinear, black beyond the picture's edges."""
    import cv2

    return cv2.warpAffine(pixels, similarity, (CROP, CROP))
