"""Images of every format: the same pixels as mxnet, Pillow and OpenCV, or refused before they are decoded."""

import io
import struct
import zlib
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest
from PIL import ExifTags, Image

from arcface_kd.data.formats.image import MAX_PIXELS, decode_rgb, image_size
from arcface_kd.errors import DataError
from tests.data.record_sets import encoded, one_line, pixels

FORMATS = (".jpg", ".png", ".bmp", ".webp", ".tiff", ".ppm")


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize(("height", "width"), [(1, 1), (112, 112), (7, 300), (513, 64)])
def test_the_size_is_that_of_the_decoded_image(suffix: str, height: int, width: int) -> None:
    data = encoded(3, suffix, height, width)
    assert image_size(data) == (height, width)
    assert decode_rgb(data).shape == (height, width, 3)


def test_upside_down_bmp() -> None:
    data = bytearray(encoded(0, ".bmp", 20, 30))
    data[22:26] = (-20).to_bytes(4, "little", signed=True)
    assert image_size(bytes(data)) == (20, 30)


@pytest.mark.parametrize("suffix", FORMATS)
def test_colours_are_rgb(suffix: str) -> None:
    data = encoded(5, suffix)
    expected = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    np.testing.assert_array_equal(decode_rgb(data), expected)


def test_colours_are_rgb_with_an_older_opencv_and_of_a_view(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(cv2, "IMREAD_COLOR_RGB")
    np.testing.assert_array_equal(decode_rgb(memoryview(encoded(5, ".png"))), pixels(5)[..., ::-1])


def test_grey_transparent_and_deep_images_have_three_channels() -> None:
    grey = pixels(1)[..., 0]
    decoded = decode_rgb(cv2.imencode(".png", grey)[1].tobytes())
    np.testing.assert_array_equal(decoded, np.repeat(grey[..., None], 3, axis=2))
    transparent = np.dstack([pixels(2), np.full((112, 112), 9, np.uint8)])
    np.testing.assert_array_equal(decode_rgb(cv2.imencode(".png", transparent)[1].tobytes()), pixels(2)[..., ::-1])
    for suffix in (".png", ".tiff", ".pgm", ".jp2"):
        deep_grey = cv2.imencode(suffix, grey.astype(np.uint16) * 257)[1].tobytes()
        assert np.abs(decode_rgb(deep_grey).astype(int) - grey[..., None]).max() <= 1, suffix
    deep = pixels(3).astype(np.uint16) * 257
    np.testing.assert_array_equal(decode_rgb(cv2.imencode(".png", deep)[1].tobytes()), pixels(3)[..., ::-1])


def test_jpeg_headers_with_metadata_fill_and_stray_bytes() -> None:
    data = encoded(4)
    comment = b"\xff\xe1" + (60000).to_bytes(2, "big") + b"\xff\xc0" * 29999
    assert image_size(data[:2] + comment + comment + data[2:]) == (112, 112)
    assert image_size(data[:2] + b"\xff\xff\xff" + data[2:]) == (112, 112)
    assert image_size(data[:2] + b"\xff\x01" + data[2:]) == (112, 112)
    np.testing.assert_array_equal(decode_rgb(data[:2] + comment + b"\xff\xff" + data[2:]), decode_rgb(data))


@pytest.mark.parametrize(
    ("data", "named"),
    [
        *((data, "no image") for data in (b"", bytes(40))),
        *((b"\xff\xd8" + data, "header") for data in (b"", b"\xff" * 5000, b"\xff\x01" * 5000, bytes(5000))),
        # One segment after another, without end.
        (b"\xff\xd8" + b"\xff\xe1\x00\x02" * 1_000_000, "header"),
        *((data, "header") for data in (b"\x89PNG\r\n\x1a\n", b"BM", b"RIFF\x00\x00\x00\x00WEBPVP8 ")),
        *((data, "image") for data in (b"RIFF\x00\x00\x00\x00WEBP", b"GIF89a" + bytes(40), b"II*\x00" + bytes(40))),
        (b"P6\n112 ", "image"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS"),
        (b"\r\n<!DOCTYPE html><html>Quota exceeded</html>", "HTML"),
        (b"PK\x03\x04" + bytes(40), "zip"),
    ],
    ids=range(17),
)
def test_what_is_no_image_is_refused_by_name(data: bytes, named: str) -> None:
    with pytest.raises(DataError, match=named) as caught:
        decode_rgb(data)
    one_line(caught.value)


@pytest.mark.parametrize("suffix", FORMATS)
def test_cut_images_are_refused(suffix: str) -> None:
    data = encoded(6, suffix)
    for length in (len(data) // 2, len(data) - 30):
        with pytest.raises(DataError):
            decode_rgb(data[:length])


@pytest.mark.parametrize("side", [9000, 30_000])
def test_an_image_that_claims_to_be_huge_is_refused_before_it_is_decoded(
    monkeypatch: pytest.MonkeyPatch, side: int
) -> None:
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("decoded"))
    with pytest.raises(DataError, match=f"more than {MAX_PIXELS}"):
        decode_rgb(data + encoded(6, ".png")[33:])


def test_another_size_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("decoded"))
    with pytest.raises(DataError, match=r"96x112 .* 112x112"):
        decode_rgb(encoded(0, ".jpg", 96, 112), (112, 112))


def test_what_opencv_throws_becomes_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise cv2.error("first line\nsecond line")

    monkeypatch.setattr(cv2, "imdecode", fail)
    with pytest.raises(DataError, match="first line second line"):
        decode_rgb(encoded(0))


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def variants(kind: str) -> list[bytes]:
    """One picture in every mode that a format has, and turned by EXIF in every way that it can say."""
    rgb = Image.fromarray(pixels(3, 96, 112)[..., ::-1])
    modes = {"JPEG": "L CMYK", "PNG": "L LA RGBA P 1", "BMP": "L P 1", "WEBP": "RGBA", "TIFF": "L P"}
    options = {"lossless": True} if kind == "WEBP" else {}
    found = [saved(rgb.convert(mode), kind, **options) for mode in ["RGB", *modes.get(kind, "").split()]]
    for orientation in range(1, 9) if kind in ("JPEG", "PNG", "WEBP", "TIFF") else []:
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        found.append(saved(rgb, kind, exif=exif, **options))
        if kind == "JPEG":
            found.append(saved(rgb.convert("L"), kind, exif=exif))
    return found


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP"])
def test_mxnet_decodes_the_same_pixels(mxnet: ModuleType, kind: str) -> None:
    """A record that a camera held sideways is read as it is stored, as by the host."""
    for data in variants(kind):
        np.testing.assert_array_equal(decode_rgb(data), mxnet.image.imdecode(data).asnumpy())


def test_images_are_turned_when_asked_as_imread_turns_them(tmp_path: Path) -> None:
    shapes = set()
    for number, data in enumerate(variants("JPEG")):
        (tmp_path / f"{number}.jpg").write_bytes(data)
        theirs = cv2.imread(str(tmp_path / f"{number}.jpg"))[..., ::-1]
        np.testing.assert_array_equal(decode_rgb(data, upright=True), theirs)
        shapes.add(theirs.shape)
    assert shapes == {(96, 112, 3), (112, 96, 3)}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "WEBP", "TIFF", "PPM", "GIF", "JPEG2000"])
def test_pillow_decodes_the_same_pixels(kind: str) -> None:
    """torchvision's ImageFolder, the host's reader of folders, decodes with Pillow."""
    for data in variants(kind):
        theirs = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
        # CMYK is the one that OpenCV rounds otherwise.
        np.testing.assert_allclose(decode_rgb(data).astype(int), theirs.astype(int), atol=1)
