from types import ModuleType

import cv2
import numpy as np
import pytest

from arcface_kd.data.image import MAX_PIXELS, decode_rgb, image_size
from arcface_kd.errors import DataError
from tests.data.record_sets import encoded, pixels

FORMATS = (".jpg", ".png", ".bmp", ".webp")


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize(("height", "width"), [(1, 1), (112, 112), (7, 300), (513, 64)])
def test_the_size_is_that_of_the_decoded_image(suffix: str, height: int, width: int) -> None:
    data = encoded(3, suffix, height, width)
    assert image_size(data) == (height, width)
    assert decode_rgb(data).shape == (height, width, 3)


@pytest.mark.parametrize("quality", [10, 100, 101])
def test_webp_with_and_without_loss(quality: int) -> None:
    data = cv2.imencode(".webp", pixels(1, 33, 57), [cv2.IMWRITE_WEBP_QUALITY, quality])[1].tobytes()
    assert image_size(data) == (33, 57)


def test_extended_webp() -> None:
    canvas = b"VP8X" + (10).to_bytes(4, "little") + bytes(4) + (56).to_bytes(3, "little") + (32).to_bytes(3, "little")
    assert image_size(b"RIFF" + (30).to_bytes(4, "little") + b"WEBP" + canvas) == (33, 57)


def test_old_and_upside_down_bmp() -> None:
    data = bytearray(encoded(0, ".bmp", 20, 30))
    data[22:26] = (-20).to_bytes(4, "little", signed=True)
    assert image_size(bytes(data)) == (20, 30)
    os2 = b"BM" + bytes(12) + (12).to_bytes(4, "little") + (30).to_bytes(2, "little") + (20).to_bytes(2, "little")
    assert image_size(os2) == (20, 30)


@pytest.mark.parametrize("suffix", FORMATS)
def test_colours_are_rgb(suffix: str) -> None:
    data = encoded(5, suffix)
    expected = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    np.testing.assert_array_equal(decode_rgb(data), expected)


def test_colours_are_rgb_with_an_older_opencv(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(5, ".png")
    monkeypatch.delattr(cv2, "IMREAD_COLOR_RGB")
    np.testing.assert_array_equal(decode_rgb(data), pixels(5)[..., ::-1])


def test_views_are_decoded_without_a_copy_of_the_file() -> None:
    data = encoded(5)
    np.testing.assert_array_equal(decode_rgb(memoryview(b"xx" + data)[2:]), decode_rgb(data))


def test_grey_transparent_and_deep_images_have_three_channels() -> None:
    grey = pixels(1)[..., 0]
    decoded = decode_rgb(cv2.imencode(".png", grey)[1].tobytes())
    np.testing.assert_array_equal(decoded, np.repeat(grey[..., None], 3, axis=2))
    transparent = np.dstack([pixels(2), np.full((112, 112), 9, np.uint8)])
    np.testing.assert_array_equal(decode_rgb(cv2.imencode(".png", transparent)[1].tobytes()), pixels(2)[..., ::-1])
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
    ("data", "message"),
    [
        (b"", "holds no bytes"),
        (b"GIF89a" + bytes(40), "not a JPEG, PNG, BMP or WebP"),
        (b"\x00" * 40, "not a JPEG, PNG, BMP or WebP"),
        (b"\xff\xd8", "damaged or cut short"),
        (b"\xff\xd8" + b"\xff" * 5000, "damaged or cut short"),
        (b"\xff\xd8" + b"\xff\x01" * 5000, "damaged or cut short"),
        (b"\xff\xd8" + b"\x00" * 5000, "damaged or cut short"),
        (b"\x89PNG\r\n\x1a\n", "damaged or cut short"),
        (b"BM", "damaged or cut short"),
        (b"RIFF\x00\x00\x00\x00WEBP", "damaged or cut short"),
        (b"RIFF\x00\x00\x00\x00WEBPVP8 ", "damaged or cut short"),
    ],
)
def test_what_is_no_image_is_named(data: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        decode_rgb(data)


def test_a_segment_after_another_without_end_is_given_up() -> None:
    endless = b"\xff\xd8" + b"\xff\xe1\x00\x02" * 1_000_000
    with pytest.raises(DataError, match="damaged or cut short"):
        image_size(endless)


@pytest.mark.parametrize("suffix", FORMATS)
def test_cut_images_are_refused(suffix: str) -> None:
    data = encoded(6, suffix)
    for length in (len(data) // 2, len(data) - 30):
        with pytest.raises(DataError):
            decode_rgb(data[:length])


def test_an_image_that_claims_to_be_huge_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytearray(encoded(6, ".png"))
    data[16:24] = (30000).to_bytes(4, "big") * 2
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("decoded"))
    with pytest.raises(DataError, match=f"30000x30000 pixels, more than {MAX_PIXELS}"):
        decode_rgb(bytes(data))
    data[16:24] = bytes(8)
    with pytest.raises(DataError, match="0x0 pixels"):
        decode_rgb(bytes(data))


def test_a_large_image_that_is_drawn_again_and_again_is_refused_before_it_is_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each scan of a progressive JPEG takes some bytes of the file and a pass over all of the pixels."""
    small = cv2.imencode(".jpg", pixels(6), [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])[1].tobytes()
    scan, end = small.rindex(b"\xff\xda"), small.rindex(b"\xff\xd9")
    frame = small.index(b"\xff\xc2") + 5
    large = small[:frame] + (8192).to_bytes(2, "big") * 2 + small[frame + 4 :]
    scans = small.count(b"\xff\xda")
    assert scans == 10
    assert decode_rgb(small[:end] + small[scan:end] * 500 + small[end:]).shape == (112, 112, 3)
    decoded: list[object] = []
    monkeypatch.setattr(cv2, "imdecode", lambda *_: decoded.append(_))
    for more in (16 - scans, 17 - scans):
        with pytest.raises(
            DataError, match="cut short" if more == 16 - scans else "8192x8192 pixels is drawn in 17 scans"
        ):
            decode_rgb(large[:end] + large[scan:end] * more + large[end:])
    assert len(decoded) == 1


def test_a_bitmap_may_hold_what_begins_a_scan_in_a_jpeg() -> None:
    pixels = np.tile(np.array([0xFF, 0xDA], np.uint8), 300 * 300 * 3 // 2).reshape(300, 300, 3)
    written, file = cv2.imencode(".bmp", pixels)
    assert written
    assert np.array_equal(decode_rgb(file.tobytes()), pixels[..., ::-1])


def test_another_size_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("decoded"))
    with pytest.raises(DataError, match="the image is 96x112 pixels, wanted 112x112"):
        decode_rgb(encoded(0, ".jpg", 96, 112), (112, 112))


def test_what_opencv_throws_becomes_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise cv2.error("first line\nsecond line")

    monkeypatch.setattr(cv2, "imdecode", fail)
    with pytest.raises(DataError, match=r"^OpenCV cannot decode the image: first line second line$"):
        decode_rgb(encoded(0))


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp"])
def test_mxnet_decodes_the_same_pixels(mxnet: ModuleType, suffix: str) -> None:
    for seed in range(3):
        data = encoded(seed, suffix)
        np.testing.assert_array_equal(decode_rgb(data), mxnet.image.imdecode(data).asnumpy())
