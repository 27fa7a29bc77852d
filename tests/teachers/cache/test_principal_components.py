"""Streaming principal components: scikit-learn's, in little memory; kept beside the cache with its fingerprints."""

import json
import logging
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from torch import Tensor
from torch.nn.functional import normalize

from arcface_kd.distributed.ranks import RankGroup
from arcface_kd.errors import TeacherError
from arcface_kd.teachers.cache import embedding_cache
from arcface_kd.teachers.cache.embedding_cache import EmbeddingCache, identity_in
from arcface_kd.teachers.cache.principal_components import (
    PrincipalComponents,
    StreamingPCA,
    components_file,
    components_of_cache,
)
from benchmarks.peak_memory import can_measure, peak_mb

ALONE = RankGroup(alone=True)


def spread_rows(count: int, dimension: int, seed: int = 0) -> Tensor:
    """Rows around a point, longer along some directions than along others."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, dimension, generator=generator, dtype=torch.float64)
    turned = torch.linalg.qr(torch.randn(dimension, dimension, generator=generator, dtype=torch.float64)).Q
    return rows * 0.8 ** torch.arange(dimension) @ turned + torch.randn(dimension, generator=generator).double()


def identity(images: int, dimension: int) -> dict[str, object]:
    return {
        "format": 1,
        "teacher": "t" * 64,
        "preprocessing": {},
        "precision": "fp32",
        "data": "d" * 64,
        "images": images,
        "embedding_size": dimension,
    }


def filled_cache(path: Path, images: int, dimension: int, seed: int = 0) -> tuple[EmbeddingCache, np.ndarray]:
    """A cache and the rows that it gives back, (2 x images, D)."""
    cache = EmbeddingCache(path, identity(images, dimension))
    rows = normalize(spread_rows(2 * images, dimension, seed)).float()
    index = torch.arange(images).repeat_interleave(2)
    flipped = torch.arange(2 * images) % 2 == 1
    cache.store(index, flipped, rows)
    return cache, cache.look_up(index, flipped)[0].double().numpy()


def components_of(blocks: Iterable[Tensor], dimension: int) -> PrincipalComponents:
    pca = StreamingPCA(dimension)
    for block in blocks:
        pca.add(block)
    return pca.finish()


def assert_is_sklearns(found: PrincipalComponents, rows: np.ndarray) -> None:
    wanted = PCA(svd_solver="full").fit(rows)
    held = len(wanted.components_)
    np.testing.assert_allclose(found.mean.numpy(), wanted.mean_, rtol=0, atol=1e-12)
    np.testing.assert_allclose(found.variances.numpy()[:held], wanted.explained_variance_, rtol=1e-8, atol=1e-13)
    rank = found.rank
    agreement = (found.axes.numpy()[:rank] * wanted.components_[:rank]).sum(1)
    np.testing.assert_allclose(np.abs(agreement), 1, rtol=0, atol=1e-8)


@pytest.mark.parametrize(("count", "dimension", "block"), [(200, 7, 64), (90, 24, 1), (1000, 16, 1000)])
def test_equals_sklearn_up_to_sign(count: int, dimension: int, block: int) -> None:
    rows = spread_rows(count, dimension)
    found = components_of(rows.split(block), dimension)
    assert found.count == count
    assert_is_sklearns(found, rows.numpy())
    torch.testing.assert_close(found.axes @ found.axes.T, torch.eye(dimension, dtype=torch.float64))
    largest = found.axes.gather(1, found.axes.abs().argmax(1, keepdim=True))
    assert bool((largest > 0).all()), "the sign does not hang on the solver"
    for share in (0.3, 0.6, 0.95):
        assert found.axes_for(share) == PCA(n_components=share, svd_solver="full").fit(rows.numpy()).n_components_


def test_fewer_rows_than_dimensions() -> None:
    rows = spread_rows(6, 20)
    found = components_of([rows], 20)
    assert found.rank == 5
    assert found.axes_for(1.0) == 5
    assert_is_sklearns(found, rows.numpy())
    assert found.axes_for(1e-9) == 1
    with pytest.raises(ValueError, match="principal components of 1 rows"):
        components_of([rows[:1]], 20)


def test_of_a_cache_and_kept_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, rows = filled_cache(tmp_path / "rows", images=60, dimension=9)
    # Blocks that end within an image's two views and within the file.
    monkeypatch.setattr(embedding_cache, "_NUMBERS_AT_ONCE", 9 * 7)
    found = components_of_cache(cache, ALONE)
    assert found.count == 120
    assert_is_sklearns(found, rows)
    with np.load(components_file(cache), allow_pickle=False) as kept:
        assert json.loads(str(kept["identity"]))["cache"] == identity(60, 9)
    # The next run does not read the rows.
    monkeypatch.setattr(EmbeddingCache, "blocks", None)
    again = components_of_cache(EmbeddingCache(tmp_path / "rows", identity(60, 9)), ALONE)
    for part in ("mean", "axes", "variances", "count"):
        assert torch.equal(torch.as_tensor(getattr(again, part)), torch.as_tensor(getattr(found, part))), part


def test_what_is_another_caches_or_damaged_is_made_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    other, _ = filled_cache(tmp_path / "other", images=60, dimension=9, seed=1)
    components_of_cache(other, ALONE)
    cache, rows = filled_cache(tmp_path / "rows", images=50, dimension=9)
    file = components_file(cache)
    file.write_bytes(components_file(other).read_bytes())
    with caplog.at_level(logging.INFO):
        assert_is_sklearns(components_of_cache(cache, ALONE), rows)
    assert "belongs to another cache" in caplog.text
    good = file.read_bytes()
    objects, big = tmp_path / "objects.npz", tmp_path / "big.npz"
    np.savez(objects, identity=np.array([{}], dtype=object), mean=0, axes=0, variances=0, count=2)
    np.savez_compressed(big, identity=np.zeros(1 << 22), mean=0, axes=0, variances=0, count=2)
    # The version that its entries need, in the list at the end, is one that zipfile does not know.
    entry = good.index(b"PK\x01\x02")
    newer = good[: entry + 6] + b"\x65\x00" + good[entry + 8 :]
    for bad in (b"", b"PK\x03\x04", good[:-30], newer, objects.read_bytes(), big.read_bytes()):
        file.write_bytes(bad)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert_is_sklearns(components_of_cache(cache, ALONE), rows)
        assert "is damaged" in caplog.text
        assert file.read_bytes()[:4] == good[:4]


def test_where_nothing_can_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache, rows = filled_cache(tmp_path / "rows", images=20, dimension=4)
    components_file(cache).mkdir()
    with caplog.at_level(logging.WARNING):
        assert_is_sklearns(components_of_cache(cache, ALONE), rows)
    assert "the next run reads the cache again" in caplog.text


def test_a_cache_with_holes_says_how_to_fill_it(tmp_path: Path) -> None:
    cache, _ = filled_cache(tmp_path / "rows", images=20, dimension=4)
    with (tmp_path / "rows").open("r+b") as stream:
        stream.seek(4 * 8 * 3)
        stream.write(b"\0" * 8 * 3)
    with pytest.raises(TeacherError, match=r"lacks 3 of 40 embeddings: fill it beforehand with `arcface-kd cache"):
        components_of_cache(cache, ALONE)
    assert not components_file(cache).exists()


def test_a_cache_without_its_teacher_is_known_by_its_header_and_the_data(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    for make in (
        lambda: identity_in(path, "d" * 64, 20),
        lambda: EmbeddingCache(path, identity(20, 4), create=False),
    ):
        with pytest.raises(TeacherError, match=r"there is no cache .* `arcface-kd cache CONFIG --kd-teacher FILE"):
            make()
    assert list(tmp_path.iterdir()) == []
    filled_cache(path, images=20, dimension=4)
    assert EmbeddingCache(path, identity_in(path, "d" * 64, 20), create=False).embedding_size == 4
    with pytest.raises(TeacherError, match="another data set"):
        EmbeddingCache(path, identity_in(path, "e" * 64, 20), create=False)


@pytest.mark.parametrize("dimension", ["4", 0, -1, 1 << 40, None, True])
def test_a_header_that_cannot_be(tmp_path: Path, dimension: object) -> None:
    header = {**identity(20, 4), "embedding_size": dimension}
    (tmp_path / "rows.json").write_text(json.dumps(header))
    with pytest.raises(TeacherError, match=r"rows.json .* embedding size"):
        identity_in(tmp_path / "rows", "d" * 64, 20)


def _reading_a_large_cache(file: Path, images: int, dimension: int, numbers: int) -> Callable[[], object]:
    embedding_cache._NUMBERS_AT_ONCE = numbers
    cache = EmbeddingCache(file, identity(images, dimension))

    def step() -> PrincipalComponents:
        components_file(cache).unlink(missing_ok=True)
        return components_of_cache(cache, ALONE)

    return step


@pytest.mark.skipif(not can_measure(torch.device("cpu")), reason="this system does not tell a process its peak memory")
def test_memory_does_not_grow_with_the_cache(tmp_path: Path) -> None:
    """A file of 38 MB, 154 MB in the numbers of the sums, is read in blocks that are a small part of it."""
    images, dimension, numbers = 300_000, 32, 1 << 17
    rows = normalize(spread_rows(1200, dimension)).half().numpy().view(np.uint16)
    with (tmp_path / "rows").open("wb") as stream:
        for _ in range(2 * images // len(rows)):
            stream.write((~rows).tobytes())
    (tmp_path / "rows.json").write_text(json.dumps(identity(images, dimension)))
    peak = peak_mb(_reading_a_large_cache, torch.device("cpu"), tmp_path / "rows", images, dimension, numbers)
    # What the module says of a block, room for the libraries that the first product loads, and those pages of the
    # mapped file that the system has not taken back yet.
    assert peak < 26e-6 * numbers + 80
