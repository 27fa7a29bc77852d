"""Detectors of faces and their five points, from a file that the user has."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from arcface_kd.errors import DataError

# YuNet was trained on faces of 10 to 300 pixels, and takes long on more.
_LONGEST_SIDE = 640
_LEAST_SCORE = 0.5


class DetectedFaces(NamedTuple):
    """Faces on a picture."""

    boxes: NDArray[np.floating[Any]]  # float (N, 4), left, top, right and bottom in pixels
    # Float (N, 5, 2), x and y: left and right eye as the camera sees them, nose, corners of the mouth.
    landmarks: NDArray[np.floating[Any]]


# From uint8 (H, W, 3), RGB, of any size.
Detector = Callable[[NDArray[np.uint8]], DetectedFaces]


def open_detector(path: str | os.PathLike[str]) -> Detector:
    """Open OpenCV's YuNet (2023 and later), or a detection network of InsightFace's packs."""
    import onnx

    if not Path(path).is_file():
        raise DataError(f"there is no file {path}; wanted YuNet's or a detection network of InsightFace's packs")
    wanted = "wanted YuNet's file or a detection network of InsightFace's packs, such as det_10g.onnx"
    try:
        graph = onnx.load_model(os.fspath(path), load_external_data=False).graph
        if "obj_8" in {output.name for output in graph.output}:
            return _yunet(path)
        found = _of_insightface(path)
    # onnx, onnxruntime, OpenCV and insightface each have their own way to say that a file is none of theirs.
    except Exception as error:
        raise DataError(f"{path} cannot be opened as a detector ({type(error).__name__}); {wanted}") from error
    if found is None:
        raise DataError(f"{path} is no detector of faces with five points; {wanted}")
    return found


def _yunet(path: str | os.PathLike[str]) -> Detector:
    import cv2

    network = cv2.FaceDetectorYN.create(os.fspath(path), "", (_LONGEST_SIDE, _LONGEST_SIDE), _LEAST_SCORE)

    def detect(pixels: NDArray[np.uint8]) -> DetectedFaces:
        height, width = pixels.shape[:2]
        scale = min(1.0, _LONGEST_SIDE / max(height, width))
        size = max(1, round(width * scale)), max(1, round(height * scale))
        shrunk = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
        network.setInputSize(size)
        rows = network.detect(cv2.cvtColor(shrunk, cv2.COLOR_RGB2BGR))[1]
        rows = np.empty((0, 15), dtype=np.float32) if rows is None else rows
        corners = np.concatenate((rows[:, :2], rows[:, :2] + rows[:, 2:4]), axis=1)
        back = np.array([width, height]) / size
        return DetectedFaces(corners * np.tile(back, 2), rows[:, 4:14].reshape(-1, 5, 2) * back)

    return detect


def _of_insightface(path: str | os.PathLike[str]) -> Detector | None:
    import cv2
    import torch
    from insightface.model_zoo import get_model

    network = get_model(os.fspath(path))
    if not getattr(network, "use_kps", False):
        return None
    network.prepare(0 if torch.cuda.is_available() else -1, det_thresh=_LEAST_SCORE)

    def detect(pixels: NDArray[np.uint8]) -> DetectedFaces:
        boxes, landmarks = network.detect(cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))
        return DetectedFaces(boxes[:, :4], landmarks)

    return detect
