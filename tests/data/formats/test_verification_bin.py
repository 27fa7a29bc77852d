import os
import pickle
import pickletools
import struct
import sys
import tracemalloc
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arcface_kd.data.formats import verification_bin
from arcface_kd.data.formats.image import decode_rgb
from arcface_kd.data.formats.verification_bin import VerificationSet, decode, list_bins, read_bin, write_bin
from arcface_kd.errors import DataError
from tests.data.record_sets import encoded

IMAGES = [b"", b"\x00", b"\xff\xd8'\"\\\n\r\t\x00\x80\xff", bytes(range(256)) * 3]
SAME = [True, False]


def stored(folder: Path, content: bytes) -> Path:
    path = folder / "set.bin"
    path.write_bytes(content)
    return path


def refused(folder: Path, content: bytes) -> str:
    """The message with which a file is refused."""
    path = stored(folder, content)
    with pytest.raises(DataError) as caught:
        read_bin(path)
    message = str(caught.value)
    assert message.isprintable()
    assert message.startswith(str(path))
    assert len(message) < 400 + len(str(path))
    return message


# What verification sets are made of ---------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("outer", [tuple, list])
def test_every_protocol_of_python_3(tmp_path: Path, protocol: int, outer: type) -> None:
    pair = read_bin(stored(tmp_path, pickle.dumps(outer([IMAGES, SAME]), protocol)))
    assert pair.name == "set"
    assert pair.images == IMAGES
    assert pair.is_same.dtype == bool
    assert pair.is_same.tolist() == SAME
    assert read_bin(stored(tmp_path, pickle.dumps((tuple(IMAGES), tuple(SAME)), protocol))).images == IMAGES


def python_2_repr(text: bytes) -> bytes:
    """Python 2's repr of a str."""
    quote = b'"' if b"'" in text and b'"' not in text else b"'"
    out = b""
    for code in text:
        char = bytes([code])
        if char in (quote, b"\\"):
            out += b"\\" + char
        elif char in b"\n\r\t":
            out += {b"\n": b"\\n", b"\r": b"\\r", b"\t": b"\\t"}[char]
        else:
            out += char if 32 <= code < 127 else b"\\x%02x" % code
    return quote + out + quote


def python_2_pickle(images: list[bytes], same: list[bool], protocol: int) -> bytes:
    """What Python 2's pickle writes for ``(images, same)``, opcode by opcode."""
    memo = 0

    def put() -> bytes:
        nonlocal memo
        memo += 1
        if protocol == 0:
            return b"p%d\n" % (memo - 1)
        return b"q" + bytes([memo - 1]) if memo <= 256 else b"r" + struct.pack("<I", memo - 1)

    def text(value: bytes) -> bytes:
        if protocol == 0:
            return b"S" + python_2_repr(value) + b"\n" + put()
        head = b"U" + bytes([len(value)]) if len(value) < 256 else b"T" + struct.pack("<i", len(value))
        return head + value + put()

    def truth(value: bool) -> bytes:
        if protocol == 2:
            return b"\x88" if value else b"\x89"
        return b"I01\n" if value else b"I00\n"

    def listed(items: list[bytes]) -> bytes:
        if protocol == 0:
            return b"".join(item + b"a" for item in items)
        return b"(" + b"".join(items) + b"e"

    empty = b"(l" if protocol == 0 else b"]"
    out = b"\x80\x02" if protocol == 2 else b""
    out += b"" if protocol == 2 else b"("
    out += empty + put() + listed([text(image) for image in images])
    out += empty + put() + listed([truth(value) for value in same])
    return out + (b"\x86" if protocol == 2 else b"t") + put() + b"."


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
    assert pair.name == "lfw_dev"
    assert pair.images == images
    assert pair.is_same.tolist() == list(same)
    assert pair.is_same.sum() == 600


def test_the_host_reads_what_is_written(tmp_path: Path) -> None:
    path = tmp_path / "pairs.bin"
    write_bin(path, IMAGES[1:] + IMAGES[-1:], np.array(SAME))
    with open(path, "rb") as stream:
        images, same = pickle.load(stream)
    assert images == IMAGES[1:] + IMAGES[-1:]
    assert same == SAME
    assert [type(value) for value in same] == [bool, bool]
    pair = read_bin(path)
    assert pair.images == images
    assert pair.name == "pairs"


def test_bad_pairs_are_not_written(tmp_path: Path) -> None:
    path = tmp_path / "pairs.bin"
    with pytest.raises(DataError, match="3 images and 2 booleans"):
        write_bin(path, [b"x"] * 3, SAME)
    with pytest.raises(DataError, match="0 images and 0 booleans"):
        write_bin(path, [], [])
    with pytest.raises(DataError, match="image 1 is str, wanted an encoded image as bytes"):
        write_bin(path, [b"x", "y"], [True])  # type: ignore[list-item]
    with pytest.raises(DataError, match="image 0 is bytes, wanted an encoded image"):
        write_bin(path, [b"", b"y"], [True])
    assert list(tmp_path.iterdir()) == []


# What they are not --------------------------------------------------------------------------------------------------


class Calls:
    """Pickles as a call."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    ("function", "argument"),
    [(os.system, "touch {}"), (eval, "open({!r}, 'w')"), (os.mkdir, "{}"), (open, "{}"), (exec, "open({!r}, 'w')")],
)
def test_calls_are_refused_by_name_and_not_made(tmp_path: Path, protocol: int, function: object, argument: str) -> None:
    trace = tmp_path / "trace"
    call = Calls(function, argument.format(str(trace)))
    for content in (call, (call, SAME), ([b"x", call], SAME), ([b"x", b"y"], [call])):
        message = refused(tmp_path, pickle.dumps(content, protocol))
        name = function.__name__  # type: ignore[attr-defined]
        assert f".{name}'" in message
        assert "holds the global" in message
    assert not trace.exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_other_objects_are_refused_by_name(tmp_path: Path, protocol: int) -> None:
    for thing, name in [
        (Path("x"), "PosixPath"),
        ({1, 2}, "set"),
        (1j, "complex"),
        (np.array([1.5]), "Array"),
        (np.array([None]), "Array"),
        (np.array(["x"]), "numpy dtype 'U1'"),
        (np.float32(1), "float"),
        (np.uint8(1), "int"),
    ]:
        message = refused(tmp_path, pickle.dumps(([b"x", thing], [True]), protocol))
        # Sets have opcodes of their own from protocol 4 on.
        assert name in message or "opcode EMPTY_SET" in message


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"(S'touch trace'\nios\nsystem\n.", "INST"),
        (b"(cos\nsystem\nS'x'\no.", "OBJ"),
        (b"cposix\nsystem\n\x85R.", "posix.system"),
        (b"\x80\x04\x8c\x05posix\x8c\x06system\x93.", "posix.system"),
        (b"\x80\x04\x8c\x05po\nix\x8c\x06sys\x1b[m\x93.", r"po\nix.sys\x1b[m"),
        (b"c" + b"m" * 200 + b"\n" + b"n" * 200 + b"\n.", "m" * 100),
        (b"c_codecs\ndecode\n.", "_codecs.decode"),
        (b"c_codecs\nencode\nVx\nVrot13\n\x86R.", "_codecs.encode"),
        (b"cnumpy\nload\n.", "numpy.load"),
        (b"cnumpy\ndtype\nVV9\n\x85R.", "V9"),
        (b"](I1\nI2\ndb.", "DICT"),
        (b"Px\n.", "PERSID"),
        (b"I5\nQ.", "BINPERSID"),
        (b"\x82\x01.", "EXT1"),
        (b"c_codecs\nencode\n)\x81.", "NEWOBJ"),
        (b"}.", "EMPTY_DICT"),
        (b"\x8b\x01\x00\x00\x00\x01.", "LONG4"),
        (b"\x00\x00", r"b'\x00'"),
        (b"no pickle", "b'n'"),
        (b"\xff\xd8\xff\xe0", r"b'\xff'"),
        (b"PK\x03\x04" + bytes(40), "zip"),
        (b"PK\x03\x04" + bytes(26) + b"archive/data.pkl", "torch"),
        (bytes(257) + b"ustar" + bytes(250), "tar"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS"),
        (b"\xef\xbb\xbf <!DOCTYPE html><html>Quota exceeded</html>", "HTML"),
        (b"N.", "NoneType"),
        (pickle.dumps(([1, 2], [True])), "int"),
        (pickle.dumps(([[], b""], [True])), "list"),
        (pickle.dumps((["x", b""], [True])), "str"),
        (pickle.dumps(([b"", b""], [None])), "NoneType"),
        (pickle.dumps(([b"", b""], ["1"])), "str"),
        (pickle.dumps(([b"", b""], [2])), "number 2"),
        (pickle.dumps(([b"", b""], [float("nan")])), "number nan"),
        (pickle.dumps(([b"", b""], np.array([7], np.uint8))), "number 7"),
        (pickle.dumps(([b"", b""], np.array([-1.0]))), "number -1.0"),
        (pickle.dumps(([b""] * 3, [True])), "3 images and 1 booleans"),
        (pickle.dumps(([b""] * 2, [True] * 2)), "2 images and 2 booleans"),
        (pickle.dumps(([], [])), "0 images and 0 booleans"),
        (b"", "empty"),
    ],
)
def test_what_is_no_verification_set_is_named(tmp_path: Path, content: bytes, named: str) -> None:
    assert named in refused(tmp_path, content)


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x04]\x8c\x06system\x93.",
        b"c__builtin__\nbytes\nK\x05\x85R.",
        b"cnumpy\nndarray\nK\x05\x85\x85R.",
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\ndtype\n\x85R.",
        b"cnumpy\ndtype\nVO\n\x85R.",
        b"I5\nI6\nR.",
        b"I5\n)R.",
        b"]I5\nb.",
        b"c_codecs\nencode\nN](b.",
        b"c_codecs\nencode\nI5\nb.",
        b"cnumpy\ndtype\nN]\x86b.",
        b"cnumpy\ndtype\nVb1\n\x85RI5\nb.",
        b"cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\nVi8\n\x85RU\x01a\x86R.",
        b"cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\nVO\n\x85RU\x08abcdabcd\x86R.",
        b"G\x00\x00\x00\x00\x00\x00\x00\x00.",
        b"\x8a\x09123456789.",
        b".",
        b"(.",
        b"a",
        b"e",
        b"I5\nI6\na.",
        b"h\x05.",
        b"g7\n.",
        b"p-1\n.",
        b"]",
        b"T\xff\xff\xff\xff.",
        b"\x8e" + b"\xff" * 8 + b".",
        b"Inan\n.",
        b"I" + b"9" * 50 + b"\n.",
        b"F" + b"x" * 5000 + b"\n.",
        b"Sx\n.",
        b"S'x\n.",
        b"S'\\q'\n.",
        b"S'\\'\n.",
        b"X\x01\x00\x00\x00\xff.",
        b"c_codecs\nencode\nX\x03\x00\x00\x00\xe2\x82\xacX\x06\x00\x00\x00latin1\x86R.",
        b"V\\u12\n.",
        b"](I1\nI2\ne.",
        b"U\x02ab.",
        pickle.dumps(([b"", b""], b"\x01")),
        pickle.dumps(([b"", np.zeros((4, 4), np.uint8)], [True])),
        pickle.dumps(([b"", np.zeros(4, bool)], [True])),
        pickle.dumps(([b"", b""], np.array([[True]]))),
        pickle.dumps((np.zeros(2, np.uint8), [True])),
    ],
)
def test_damaged_and_hostile_pickles_are_refused(tmp_path: Path, content: bytes) -> None:
    refused(tmp_path, content)


def test_a_pickle_changes_nothing_that_the_next_one_uses(tmp_path: Path) -> None:
    good = pickle.dumps((IMAGES, list(np.array(SAME, np.int64))), 2)
    for name in (b"_codecs\nencode", b"numpy\ndtype", b"numpy\nndarray", b"numpy.core.multiarray\nscalar"):
        for state in (b"N](Vx\nVy\ne\x86", b"I5\n"):
            refused(tmp_path, b"c" + name + b"\n" + state + b"b.")
    assert read_bin(stored(tmp_path, good)).images == IMAGES


def test_arrays_whose_shape_does_not_fit(tmp_path: Path) -> None:
    content = pickle.dumps(([b"a", b"b"], np.array([True] * 7)), 2)
    assert content.count(b"K\x07\x85") == 1
    for shape in (b"K\x08\x85", b"(K\x01K\x01K\x01K\x07t", b"K\x07"):
        refused(tmp_path, content.replace(b"K\x07\x85", shape))


def test_missing_files_and_folders(tmp_path: Path) -> None:
    for path, message in [(tmp_path / "none.bin", "No such file"), (tmp_path, "Is a directory")]:
        with pytest.raises(DataError, match=f"cannot read {path}: {message}"):
            read_bin(path)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"]" * 8_000_000, id="lists"),
        pytest.param(b"(" * 8_000_000, id="marks"),
        pytest.param(b"]r\xff\xff\xff\xff]r\xfe\xff\xff\xff.", id="memo"),
        pytest.param(b"B\xff\xff\xff\xffx", id="length"),
        pytest.param(
            b"c_codecs\nencode\nq\x00X"
            + struct.pack("<I", 500_000)
            + b"x" * 500_000
            + b"q\x01X\x06\x00\x00\x00latin1q\x02000"
            b"]q\x03(" + b"h\x00h\x01h\x02\x86R" * 5000 + b"e.",
            id="copies",
        ),
        pytest.param(b"]q\x00" + b"(" + b"h\x00h\x00h\x00h\x00" * 200_000 + b"e.", id="cycles"),
        pytest.param(
            b"\x80\x05cnumpy.core.numeric\n_frombuffer\nq\x00\x96"
            + struct.pack("<Q", 500_000)
            + b"x" * 500_000
            + b"q\x01cnumpy\ndtype\nVu1\n\x85Rq\x02J"
            + struct.pack("<i", 500_000)
            + b"\x85q\x03000"
            b"](" + b"h\x00(h\x01h\x02h\x03VC\ntR" * 5000 + b"e](" + b"\x88" * 2500 + b"e\x86.",
            id="arrays",
        ),
        pytest.param(b"N" + b"\x85" * 900_000 + b".", id="depth"),
        pytest.param(b"]" * 500_000 + b"a" * 499_999 + b".", id="deep lists"),
    ],
)
def test_bombs_stay_within_a_bound(tmp_path: Path, content: bytes) -> None:
    path = stored(tmp_path, content)
    size = len(content)
    del content
    tracemalloc.start()
    with suppress(DataError):
        read_bin(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 * size + (180 << 20)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), protocol=st.integers(0, 5), old=st.booleans())
def test_mutated_sets_are_read_or_refused(
    data: st.DataObject, protocol: int, old: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    images = [b"\xff\xd8 one", b"two'\n", b"3" * 300, b""]
    whole = python_2_pickle(images, SAME, min(protocol, 2)) if old else pickle.dumps((images, SAME), protocol)
    content = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        if data.draw(st.booleans()):
            content[place] = data.draw(st.integers(0, 255))
        else:
            content[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    path = stored(tmp_path_factory.getbasetemp(), bytes(content) or b"x")
    try:
        pair = read_bin(path)
    except DataError as error:
        message = str(error)
        assert message.isprintable(), message
    else:
        assert len(pair.images) == 2 * len(pair.is_same)
        assert {type(image) for image in pair.images} == {bytes}


@settings(max_examples=300, deadline=None)
@given(opcodes=st.lists(st.sampled_from(pickletools.opcodes), max_size=30), data=st.data())
def test_any_row_of_opcodes_is_read_or_refused(
    opcodes: list[pickletools.OpcodeInfo], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = b"".join(opcode.code.encode("latin-1") + data.draw(st.binary(max_size=9)) for opcode in opcodes)
    path = stored(tmp_path_factory.getbasetemp(), content + b".")
    with pytest.raises(DataError):
        read_bin(path)


def test_reading_imports_nothing(tmp_path: Path) -> None:
    before = set(sys.modules)
    refused(tmp_path, b"cthis\ns\n.")
    refused(tmp_path, b"cantigravity\nfly\n.")
    assert set(sys.modules) - before == set()


# Decoding -----------------------------------------------------------------------------------------------------------


def test_decoded_images_are_rgb_in_order() -> None:
    images = [encoded(seed, suffix) for seed, suffix in enumerate([".jpg", ".png", ".bmp", ".jpg"])]
    decoded = decode(VerificationSet("pairs", images, np.array(SAME)))
    assert decoded.dtype == torch.uint8
    assert decoded.shape == (4, 3, 112, 112)
    assert decoded.is_contiguous()
    for image, rows in zip(images, decoded, strict=True):
        np.testing.assert_array_equal(rows.permute(1, 2, 0).numpy(), decode_rgb(image))


def test_grey_images_have_three_channels() -> None:
    grey = cv2.imencode(".jpg", np.full((112, 112), 77, np.uint8))[1].tobytes()
    assert torch.equal(decode(VerificationSet("x", [grey], np.array([]))), torch.full((1, 3, 112, 112), 77).byte())


@pytest.mark.parametrize("size", [(160, 160), (96, 96), (250, 250), (64, 64)])
def test_other_sizes_are_scaled_as_the_host_scales_them(mxnet: ModuleType, size: tuple[int, int]) -> None:
    image = encoded(3, ".png", *size)
    theirs = mxnet.image.resize_short(mxnet.image.imdecode(image), 112).asnumpy()
    mine = decode(VerificationSet("x", [image], np.array([])))[0].permute(1, 2, 0).numpy()
    assert np.abs(theirs.astype(int) - mine).max() <= 1


def test_what_does_not_decode_or_fit_is_named() -> None:
    good = encoded(0)
    for bad, message in [
        (good[:500], "x: image 1: OpenCV cannot decode the image"),
        (encoded(0, ".jpg", 112, 96), "x: image 1: it is 130x112 after scaling, wanted 112x112"),
        (encoded(0, ".jpg", 96, 112), "x: image 1: it is 96x112 after scaling, wanted 112x112"),
        (encoded(0, ".jpg", 50, 100), "x: image 1: it is 112x224 after scaling, wanted 112x112"),
    ]:
        with pytest.raises(DataError, match=message):
            decode(VerificationSet("x", [good, bad], np.array([True])))


def test_an_image_is_never_larger_than_wanted_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scaled to a height of 112, a line of 60,000 pixels would be two gigabytes."""
    monkeypatch.setattr(cv2, "resize", lambda *_, **__: pytest.fail("scaled"))
    line = cv2.imencode(".png", np.zeros((1, 60_000, 3), np.uint8))[1].tobytes()
    with pytest.raises(DataError, match="x: image 0: it is 112x6720000 after scaling, wanted 112x112"):
        decode(VerificationSet("x", [line], np.array([])))


def test_an_image_that_stands_in_many_pairs_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [encoded(0), encoded(1)] * 20 + [encoded(2)] * 2
    write_bin(tmp_path / "x.bin", images, [True] * 21)
    found = read_bin(tmp_path / "x.bin")
    whole = decode(found)
    seen: list[bytes] = []

    def counted(image: bytes) -> np.ndarray:
        seen.append(image)
        return decode_rgb(image)

    monkeypatch.setattr(verification_bin, "decode_rgb", counted)
    again = decode(VerificationSet("x", [images[0], images[1], *images[:40], *images[40:]], np.array([])))
    assert len(seen) == 3
    assert torch.equal(again[2:], whole)
    assert torch.equal(again[:2], whole[:2])


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


def test_another_size_may_be_asked_for() -> None:
    assert decode(VerificationSet("x", [encoded(0)], np.array([])), (64, 64)).shape == (1, 3, 64, 64)


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
