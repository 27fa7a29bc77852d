"""Pickles that are no verification set, damaged or hostile, are refused by name, in bounded memory, and not run."""

import os
import pickle
import pickletools
import struct
import sys
import tracemalloc
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arcface_kd.data.formats import verification_pickle
from arcface_kd.data.formats.verification_bin import read_bin
from arcface_kd.errors import DataError
from tests.data.formats.bin_files import IMAGES, SAME, python_2_pickle, refused, stored


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
        *((Path("x"), "PosixPath"), ({1, 2}, "set"), (1j, "complex"), (np.float32(1), "float"), (np.uint8(1), "int")),
        *((np.array([1.5]), "Array"), (np.array([None]), "Array"), (np.array(["x"]), "numpy dtype 'U1'")),
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
        *(b"\x80\x04]\x8c\x06system\x93.", b"c__builtin__\nbytes\nK\x05\x85R.", b"cnumpy\nndarray\nK\x05\x85\x85R."),
        *(b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\ndtype\n\x85R.", b"cnumpy\ndtype\nVO\n\x85R."),
        *(b"I5\nI6\nR.", b"I5\n)R.", b"]I5\nb.", b"c_codecs\nencode\nN](b.", b"c_codecs\nencode\nI5\nb."),
        *(b"cnumpy\ndtype\nN]\x86b.", b"cnumpy\ndtype\nVb1\n\x85RI5\nb."),
        b"cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\nVi8\n\x85RU\x01a\x86R.",
        b"cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\nVO\n\x85RU\x08abcdabcd\x86R.",
        *(b"G\x00\x00\x00\x00\x00\x00\x00\x00.", b"\x8a\x09123456789.", b".", b"(.", b"a", b"e", b"I5\nI6\na."),
        *(b"h\x05.", b"g7\n.", b"p-1\n.", b"]", b"T\xff\xff\xff\xff.", b"\x8e" + b"\xff" * 8 + b".", b"Inan\n."),
        *(b"I" + b"9" * 50 + b"\n.", b"F" + b"x" * 5000 + b"\n.", b"Sx\n.", b"S'x\n.", b"S'\\q'\n.", b"S'\\'\n."),
        b"X\x01\x00\x00\x00\xff.",
        *(b"c_codecs\nencode\nX\x03\x00\x00\x00\xe2\x82\xacX\x06\x00\x00\x00latin1\x86R.", b"V\\u12\n."),
        *(b"](I1\nI2\ne.", b"U\x02ab."),
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
        pytest.param(b"]" * 800_000, id="lists"),
        pytest.param(b"(" * 800_000, id="marks"),
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
        pytest.param(b"]q\x00" + b"(" + b"h\x00h\x00h\x00h\x00" * 20_000 + b"e.", id="cycles"),
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
        pytest.param(b"N" + b"\x85" * 90_000 + b".", id="depth"),
        pytest.param(b"]" * 50_000 + b"a" * 49_999 + b".", id="deep lists"),
    ],
)
def test_bombs_stay_within_a_bound(tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    # A tenth of what is allowed, in a tenth of the time.
    monkeypatch.setattr(verification_pickle, "_FREE_OPCODES", 100_000)
    path = stored(tmp_path, content)
    size = len(content)
    del content
    tracemalloc.start()
    with suppress(DataError):
        read_bin(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 * size + (18 << 20)


@settings(max_examples=150, deadline=None)
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


@settings(max_examples=150, deadline=None)
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
