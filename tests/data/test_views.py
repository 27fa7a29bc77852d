"""Degraded views: what is drawn how often and from which range, and that nothing but the seed decides it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from arcface_kd.config.augmentation import PRESETS, Augmentation
from arcface_kd.data import views as views_module
from arcface_kd.data.dataset import RecordDataset, View
from arcface_kd.data.loader import BatchViews, FaceLoader
from arcface_kd.data.sampler import ViewSampler, flips, uniforms, view_seeds
from arcface_kd.data.views import are_degraded, draws_of, view_of
from arcface_kd.errors import ConfigError, DataError
from tests.data.record_sets import insightface_records, pixels, write_records

CHANGES = ("mix", "affine", "crop", "lowres", "photometric")
STRONG = PRESETS["strong"]


def nobody(share: float) -> np.ndarray:
    raise AssertionError("no other face is wanted")


def views(image: np.ndarray, count: int, other: Callable[[float], np.ndarray] = nobody, **chances: float) -> list[Any]:
    return [view_of(image, draws, Augmentation(**chances), other)[0] for draws in draws_of(range(1000, 1000 + count))]


def scalar_uniform(seed: int, place: int) -> float:
    """The number at a place of splitmix64's stream, in Python's own whole numbers."""
    word = (1 << 64) - 1
    value = (seed + (place + 1) * 0x9E3779B97F4A7C15) & word
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & word
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & word
    return ((value ^ (value >> 31)) >> 11) / 2**53


def test_random_numbers_are_splitmix64_s() -> None:
    seeds = [0, 1, 2**63, 2**64 - 1]
    drawn = uniforms(np.array(seeds, dtype=np.uint64), 7)
    assert drawn.tolist() == [[scalar_uniform(seed, place) for place in range(7)] for seed in seeds]


def test_the_published_probabilities() -> None:
    assert PRESETS["quality"] == Augmentation(crop=0.2, lowres=0.2, photometric=0.2)
    assert PRESETS["flip"] == Augmentation()
    assert not PRESETS["flip"]


@pytest.mark.parametrize("preset", ["flip", "quality", "strong"])
def test_each_change_is_as_frequent_as_it_says_and_independent_of_the_others(preset: str) -> None:
    count = 50_000
    indices = np.arange(count)
    draws = draws_of(view_seeds(indices, seed=3, epoch=5).tolist())
    happens = {name: draws[:, at] < getattr(PRESETS[preset], name) for at, name in enumerate(CHANGES)}
    happens["flipped"] = flips(indices, seed=3, epoch=5)
    chance = {**vars(PRESETS[preset]), "flipped": 0.5}
    for one in happens:
        # Six standard deviations.
        assert abs(happens[one].mean() - chance[one]) <= 6 * np.sqrt(chance[one] * (1 - chance[one]) / count)
        for other in happens:
            if other != one:
                both = chance[one] * chance[other]
                assert abs((happens[one] & happens[other]).mean() - both) <= 6 * np.sqrt(both * (1 - both) / count)
    expected = np.any([happens[name] for name in CHANGES], axis=0)
    assert np.array_equal(are_degraded(draws, PRESETS[preset]), expected)
    other_epoch = draws_of(view_seeds(indices[:10], seed=3, epoch=6).tolist())
    assert not np.isin(other_epoch, draws).any()


def test_a_view_is_a_function_of_image_and_seed() -> None:
    image, mate = pixels(1), pixels(2)
    before = image.copy()
    draws = draws_of(range(40))
    first = [view_of(image, each, STRONG, lambda share: mate) for each in draws]
    again = [view_of(image.copy(), each, STRONG, lambda share: mate.copy()) for each in draws[::-1]][::-1]
    assert np.array_equal(image, before)
    for (one, mixed), (other, mixed_again) in zip(first, again, strict=True):
        assert one.dtype == np.uint8
        assert one.shape == image.shape
        assert mixed == mixed_again
        assert np.array_equal(one, other)
    changed = [not np.array_equal(one, image) for one, _ in first]
    assert changed == are_degraded(draws, STRONG).tolist()


def test_a_crop_stays_in_its_place() -> None:
    image = np.maximum(pixels(3), 1)
    areas, ratios, corners = [], [], set()
    for view in views(image, 600, crop=1):
        rows, columns = (np.flatnonzero(view.any((axis, 2))) for axis in (1, 0))
        top, left, tall, wide = rows[0], columns[0], len(rows), len(columns)
        part = np.s_[top : top + tall, left : left + wide]
        assert np.array_equal(view[part], image[part])
        assert np.count_nonzero(view.any(2)) == tall * wide
        areas.append(tall * wide / 112**2)
        ratios.append(wide / tall)
        corners |= {name for name, met in (("top", top == 0), ("bottom", top + tall == 112)) if met}
    assert 0.195 <= min(areas) < 0.22
    assert 0.9 < max(areas) <= 1
    assert 0.74 <= min(ratios) < 0.78
    assert 1.28 < max(ratios) <= 1.36
    # The two sides are treated alike.
    assert abs(np.log(ratios).mean()) < 0.02
    assert corners == {"top", "bottom"}


def test_a_low_resolution_goes_down_and_up_by_any_two_interpolations(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[tuple[int, int]] = []
    resized = views_module._resized
    kinds = (cv2.INTER_NEAREST, cv2.INTER_LINEAR, cv2.INTER_AREA, cv2.INTER_CUBIC)

    def listen(image: np.ndarray, size: tuple[int, int], draws: Iterator[float]) -> np.ndarray:
        assert size[0] == size[1]
        number = next(draws)
        called.append((size[0], kinds[int(4 * number)]))
        return resized(image, size, iter([number]))

    monkeypatch.setattr(views_module, "_resized", listen)
    image = pixels(4)
    met = views(image, 1600, lowres=1)
    small, large = called[::2], called[1::2]
    sides = [side for side, _ in small]
    assert (min(sides), max(sides)) == (22, 111)
    # Uniform over 22.4 to 112, rounded down.
    assert np.mean(sides) == pytest.approx(66.7, abs=3)
    assert {side for side, _ in large} == {112}
    pairs = [(down, up) for (_, down), (_, up) in zip(small, large, strict=True)]
    for down in kinds:
        for up in kinds:
            assert pairs.count((down, up)) == pytest.approx(100, abs=55)
    for at in range(60):
        (side, down), (_, up) = small[at], large[at]
        lower = cv2.resize(image, (side, side), interpolation=down)
        expected = cv2.resize(lower, (112, 112), interpolation=up).astype(float)
        difference = np.abs(met[at] - expected).mean()
        # By area the way goes over a whole multiple of the small side.
        assert difference < 1.5 if down == cv2.INTER_AREA else difference == 0


def test_photometric_changes_are_those_of_the_dense_twin() -> None:
    image = pixels(5, 32, 32)
    first = len(CHANGES)
    for draws in draws_of(range(60)):
        met, _ = view_of(image, draws, Augmentation(photometric=1), nobody)
        brightness, contrast, saturation = draws[first : first + 3] + 0.5
        x = image.astype(np.float64)
        grey = (x @ [0.299, 0.587, 0.114])[..., None]
        expected = brightness * (contrast * (saturation * x + (1 - saturation) * grey) + (1 - contrast) * grey.mean())
        # OpenCV rounds the greys, which are multiplied by up to 1.125.
        assert np.abs(met - expected.clip(0, 255)).max() <= 1.6
    plain = np.full((8, 8, 3), 100, np.uint8)
    levels = [int(view[0, 0, 0]) for view in views(plain, 800, photometric=1)]
    assert 50 <= min(levels) < 53
    assert 147 < max(levels) <= 150
    assert np.mean(levels) == pytest.approx(100, abs=6)


def test_an_affine_change_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    matrices: list[np.ndarray] = []

    def listen(image: np.ndarray, matrix: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        matrices.append(matrix)
        return image

    monkeypatch.setattr(cv2, "warpAffine", listen)
    views(pixels(6), 600, affine=1)
    found = np.array(matrices)
    scales = np.sqrt(np.linalg.det(found[:, :, :2]))
    turns = np.degrees(np.arctan2(found[:, 0, 1], found[:, 0, 0]))
    center = np.array([55.5, 55.5])
    shifts = found[:, :, :2] @ center + found[:, :, 2] - center
    for values, low, high in ((scales, 0.9, 1.1), (turns, -10, 10), (shifts[:, 0], -4, 4), (shifts[:, 1], -4, 4)):
        slack = 0.02 * (high - low)
        assert low - 1e-6 <= values.min() < low + slack
        assert high - slack < values.max() <= high + 1e-6
        assert values.mean() == pytest.approx((low + high) / 2, abs=0.06 * (high - low))


def test_a_mixture_is_of_both_images() -> None:
    image, mate = np.full((8, 8, 3), 200, np.uint8), np.zeros((8, 8, 3), np.uint8)
    places: list[float] = []

    def other(share: float) -> np.ndarray:
        places.append(share)
        return mate

    levels = [int(view[0, 0, 0]) for view in views(image, 800, other, mix=1)]
    for values, high in ((levels, 200), (places, 1)):
        assert 0 <= min(values) < 0.02 * high
        assert 0.98 * high < max(values) <= high
        assert np.mean(values) == pytest.approx(high / 2, abs=0.06 * high)
    assert abs(np.corrcoef(levels, places)[0, 1]) < 0.15


# ---- through the loader


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> RecordDataset:
    return RecordDataset(write_records(tmp_path_factory.mktemp("faces"), insightface_records([4, 4, 4, 4])))


Seen = dict[int, tuple[torch.Tensor, int, torch.Tensor | None]]


def seen(
    faces: RecordDataset, augmentation: Augmentation, *, workers: int = 0, ranks: int = 1, epochs: int = 2, **keep: bool
) -> Seen:
    """Image, label and clean image by the record, of the last epoch."""
    found: Seen = {}
    for rank in range(ranks):
        sampler = ViewSampler(len(faces), rank=rank, world_size=ranks, seed=8)
        loader = FaceLoader(faces, batch_size=3, sampler=sampler, num_workers=workers, drop_last=False)
        loader.degrade(augmentation, **keep)
        told: list[BatchViews] = []
        loader.on_batch = told.append
        for epoch in range(0 if workers else epochs - 1, epochs):
            sampler.set_epoch(epoch)
            for images, labels in loader:
                views = told[-1]
                clean = [None] * len(labels) if views.clean is None else list(views.clean_images(loader.device))
                for at, index in enumerate(views.index.tolist()):
                    found[index] = images[at], int(labels[at]), clean[at]
    return found


def test_views_are_the_same_with_any_number_of_workers_and_ranks(faces: RecordDataset) -> None:
    expected = seen(faces, STRONG)
    for met in (seen(faces, STRONG, workers=2), seen(faces, STRONG, ranks=3)):
        assert met.keys() == expected.keys()
        for index, (image, label, clean) in met.items():
            assert torch.equal(image, expected[index][0])
            assert label == expected[index][1]
            assert clean is None


def test_a_loader_shows_what_the_seed_says_and_keeps_the_clean_images(faces: RecordDataset) -> None:
    plain = seen(faces, PRESETS["flip"], keep_clean=True)
    assert all(clean is None for _, _, clean in plain.values())
    met = seen(faces, STRONG, keep_clean=True)
    sampler = ViewSampler(len(faces), seed=8)
    sampler.set_epoch(1)
    mixtures = 0
    for view in sampler:
        pixels_of = faces.pixels(view)[1]
        (draws,) = draws_of([view.seed or 0])
        wanted, mixed = view_of(
            pixels_of, draws, STRONG, lambda share: faces.pixels(View(int(share * len(faces)), False))[1]
        )
        image, label, clean = met[view.index]
        assert torch.equal(((image + 1) * 127.5).round().to(torch.uint8), torch.from_numpy(wanted).permute(2, 0, 1))
        assert clean is not None
        assert torch.equal(clean, plain[view.index][0])
        assert label == (-1 if mixed else faces.label(view.index))
        mixtures += mixed
    assert 0 < mixtures < len(faces)


def test_a_bad_record_is_met_in_a_mixture_as_anywhere(tmp_path: Path) -> None:
    records = insightface_records([2, 2, 2])
    damaged = records[3][1][:200] + bytes(len(records[3][1]) - 200)
    faces = RecordDataset(write_records(tmp_path, [*records[:3], (3, damaged), *records[4:]]), on_bad_record="skip")
    loader = FaceLoader(faces, batch_size=2, sampler=ViewSampler(len(faces), seed=1), num_workers=0)
    loader.degrade(Augmentation(mix=1))
    for epoch in range(6):
        loader.sampler.set_epoch(epoch)
        assert all(label == -1 for _, labels in loader for label in labels.tolist())
    assert list(loader.skipped.found) == [2]


class Plain(ViewSampler):
    """A sampler of a user's own."""

    def __iter__(self) -> Iterator[View]:
        return (View(index, False) for index in range(self.size))


def test_views_of_a_sampler_without_seeds_are_not_degraded_all_alike(faces: RecordDataset) -> None:
    loader = FaceLoader(faces, batch_size=4, sampler=Plain(len(faces)), num_workers=0)
    assert len(list(loader)) == 4
    loader.degrade(PRESETS["quality"])
    with pytest.raises(DataError, match="seed"):
        next(iter(loader))


def test_workers_that_have_begun_are_not_told_anew(faces: RecordDataset) -> None:
    loader = FaceLoader(faces, batch_size=8, num_workers=1)
    for _ in loader:
        pass
    loader.degrade(PRESETS["flip"], keep_clean=True)
    with pytest.raises(ConfigError, match=r"student\.augment"):
        loader.degrade(STRONG)
