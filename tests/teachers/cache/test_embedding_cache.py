"""The cache of the teacher's embeddings: exact rows, kills, full disks, strangers' files."""

import errno
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize

from arcface_kd.errors import TeacherError
from arcface_kd.teachers.base import load_teacher
from arcface_kd.teachers.cache import embedding_cache
from arcface_kd.teachers.cache.embedding_cache import EmbeddingCache, identity_in, identity_of, readable_size
from arcface_kd.teachers.options import TeacherOptions

IMAGES = 40
DIMENSION = 24


def identity(**changes: object) -> dict[str, object]:
    made: dict[str, object] = {
        "format": 1,
        "teacher": "t" * 64,
        "preprocessing": {"channels": "rgb", "mean": (127.5,) * 3, "std": (127.5,) * 3, "size": 112},
        "precision": "fp32",
        "data": "d" * 64,
        "images": IMAGES,
        "embedding_size": DIMENSION,
    }
    return {**made, **changes}


def embeddings_of(index: Tensor, flipped: Tensor, dimension: int = DIMENSION) -> Tensor:
    """What the teacher of these tests says of some views: other rows for each, of all lengths."""
    rows = [
        torch.randn(dimension, generator=torch.Generator().manual_seed(2 * int(i) + int(f))) * (1 + int(i))
        for i, f in zip(index, flipped, strict=True)
    ]
    return torch.stack(rows)


def both_views(images: int = IMAGES) -> tuple[Tensor, Tensor]:
    return torch.arange(images).repeat_interleave(2), torch.tensor([False, True]).repeat(images)


def assert_whole_rows(cache: EmbeddingCache) -> int:
    """Every row that is there is the teacher's; returns their number."""
    index, flipped = both_views(cache.images)
    rows, known = cache.look_up(index, flipped)
    wanted = normalize(embeddings_of(index, flipped, cache.embedding_size))
    assert not known.any() or (rows[known] - wanted[known]).abs().max() < 5e-4
    assert rows[~known].isnan().all()
    return int(known.sum())


@pytest.fixture
def cache(tmp_path: Path) -> EmbeddingCache:
    """A new one, ``rows``."""
    return EmbeddingCache(tmp_path / "rows", identity())


@pytest.fixture
def full(cache: EmbeddingCache) -> EmbeddingCache:
    index, flipped = both_views()
    cache.store(index, flipped, embeddings_of(index, flipped))
    return cache


def test_a_new_cache_knows_nothing_and_has_its_room_on_the_disk(cache: EmbeddingCache) -> None:
    rows, known = cache.look_up(*both_views())
    assert not known.any()
    assert rows.isnan().all()
    assert cache.filled() == 0
    assert cache.size == 4 * IMAGES * DIMENSION == cache.path.stat().st_size
    assert cache.path.stat().st_blocks * 512 >= cache.size


def test_rows_come_back_as_unit_vectors(cache: EmbeddingCache) -> None:
    index, flipped = torch.tensor([7, 0, 39, 7]), torch.tensor([True, False, True, False])
    given = embeddings_of(index, flipped)
    cache.store(index, flipped, given)
    rows, known = cache.look_up(index, flipped)
    assert known.all()
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(4), rtol=1e-6, atol=1e-6)
    assert (rows - normalize(given)).abs().max() < 2.5e-4
    assert cache.filled() == 4
    others = torch.tensor([0, 39, 1])
    assert not cache.look_up(others, torch.tensor([True, False, False]))[1].any()


def test_a_pickled_one_opens_the_same_file(full: EmbeddingCache) -> None:
    """As a loader's workers are handed it where they are not forked."""
    pickled = pickle.dumps(full)
    assert len(pickled) < 4096
    found = pickle.loads(pickled)
    assert assert_whole_rows(found) == 2 * IMAGES
    found.store(torch.tensor([3]), torch.tensor([True]), torch.ones(1, DIMENSION))
    assert (full.look_up(torch.tensor([3]), torch.tensor([True]))[0] > 0).all()


@pytest.mark.parametrize("dimension", [1, 2, 512, 4096])
def test_rounding_is_within_what_is_promised(tmp_path: Path, dimension: int) -> None:
    generator = torch.Generator().manual_seed(dimension)
    given = torch.randn(200, dimension, generator=generator)
    # Rows with most of their length in few numbers, and numbers below fp16's smallest normal one.
    given[:50] *= torch.logspace(0, -7, dimension)
    given[50] = 0
    given[50, dimension // 2] = -3
    cache = EmbeddingCache(tmp_path / "rows", identity(images=200, embedding_size=dimension))
    index, flipped = torch.arange(200), torch.zeros(200, dtype=torch.bool)
    cache.store(index, flipped, given)
    rows, known = cache.look_up(index, flipped)
    assert known.all()
    assert (rows - normalize(given)).abs().max() < 1e-3
    assert (cosine_similarity(rows.double(), given.double()) > 1 - 1e-5).all()


def test_known_tells_plain_from_mirrored(cache: EmbeddingCache) -> None:
    index, flipped = torch.tensor([3, 9, 9, 33]), torch.tensor([False, False, True, True])
    cache.store(index, flipped, embeddings_of(index, flipped))
    wanted = np.zeros((IMAGES, 2), dtype=bool)
    wanted[index, flipped.int()] = True
    assert (cache.known(0, IMAGES) == wanted).all()
    assert (cache.known(3, 34) == wanted[3:34]).all()
    assert cache.known(5, 5).shape == (0, 2)


NOISE = np.random.default_rng(0).integers(0, 256, 2 * DIMENSION, dtype=np.uint8).tobytes()


@pytest.mark.parametrize(
    ("first", "content"),
    [
        # A file system that lost some of a row's bytes gives zeros for them.
        *((first, bytes(2 * count)) for first, count in ((0, 1), (5, 1), (23, 1), (3, 17))),
        *((0, content) for content in (NOISE, b"\xff" * 2 * DIMENSION, b"\xff\x83" * DIMENSION)),
    ],
)
def test_a_damaged_row_is_missing(full: EmbeddingCache, first: int, content: bytes) -> None:
    with full.path.open("r+b") as stream:
        stream.seek(2 * (11 * DIMENSION + first))
        stream.write(content)
    _, known = full.look_up(*both_views())
    assert known.logical_not().nonzero().flatten().tolist() == [11]
    assert assert_whole_rows(full) == 2 * IMAGES - 1


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), 1e-30])
def test_no_direction_no_row(cache: EmbeddingCache, value: float) -> None:
    index, flipped = torch.tensor([5, 6]), torch.tensor([False, True])
    given = embeddings_of(index, flipped)
    given[1] = value
    with pytest.raises(TeacherError, match=r"images \[6\] are zero, NaN or inf"):
        cache.store(index, flipped, given)
    assert cache.filled() == 0


@pytest.mark.parametrize("index", [-1, IMAGES])
def test_an_image_that_is_not_there_is_no_other_one(cache: EmbeddingCache, index: int) -> None:
    with pytest.raises(IndexError):
        cache.look_up(torch.tensor([index]), torch.tensor([False]))
    with pytest.raises(IndexError):
        cache.store(torch.tensor([index]), torch.tensor([True]), torch.ones(1, DIMENSION))


def test_an_empty_batch(cache: EmbeddingCache) -> None:
    none = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.bool)
    cache.store(*none, torch.empty(0, DIMENSION))
    rows, known = cache.look_up(*none)
    assert rows.shape == (0, DIMENSION)
    assert known.shape == (0,)


def test_the_header_says_whose_embeddings_these_are(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 6))
    teacher = load_teacher(network, TeacherOptions(size=8, channels="bgr"))
    EmbeddingCache(tmp_path / "rows", identity_of(teacher, "d" * 64, 5))
    header = json.loads((tmp_path / "rows.json").read_text())
    assert (header["images"], header["embedding_size"], header["data"]) == (5, 6, "d" * 64)
    assert (header["teacher"], header["precision"]) == (teacher.fingerprint, "fp32")
    assert header["preprocessing"]["channels"] == "bgr"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": "u" * 64}, "another teacher .it has tttttttttttt..., this run uuuuuuuuuuuu..."),
        ({"precision": "bf16"}, "another precision .it has fp32, this run bf16"),
        ({"preprocessing": {"channels": "bgr"}}, "another preprocessing"),
        ({"images": IMAGES + 1}, f"another number of images .it has {IMAGES}, this run {IMAGES + 1}"),
        ({"embedding_size": 8}, f"another embedding size .it has {DIMENSION}, this run 8"),
        ({"format": 2}, "another file format"),
        ({"data": "e" * 64, "teacher": "u" * 64}, "another data set .* and another teacher"),
    ],
    ids=str,
)
def test_a_strangers_cache_is_refused_by_name(
    cache: EmbeddingCache, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    before = [path.read_bytes() for path in sorted(tmp_path.iterdir())]
    with pytest.raises(TeacherError, match=message) as refused:
        EmbeddingCache(cache.path, identity(**changes))
    assert "\n" not in str(refused.value)
    assert before == [path.read_bytes() for path in sorted(tmp_path.iterdir())]


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"[]", b"null", b"{", b"\xff\xfe", b"[" * 100_000, b'{"format": 1}'),
        *(json.dumps({**identity(), "images": images}).encode() for images in (10**15, -1)),
        json.dumps({**identity(), "teacher": ["x" * 1000] * 50}).encode(),
        b'{"images": 1' + b"0" * 60_000 + b"}",
    ],
    ids=range(11),
)
def test_a_hostile_header_ends_in_one_line(cache: EmbeddingCache, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "rows.json").write_bytes(content)
    with pytest.raises(TeacherError, match="delete it") as refused:
        EmbeddingCache(cache.path, identity())
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 1500


def test_no_more_of_a_header_than_its_beginning_is_read(cache: EmbeddingCache, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_bytes(json.dumps(identity()).encode() + b" " * (1 << 20) + b"no JSON")
    assert EmbeddingCache(cache.path, identity()).filled() == 0


@pytest.mark.parametrize("length", [None, 0, 100, 4 * IMAGES * DIMENSION - 1, 4 * IMAGES * DIMENSION + 2])
def test_a_file_of_another_length_is_refused(cache: EmbeddingCache, length: int | None) -> None:
    cache.path.unlink() if length is None else os.truncate(cache.path, length)
    with pytest.raises(TeacherError, match=f"has {length or 0} bytes and should have {4 * IMAGES * DIMENSION}"):
        EmbeddingCache(cache.path, identity())


def test_a_file_that_is_no_cache_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(bytes(100) + b"weights")
    with pytest.raises(TeacherError, match=r"model\.pt exists without its header"):
        EmbeddingCache(tmp_path / "model.pt", identity())
    assert (tmp_path / "model.pt").read_bytes() == bytes(100) + b"weights"
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


@pytest.mark.parametrize("length", [0, 10, 4 * IMAGES * DIMENSION, 10**6])
def test_an_unfinished_file_of_zeros_is_finished(tmp_path: Path, length: int) -> None:
    (tmp_path / "rows").write_bytes(bytes(length))
    cache = EmbeddingCache(tmp_path / "rows", identity())
    assert cache.filled() == 0
    assert (tmp_path / "rows").stat().st_size == cache.size


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    os.mkfifo(tmp_path / "rows.json")
    (tmp_path / "round").symlink_to(tmp_path / "round")
    for path, said in (
        (tmp_path / "folder", "folder is a folder"),
        (".", r"the cache \. is a folder"),
        (tmp_path / "pipe", "pipe is not a regular file"),
        ("/dev/null", "null is not a regular file"),
        (tmp_path / "rows", r"rows\.json is not a regular file"),
        (tmp_path / "nowhere" / "rows", "there is no folder .*nowhere"),
        (tmp_path / "round", "cannot be used"),
    ):
        with pytest.raises(TeacherError, match=said):
            EmbeddingCache(path, identity())


def test_a_cache_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert EmbeddingCache("~/rows", identity()).path == tmp_path / "rows"
    assert identity_in("~/rows", "d" * 64, IMAGES)["teacher"] == "t" * 64


def test_a_link_to_another_disk_is_followed(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    (tmp_path / "rows").symlink_to(disk / "rows")
    index, flipped = both_views()
    EmbeddingCache(tmp_path / "rows", identity()).store(index, flipped, embeddings_of(index, flipped))
    assert (tmp_path / "rows").is_symlink()
    assert (disk / "rows").stat().st_size == 4 * IMAGES * DIMENSION
    assert EmbeddingCache(tmp_path / "rows", identity()).filled() == 2 * IMAGES


def test_a_full_cache_serves_where_it_cannot_be_written(
    cache: EmbeddingCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, mode: str) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied")

    index, flipped = both_views()
    assert not cache.read_only
    cache.store(index[1:], flipped[1:], embeddings_of(index[1:], flipped[1:]))
    # Root may write everything, so permissions would not do.
    monkeypatch.setattr(embedding_cache, "FileIO", refuse)
    cache = EmbeddingCache(tmp_path / "rows", identity())
    assert cache.read_only
    assert assert_whole_rows(cache) == 2 * IMAGES - 1
    with pytest.raises(TeacherError, match="read-only"):
        cache.store(index[:1], flipped[:1], embeddings_of(index[:1], flipped[:1]))


def test_sizes_are_told_in_decimal_units() -> None:
    assert readable_size(999) == "999 bytes"
    assert readable_size(4 * 5_822_653 * 512) == "11.9 GB"
    assert readable_size(1.5e12) == "1.5 TB"
