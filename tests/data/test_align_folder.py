"""Faces cut out of photographs: real detectors' decoders on small networks, and a detector that knows the truth."""

from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from PIL import Image

from arcface_kd.cli.main import main
from arcface_kd.data.align_folder import Which, align_folder
from arcface_kd.data.face_detector import DetectedFaces, open_detector
from arcface_kd.data.formats.face_alignment import TEMPLATE
from arcface_kd.errors import ConfigError, DataError
from tests.data.record_sets import encoded, pixels
from tests.data.spot_detectors import BOX, POINTS, scrfd, yunet


def spot(side: int, scale: int) -> NDArray[np.uint8]:
    """A black picture with a white square at (40, 16) of 8 pixels, both times the scale."""
    picture = np.zeros((side, side, 3), np.uint8)
    picture[16 * scale : 24 * scale, 40 * scale : 48 * scale] = 255
    return picture


@pytest.mark.parametrize(("make", "side", "scale"), [(yunet, 64, 1), (yunet, 1280, 2), (scrfd, 64, 1), (scrfd, 128, 2)])
def test_a_detector_s_points_are_those_of_the_picture(tmp_path: Path, make: object, side: int, scale: int) -> None:
    assert callable(make)
    detector = open_detector(make(tmp_path / "detector.onnx"))
    found = detector(spot(side, scale))
    assert found.boxes.shape == (1, 4)
    np.testing.assert_allclose(found.landmarks[0], scale * (np.array([40, 16]) + 8 * POINTS), atol=1e-3)
    wide, high = (found.boxes[0, 2:] - found.boxes[0, :2]) / scale
    assert (wide, high) == (pytest.approx(8 * (BOX[2] - BOX[0])), pytest.approx(8 * (BOX[3] - BOX[1])))
    assert detector(np.zeros((side, side // 2, 3), np.uint8)).landmarks.shape == (0, 5, 2)


def test_what_is_no_detector_is_named(tmp_path: Path) -> None:
    (tmp_path / "words.onnx").write_text("no network")
    scrfd(tmp_path / "without_points.onnx", points=False)
    graph = onnx.helper.make_graph([], "empty", [], [])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "empty.onnx")
    for name in ("none.onnx", "words.onnx", "without_points.onnx", "empty.onnx"):
        with pytest.raises(DataError, match=name):
            open_detector(tmp_path / name)


class Truth:
    """Draws faces into photographs, and knows where their points are."""

    def __init__(self) -> None:
        self.found: dict[bytes, DetectedFaces] = {}

    def photograph(self, faces: list[tuple[int, float, float, tuple[float, float]]]) -> NDArray[np.uint8]:
        """uint8 (240, 320, 3), BGR, with a face for each (seed, scale, degrees, middle)."""
        picture = np.full((240, 320, 3), 90, np.uint8)
        boxes, landmarks = [], []
        for seed, scale, degrees, middle in faces:
            turn = cv2.getRotationMatrix2D((55.5, 55.5), degrees, scale)
            turn = turn + np.array([[0, 0, middle[0] - 55.5], [0, 0, middle[1] - 55.5]])
            cv2.warpAffine(pixels(seed), turn, (320, 240), picture, cv2.INTER_CUBIC, cv2.BORDER_TRANSPARENT)
            landmarks.append(cv2.transform(TEMPLATE[None], turn)[0])
            boxes.append([*(np.array(middle) - 56 * scale), *(np.array(middle) + 56 * scale)])
        found = DetectedFaces(np.array(boxes).reshape(-1, 4), np.array(landmarks).reshape(-1, 5, 2))
        self.found[picture[..., ::-1].tobytes()] = found
        return picture

    def __call__(self, picture: NDArray[np.uint8]) -> DetectedFaces:
        return self.found[picture.tobytes()]


def assert_shows(path: Path, seed: int) -> None:
    """The face of this seed; its edges have lost something to interpolation."""
    face = cv2.imread(str(path))
    assert face.shape == (112, 112, 3)
    inner = slice(8, -8)
    difference = np.abs(face[inner, inner].astype(float) - pixels(seed)[inner, inner]).mean()
    assert difference < 3 < np.abs(face[inner, inner].astype(float) - pixels(seed + 1)[inner, inner]).mean()


@pytest.mark.parametrize(("which", "seed"), [("largest", 1), ("central", 5)])
def test_faces_come_out_as_they_were_before_they_were_turned(tmp_path: Path, which: Which, seed: int) -> None:
    truth, source, out = Truth(), tmp_path / "photographs", tmp_path / "faces"
    one = truth.photograph([(3, 1.3, 25.0, (150, 120))])
    two = truth.photograph([(1, 1.2, -10.0, (80, 120)), (5, 1.0, 5.0, (200, 125))])
    (source / "ann" / "trip").mkdir(parents=True)
    cv2.imwrite(str(source / "ann" / "one.png"), one)
    cv2.imwrite(str(source / "ann" / "trip" / "two.bmp"), two)
    # Held sideways: the pixels lie on their side, and EXIF says how to turn them back.
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(one[..., ::-1])).save(source / "held.png", exif=exif)
    cv2.imwrite(str(source / "sky.png"), truth.photograph([]))
    (source / "bad.jpg").write_bytes(encoded(1)[:200])
    counts = align_folder(source, out, truth, which=which)
    assert counts[:4] == (3, 0, 1, 2)
    assert_shows(out / "ann" / "one.png.jpg", 3)
    assert_shows(out / "held.png.jpg", 3)
    assert_shows(out / "ann" / "trip" / "two.bmp.jpg", seed)
    lines = (out / "not_found.txt").read_text().splitlines()
    assert [line.partition("\t")[0] for line in lines] == ["bad.jpg", "sky.png"]
    # A second run does what the first has left.
    (out / "held.png.jpg").unlink()
    assert align_folder(source, out, truth, which=which)[:4] == (1, 2, 0, 2)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "photographs"
    source.mkdir()
    cv2.imwrite(str(source / "1.JPG"), spot(64, 1))
    detector = str(scrfd(tmp_path / "detector.onnx"))
    assert main(["data", "align", str(source), str(tmp_path / "faces"), "--detector", detector]) == 0
    assert "1 faces" in capsys.readouterr().out
    assert cv2.imread(str(tmp_path / "faces" / "1.JPG")).shape == (112, 112, 3)
    with pytest.raises(ConfigError, match="photographs"):
        align_folder(source, source / "faces", Truth())
    (source / "1.JPG").unlink()
    with pytest.raises(DataError, match="photographs"):
        align_folder(source, tmp_path / "faces", Truth())
