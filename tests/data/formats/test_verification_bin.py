"""Verification sets of every pickle protocol, written and read; their images, and the strangers among them."""

import pickle
import struct
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from arcface_kd.data.formats import verification_bin
from arcface_kd.data.formats.image import decode_rgb
from arcface_kd.data.formats.verification_bin import VerificationSet, decode, list_bins, read_bin, write_bin
from arcface_kd.errors import DataError
from tests.data.formats.bin_files import IMAGES, SAME, python_2_pickle, refused, stored
from tests.data.record_sets import encoded

# What verification sets are made of ---------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("outer", [tuple, list])
def test_every_protocol_of_python_3(tmp_path: Path, protocol: int, outer: type) -> None:
    pair = read_bin(stored(tmp_path, pickle.dumps(outer([IMAGES, SAME]), protocol)))
    assert (pair.name, pair.images, pair.is_same.tolist()) == ("set", IMAGES, SAME)
    assert read_bin(stored(tmp_path, pickle.dumps((tuple(IMAGES), tuple(SAME)), protocol))).images == IMAGES


@pytest.mark.parametrize("protocol", [0, 1, 2])
def test_every_protocol_of_python_2(tmp_path: Path, protocol: int) -> None:
    images = [*IMAGES, b"it's", b'say "x"', b"both ' and \"", encoded(1)] * 60
    same = [True, False, False, True] * 60
    content = python_2_pickle(images, same, protocol)
    # Python 3 agrees that this is what Python 2 would have written.
    assert pickle.loads(content, encoding="bytes") == (images, same)
    pair = read_bin(stored(tmp_path, content))
    assert pair.images == images
    assert pair.is_same.tolist() == same


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_what_packers_left_in_their_lists(tmp_path: Path, protocol: int) -> None:
    data = encoded(0)
    column = np.frombuffer(data, np.uint8)[:, None].copy()
    images = [data, column, column[:, 0], column.T, b"x", column, bytearray(data), bytearray()]
    expected = [data, data, data, data, b"x", data, data, b""]
    boxed = np.empty(len(images), object)
    boxed[:] = images
    strings = np.array([data, data, data, data, b"x", data, data, b""])
    for outer in (images, tuple(images), boxed, strings, [*strings[:-1], b""]):
        pair = read_bin(stored(tmp_path, pickle.dumps((outer, [True, False, True, False]), protocol)))
        assert pair.images == expected
        assert {type(image) for image in pair.images} == {bytes}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("kind", ["bool", "u1", "i1", ">i2", "i4", "i8", ">u8", "f2", "f4", "<f8", ">f8", "O"])
def test_flags_of_every_kind(tmp_path: Path, protocol: int, kind: str) -> None:
    flags = np.array([True, False, False], kind)
    for same in (flags, list(flags), tuple(flags), flags.tolist()):
        pair = read_bin(stored(tmp_path, pickle.dumps(([b"x"] * 6, same), protocol)))
        assert pair.is_same.dtype == bool
        assert pair.is_same.tolist() == [True, False, False]


@pytest.mark.parametrize("core", ["core", "_core"])
def test_numpy_1_and_numpy_2_names(tmp_path: Path, core: str) -> None:
    content = pickle.dumps(([b"a", b"b"], np.array([True])), 0)
    content = content.replace(b"numpy._core.", b"numpy.core.").replace(b"numpy.core.", f"numpy.{core}.".encode())
    assert read_bin(stored(tmp_path, content)).is_same.tolist() == [True]


@pytest.mark.real
def test_a_real_set_is_what_pickle_reads(real_data: Path) -> None:
    path = real_data / "faces_real" / "lfw_dev.bin"
    images, same = pickle.loads(path.read_bytes(), encoding="bytes")
    pair = read_bin(path)
    assert (pair.name, pair.images, pair.is_same.tolist()) == ("lfw_dev", images, list(same))


def test_the_host_reads_what_is_written(tmp_path: Path) -> None:
    path = tmp_path / "pairs.bin"
    write_bin(path, IMAGES[1:] + IMAGES[-1:], np.array(SAME))
    with open(path, "rb") as stream:
        images, same = pickle.load(stream)
    assert images == IMAGES[1:] + IMAGES[-1:]
    assert [(type(value), value) for value in same] == [(bool, value) for value in SAME]
    assert (read_bin(path).name, read_bin(path).images) == ("pairs", images)


def test_bad_pairs_are_not_written(tmp_path: Path) -> None:
    path = tmp_path / "pairs.bin"
    bad: list[tuple[list[Any], list[bool], str]] = [
        *(([b"x"] * 3, SAME, "3 images and 2 booleans"), ([], [], "0 images and 0 booleans")),
        *(([b"x", "y"], [True], "image 1 "), ([b"", b"y"], [True], "image 0 ")),
    ]
    for images, same, named in bad:
        with pytest.raises(DataError, match=named):
            write_bin(path, images, same)
    assert list(tmp_path.iterdir()) == []


# Decoding -----------------------------------------------------------------------------------------------------------


def test_decoded_images_are_rgb_in_order() -> None:
    images = [encoded(seed, suffix) for seed, suffix in enumerate([".jpg", ".png", ".bmp", ".jpg"])]
    decoded = decode(VerificationSet("pairs", images, np.array(SAME)))
    assert decoded.dtype == torch.uint8
    assert decoded.shape == (4, 3, 112, 112)
    assert decoded.is_contiguous()
    for image, rows in zip(images, decoded, strict=True):
        np.testing.assert_array_equal(rows.permute(1, 2, 0).numpy(), decode_rgb(image))


@pytest.mark.parametrize("size", [(160, 160), (96, 96), (250, 250), (64, 64)])
def test_other_sizes_are_scaled_as_the_host_scales_them(mxnet: ModuleType, size: tuple[int, int]) -> None:
    image = encoded(3, ".png", *size)
    theirs = mxnet.image.resize_short(mxnet.image.imdecode(image), 112).asnumpy()
    mine = decode(VerificationSet("x", [image], np.array([])))[0].permute(1, 2, 0).numpy()
    assert np.abs(theirs.astype(int) - mine).max() <= 1


def test_what_does_not_decode_or_fit_is_named() -> None:
    good = encoded(0)
    for bad, named in [
        (good[:500], "decode"),
        (encoded(0, ".jpg", 112, 96), "130x112"),
        (encoded(0, ".jpg", 96, 112), "96x112"),
        (encoded(0, ".jpg", 50, 100), "112x224"),
    ]:
        with pytest.raises(DataError, match=f"x: image 1: .*{named}"):
            decode(VerificationSet("x", [good, bad], np.array([True])))


def test_an_image_is_never_larger_than_wanted_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scaled to a height of 112, a line of 60,000 pixels would be two gigabytes."""
    monkeypatch.setattr(cv2, "resize", lambda *_, **__: pytest.fail("scaled"))
    line = cv2.imencode(".png", np.zeros((1, 60_000, 3), np.uint8))[1].tobytes()
    with pytest.raises(DataError, match=r"x: image 0: .*112x6720000"):
        decode(VerificationSet("x", [line], np.array([])))


def test_an_image_that_stands_in_many_pairs_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [encoded(0), encoded(1)] * 20 + [encoded(2)] * 2
    write_bin(tmp_path / "x.bin", images, [True] * 21)
    seen: list[bytes] = []

    def counted(image: bytes) -> np.ndarray:
        seen.append(image)
        return decode_rgb(image)

    monkeypatch.setattr(verification_bin, "decode_rgb", counted)
    decoded = decode(read_bin(tmp_path / "x.bin"))
    assert len(seen) == 3
    for image, rows in zip(images, decoded, strict=True):
        np.testing.assert_array_equal(rows.permute(1, 2, 0).numpy(), decode_rgb(image))


def test_few_images_named_again_and_again_are_refused(tmp_path: Path) -> None:
    """Two bytes of a pickle would be 38 kB of pixels."""
    image = encoded(0)
    beginning = b"\x80\x02](B" + struct.pack("<I", len(image)) + image + b"q\x01"
    for images, refusal in ((1 << 16, False), (1 << 17, True)):
        names = b"h\x01" * (images - 1)
        path = stored(tmp_path, beginning + names + b"e](" + b"\x88\x89" * (images // 4) + b"e\x86.")
        if refusal:
            with pytest.raises(DataError, match=r"names 131072 images in \d+ bytes: the same ones again and again"):
                read_bin(path)
        else:
            assert len(read_bin(path).images) == images


# Folders ------------------------------------------------------------------------------------------------------------


def test_strangers_in_a_folder_are_passed_over_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_bin(tmp_path / "lfw.bin", [encoded(0), encoded(1)], [True])
    (tmp_path / "old.bin").write_bytes(python_2_pickle([b"a", b"b"], [True], 0))
    (tmp_path / "boxed.bin").write_bytes(pickle.dumps((np.array([b"a", b"b"], object), [True]), 5))
    torch.save({"a": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    torch.save({"a": torch.zeros(1)}, tmp_path / "legacy.bin", _use_new_zipfile_serialization=False)
    (tmp_path / "._lfw.bin").write_bytes(b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        ")
    (tmp_path / "weights.bin").write_bytes(bytes(range(200, 256)))
    (tmp_path / "vocabulary.bin").write_bytes(pickle.dumps({"a": 1}))
    (tmp_path / "notes.txt").write_text("x")
    assert [path.name for path in list_bins(tmp_path)] == ["boxed.bin", "lfw.bin", "old.bin"]
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 5
    for name in ("pytorch_model", "legacy", "._lfw", "weights", "vocabulary"):
        assert any(f"{name}.bin" in line for line in told)


@pytest.mark.parametrize(
    "content", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"<html>", pickle.dumps(([b""], [True]))[:-9]]
)
def test_what_was_meant_for_a_set_is_not_passed_over(tmp_path: Path, content: bytes) -> None:
    path = stored(tmp_path, content)
    assert list_bins(tmp_path) == [path]
    refused(tmp_path, content)
