"""RecordIO: byte for byte mxnet's, read through a memory map; every damage is named with key and offset."""

import multiprocessing
import pickle
import struct
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from arcface_kd.data.formats import recordio
from arcface_kd.data.formats.record import pack, unpack
from arcface_kd.data.formats.recordio import RecordReader, RecordWriter
from arcface_kd.errors import DataError
from tests.data.record_sets import MAGIC, one_line, write_records

# Every way for the magic number to stand in a record, and every length of padding.
PAYLOADS = [
    *(b"abcd"[:size] for size in range(5)),
    *(
        start + MAGIC * count + end
        for start in (b"", b"x", b"abcd")
        for count in (1, 2)
        for end in (b"", b"efg" + MAGIC)
    ),
    *(MAGIC[:3], b"abcd" + MAGIC[:3], MAGIC[:2] + MAGIC + MAGIC[2:], bytes(range(256)) * 40),
]


def naive_rec(records: list[bytes]) -> tuple[bytes, list[int]]:
    """dmlc's recordio writer, word by word."""
    out = bytearray()
    offsets = []
    for record in records:
        offsets.append(len(out))
        parts = [bytearray()]
        for start in range(0, len(record), 4):
            word = record[start : start + 4]
            if word == MAGIC:
                parts.append(bytearray())
            else:
                parts[-1] += word
        for number, part in enumerate(parts):
            last = number == len(parts) - 1
            flag = (0 if last else 1) if number == 0 else (3 if last else 2)
            out += MAGIC + struct.pack("<I", flag * 2**29 + len(part)) + part
            while len(out) % 4:
                out.append(0)
    return bytes(out), offsets


def write(folder: Path, records: list[bytes], keys: list[int] | None = None) -> tuple[Path, Path]:
    write_records(folder, list(zip(keys or range(len(records)), records, strict=True)))
    return folder / "train.rec", folder / "train.idx"


# Writing and reading ------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@example(records=PAYLOADS)
@given(records=st.lists(st.lists(st.sampled_from([MAGIC, b"a", b"bcd", b"efgh"])).map(b"".join), min_size=1))
def test_any_record_comes_back_and_is_written_word_by_word(
    records: list[bytes], tmp_path_factory: pytest.TempPathFactory
) -> None:
    rec, idx = write(tmp_path_factory.getbasetemp() / "any", records)
    expected, offsets = naive_rec(records)
    assert rec.read_bytes() == expected
    assert idx.read_text() == "".join(f"{key}\t{offset}\n" for key, offset in enumerate(offsets))
    with RecordReader(rec, idx) as reader:
        assert [bytes(reader.read(key)) for key in range(len(records))] == records


def test_files_equal_mxnets_and_each_reads_the_others(mxnet: ModuleType, tmp_path: Path) -> None:
    keys = [3, 1, 10**12, *range(20, 20 + len(PAYLOADS) - 3)]
    rec, idx = write(tmp_path, PAYLOADS, keys)
    theirs = mxnet.recordio.MXIndexedRecordIO(str(tmp_path / "mx.idx"), str(tmp_path / "mx.rec"), "w")
    for key, payload in zip(keys, PAYLOADS, strict=True):
        theirs.write_idx(key, payload)
    theirs.close()
    assert rec.read_bytes() == (tmp_path / "mx.rec").read_bytes()
    assert idx.read_bytes() == (tmp_path / "mx.idx").read_bytes()

    oracle = mxnet.recordio.MXIndexedRecordIO(str(idx), str(rec), "r")
    with RecordReader(tmp_path / "mx.rec", tmp_path / "mx.idx") as reader:
        assert reader.keys.tolist() == oracle.keys == keys
        assert reader.offsets.tolist() == [oracle.idx[key] for key in keys]
        for position, key in enumerate(keys):
            assert bytes(reader.read(key)) == bytes(reader.read_at(position)) == oracle.read_idx(key)
    oracle.close()


def test_whole_records_are_views_of_the_map(tmp_path: Path) -> None:
    with RecordReader(*write(tmp_path, [b"abcd" * 10, b"abcd" + MAGIC])) as reader:
        view = reader.read(0)
        assert isinstance(view, memoryview)
        assert view.readonly
        assert reader.read(1) == b"abcd" + MAGIC
    assert bytes(view) == b"abcd" * 10


def test_unordered_keys(tmp_path: Path) -> None:
    keys = [7, 2, 9, 0, 4]
    with RecordReader(*write(tmp_path, [bytes([key]) * key for key in keys], keys)) as reader:
        assert reader.keys.tolist() == keys
        assert [bytes(reader.read(key)) for key in keys] == [bytes([key]) * key for key in keys]
        assert reader.find(np.array([9, 1, 0, 10, -1])).tolist() == [2, -1, 3, -1, -1]
        assert reader.key_order is not None
        assert reader.keys[reader.key_order].tolist() == sorted(keys)
        with pytest.raises(DataError, match=r"train\.idx has no key 5$"):
            reader.read(5)


def test_an_index_may_list_records_in_any_order_and_leave_some_out(tmp_path: Path) -> None:
    rec, idx = write(tmp_path, [b"a" * 8, b"b" * 8, b"c" * 8, b"d" * 8])
    lines = idx.read_text().splitlines()
    idx.write_text("\n".join([lines[3], lines[0], lines[2]]) + "\n")
    with RecordReader(rec, idx) as reader:
        assert [bytes(reader.read(key)) for key in (0, 2, 3)] == [b"a" * 8, b"c" * 8, b"d" * 8]


def test_nothing_appears_before_the_end_or_after_an_error(tmp_path: Path) -> None:
    rec, idx = tmp_path / "a.rec", tmp_path / "a.idx"

    with RecordWriter(rec, idx) as writer:
        writer.write(0, b"old")
        assert not rec.exists()
        assert not idx.exists()
    before = rec.read_bytes(), idx.read_bytes()
    with pytest.raises(DataError), RecordWriter(rec, idx) as writer:
        writer.write(-1, b"new")
    assert (rec.read_bytes(), idx.read_bytes()) == before
    assert len(list(tmp_path.iterdir())) == 2


def test_a_full_disk_leaves_neither_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"), RecordWriter(tmp_path / "a.rec", tmp_path / "a.idx") as writer:
        writer.write(0, b"x")
    assert len(calls) == 2
    assert list(tmp_path.iterdir()) == []


def test_too_long_a_record_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recordio, "LENGTH_MASK", 10)
    with pytest.raises(DataError, match="key 4 has 11 bytes"), RecordWriter(tmp_path / "a", tmp_path / "b") as writer:
        writer.write(4, bytes(11))


# Bad files ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return write(tmp_path, [b"a" * 30, b"b" * 20 + MAGIC + b"c" * 9, b"d" * 50])


def test_missing_and_empty_files(pair: tuple[Path, Path], tmp_path: Path) -> None:
    rec, idx = pair
    (tmp_path / "empty").touch()
    for rec_path, idx_path, message in [
        (tmp_path / "no.rec", idx, r"cannot read .*no\.rec: No such file"),
        (rec, tmp_path / "no.idx", r"no\.idx.*data index"),
        (tmp_path / "empty", idx, "empty is empty; copy or download it again"),
        (rec, tmp_path / "empty", "empty is empty; .*data index"),
        (tmp_path, idx, "cannot read .*: Is a directory"),
    ]:
        with pytest.raises(DataError, match=message) as caught:
            RecordReader(rec_path, idx_path)
        one_line(caught.value)


def test_every_truncation_of_the_records_shows_at_the_start(pair: tuple[Path, Path]) -> None:
    rec, idx = pair
    whole = rec.read_bytes()
    for length in range(len(whole)):
        rec.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"is empty|cut short|belongs to another file") as caught:
            RecordReader(rec, idx)
        assert str(rec) in one_line(caught.value)


def test_every_truncation_of_the_index_shows_at_the_start(pair: tuple[Path, Path]) -> None:
    rec, idx = pair
    whole = idx.read_bytes()
    # Without the last newline, nothing is lost.
    for length in range(len(whole) - 1):
        idx.write_bytes(whole[:length])
        with pytest.raises(DataError) as caught:
            RecordReader(rec, idx)
        assert idx.name in one_line(caught.value)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("0\t0\n1\t40\n2\t1000\n", r"key 2 points to byte 1000, but .* has 148 bytes"),
        ("0\t0\n1\t40\n2\t148\n", r"key 2 points to byte 148, but .* has 148 bytes"),
        ("0\t0\n1\t42\n2\t88\n", "key 1 points to byte 42, which is no multiple of 4"),
        ("0\t0\n1\t40\n1\t88\n", "the key 1 occurs twice"),
        ("0\t0\n1\t40\n2\t40\n", "the byte offset 40 occurs twice"),
        ("1\t40\n2\t88\n", r"lists records from byte 40 on, but .*\.rec begins at byte 0"),
        ("0\t0\n1\t40\n", "lists records up to byte 88, but .* goes on to byte 148"),
        ("0\t0\n1\t40\n2\t144\n", "key 2 at byte 144: the file ends at byte 148 inside it"),
        ("0\t0\n1\t40\n2\t132\n", r"key 2 at byte 132: no record starts at byte 132 \(found 0x64646464"),
        ("0\t0\n1\t40\n2\t68\n", "key 2 at byte 68: it starts with a part flagged 3"),
    ],
)
def test_an_index_of_another_file_is_refused(pair: tuple[Path, Path], index: str, message: str) -> None:
    rec, idx = pair
    assert rec.stat().st_size == 148
    idx.write_text(index)
    with pytest.raises(DataError, match=message) as caught:
        RecordReader(rec, idx)
    one_line(caught.value)


def test_parts_that_no_record_may_begin_or_go_on_with(pair: tuple[Path, Path]) -> None:
    rec, idx = pair
    idx.write_text("0\t0\n2\t88\n")
    patched(rec, 4, struct.pack("<I", 1 << 29 | 30))
    with (
        RecordReader(rec, idx) as reader,
        pytest.raises(DataError, match="a part flagged 1 follows where 2 or 3 was due"),
    ):
        reader.read(0)


@pytest.mark.parametrize("backwards", [False, True])
def test_records_of_many_parts_never_share_them(tmp_path: Path, backwards: bool) -> None:
    """Each of them begins inside the one before it, and all go on with the same thousand parts: 16 MB out of 45 kB."""
    heads, tail = 1000, (MAGIC + struct.pack("<I", 2 << 29)) * 1000 + MAGIC + struct.pack("<I", 3 << 29)
    body = b"".join(MAGIC + struct.pack("<I", 1 << 29 | 32 * (heads - head) - 8) + bytes(24) for head in range(heads))
    (tmp_path / "train.rec").write_bytes(body + tail)
    lines = [f"{head}\t{32 * head}\n" for head in range(heads)]
    (tmp_path / "train.idx").write_text("".join(lines[::-1] if backwards else lines))
    with RecordReader(tmp_path / "train.rec", tmp_path / "train.idx") as reader:
        for key in range(heads - 1):
            with pytest.raises(DataError, match=rf"into the record that train\.idx lists at byte {32 * key + 32}$"):
                reader.read(key)
        assert len(reader.read(heads - 1)) == 24 + 4 * 1001


def patched(path: Path, offset: int, replacement: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[offset : offset + len(replacement)] = replacement
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("offset", "replacement", "key", "message"),
    [
        (0, b"\0", 0, r"key 0 at byte 0: no record starts at byte 0 \(found 0xced72300"),
        (4, struct.pack("<I", 26), 0, "key 0 at byte 0: no record follows at byte 36, so that its length is wrong"),
        (4, struct.pack("<I", 200), 0, "key 0 at byte 0: it ends at byte 208, but the file has 148"),
        (4, struct.pack("<I", 2 << 29 | 30), 0, "it starts with a part flagged 2, wanted 0 or 1"),
        (4, struct.pack("<I", 7 << 29 | 30), 0, "it starts with a part flagged 7"),
        (4, struct.pack("<I", 76), 0, r"goes on to byte 84, into the record .* at byte 40"),
        (4, struct.pack("<I", 1 << 29 | 30), 0, r"goes on to byte 68, into the record .* at byte 40"),
        (72, struct.pack("<I", 2 << 29 | 9), 1, "goes on to byte 148, into the record .* at byte 88"),
        (68, b"\0", 1, "key 1 at byte 40: no record starts at byte 68"),
    ],
)
def test_damage_is_named_with_key_and_offset(
    pair: tuple[Path, Path], offset: int, replacement: bytes, key: int, message: str
) -> None:
    rec, idx = pair
    patched(rec, offset, replacement)
    reader = RecordReader(rec, idx)
    assert bytes(reader.read(2)) == b"d" * 50
    with pytest.raises(DataError, match=message) as caught:
        reader.read(key)
    assert one_line(caught.value).startswith(f"{rec}: record with key {key} at byte {0 if key == 0 else 40}")


# Other processes ----------------------------------------------------------------------------------------------------


def test_a_pickled_reader_reads_the_file_that_it_was_opened_on(pair: tuple[Path, Path]) -> None:
    reader = RecordReader(*pair)
    sent = pickle.dumps(reader)
    copy = pickle.loads(sent)
    assert [bytes(copy.read(key)) for key in range(3)] == [bytes(reader.read(key)) for key in range(3)]
    patched(pair[0], 148, b"longer")
    with pytest.raises(DataError, match="had 148 bytes when it was opened and has 154 now"):
        pickle.loads(sent)


def _read_in_worker(reader: RecordReader, results: "multiprocessing.SimpleQueue[object]") -> None:
    results.put((reader._index.is_shared(), reader.keys.tolist(), [bytes(reader.read(key)) for key in (5, 9)]))
    # Two workers see one index: what the first writes, the second reads.
    reader._index[0, 0] += 1


def test_spawned_workers_share_one_index(tmp_path: Path) -> None:
    reader = RecordReader(*write(tmp_path, [b"five", b"nine"], [5, 9]))
    kept = reader.keys
    context = multiprocessing.get_context("spawn")
    results: multiprocessing.SimpleQueue[object] = context.SimpleQueue()
    process = context.Process(target=_read_in_worker, args=(reader, results))
    process.start()
    assert results.get() == (True, [5, 9], [b"five", b"nine"])
    process.join()
    assert process.exitcode == 0
    assert reader.keys.tolist() == [6, 9]
    assert kept.tolist() == [5, 9]


def test_without_shared_memory_the_index_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise RuntimeError("unable to allocate shared memory")

    reader = RecordReader(*write(tmp_path, [b"five"], [5]))
    monkeypatch.setattr("torch.Tensor.share_memory_", full)
    monkeypatch.setattr(recordio, "get_spawning_popen", object)
    copy = pickle.loads(pickle.dumps(reader))
    assert bytes(copy.read(5)) == b"five"


@pytest.mark.real
def test_real_records_equal_mxnets(mxnet: ModuleType, real_data: Path) -> None:
    rec, idx = (real_data / "faces_real" / f"train.{end}" for end in ("rec", "idx"))
    oracle = mxnet.recordio.MXIndexedRecordIO(str(idx), str(rec), "r")
    with RecordReader(rec, idx) as reader:
        assert reader.keys.tolist() == oracle.keys
        for key in oracle.keys:
            theirs = oracle.read_idx(key)
            assert bytes(reader.read(key)) == theirs
            header, payload = unpack(theirs)
            assert pack(header, bytes(payload)) == theirs
