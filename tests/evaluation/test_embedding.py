"""Flip-summed, normalised embeddings: arithmetic, modes, batches, refusals."""

import io

import numpy as np
import pytest
import torch
from sklearn.preprocessing import normalize as sklearn_normalize
from torch import Tensor, nn

from arcface_kd.errors import DataError
from arcface_kd.evaluation.embedding import embed, normalize


class Recorder(nn.Module):
    """A linear network that keeps what it was shown."""

    def __init__(self, size: int = 6, dimension: int = 5) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * size * size, dimension)
        self.norm = nn.BatchNorm1d(dimension)
        self.frozen = nn.Dropout(0.9)
        self.frozen.eval()
        self.seen: list[Tensor] = []
        self.modes: list[bool] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(images)
        self.modes.append(self.training or self.norm.training or torch.is_grad_enabled())
        return self.frozen(self.norm(self.linear(images.flatten(1))))


def some_images(count: int, size: int = 6) -> Tensor:
    return torch.randint(0, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(1)).to(torch.uint8)


@pytest.mark.parametrize("count", [1, 4, 5, 11])
@pytest.mark.parametrize("flip", [True, False])
def test_is_the_normalised_sum_of_both_views(count: int, flip: bool) -> None:
    network = Recorder().eval()
    images = some_images(count)
    expected = np.zeros((count, 5))
    for i, image in enumerate(images):
        pixels = image.numpy().astype(np.float64) / 127.5 - 1
        for view in (pixels, pixels[:, :, ::-1]) if flip else (pixels,):
            expected[i] += network(torch.tensor(view.copy()[None]).float())[0].detach().numpy()
        expected[i] /= np.sqrt((expected[i] ** 2).sum())
    met = embed(network, images, batch_size=4, flip=flip)
    assert met.dtype == np.float32
    np.testing.assert_allclose(met, expected, rtol=1e-4, atol=1e-5)
    assert embed(network, images, batch_size=4, flip=flip, dtype=np.float64).dtype == np.float64


def test_pixels_are_transformed_as_the_host_does() -> None:
    network = Recorder(size=16).eval()
    images = torch.arange(256).to(torch.uint8).reshape(1, 1, 16, 16).repeat(1, 3, 1, 1)
    embed(network, images, flip=False)
    assert torch.equal(network.seen[0], ((images.float() / 255) - 0.5) / 0.5)
    assert network.seen[0].is_contiguous()


def test_every_batch_is_as_long_as_the_others() -> None:
    network = Recorder().eval()
    embed(network, some_images(10), batch_size=4)
    assert [len(batch) for batch in network.seen] == [4] * 6
    embed(network, some_images(3), batch_size=4)
    assert [len(batch) for batch in network.seen[6:]] == [3, 3]


def test_modes_come_back_as_they_were() -> None:
    network = Recorder()
    network.train()
    network.frozen.eval()
    running = network.norm.running_mean
    assert running is not None
    before = running.clone()
    embed(network, some_images(5), batch_size=2)
    assert not any(network.modes)
    for images in (some_images(5), some_images(2, size=7)):
        try:
            embed(network, images)
        except RuntimeError:
            assert images.shape[2] == 7, "the layers do not take it"
        assert [module for module in network.modules() if not module.training] == [network.frozen]
    assert torch.equal(running, before)


def test_batches_go_to_the_device_that_is_asked_for() -> None:
    seen: list[str] = []

    class Somewhere(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(images.device.type)
            return torch.ones(len(images), 2)

    embed(Somewhere(), some_images(2), device="meta", flip=False)
    embed(Somewhere(), some_images(2), flip=False)
    assert seen == ["meta", "cpu"]


def test_progress_is_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    shown = []
    for kind, asked in ((Terminal, True), (Terminal, False), (io.StringIO, True), (io.StringIO, False)):
        stream = kind()
        monkeypatch.setattr("sys.stderr", stream)
        embed(Recorder(), some_images(3), progress=asked)
        shown.append("embedding" in stream.getvalue())
    assert shown == [True, False, False, False]


@pytest.mark.parametrize(
    ("images", "batch_size", "named"),
    [
        (torch.zeros(2, 3, 6, 6), 1, r"\(2, 3, 6, 6\).*torch.float32.*uint8"),
        (torch.zeros(3, 6, 6, dtype=torch.uint8), 1, r"\(3, 6, 6\)"),
        (torch.zeros(2, 6, 6, 3, dtype=torch.uint8), 1, r"\(2, 6, 6, 3\)"),
        (torch.zeros(0, 3, 6, 6, dtype=torch.uint8), 1, r"\(0, 3, 6, 6\).*at least one"),
        (some_images(2), 0, "batch size 0"),
        (some_images(2), 2, r"\(2, 3, 6, 6\).*wanted embeddings \(2, D\)"),
    ],
)
def test_refusals(images: Tensor, batch_size: int, named: str) -> None:
    """Of images, and of a model that returns maps."""
    with pytest.raises(DataError, match=named):
        embed(nn.Identity(), images, batch_size=batch_size)


@pytest.mark.parametrize("shape", [(1, 1), (1, 512), (7, 1), (40, 3), (300, 512)])
def test_normalize_has_the_bits_of_scikit_learn(shape: tuple[int, int]) -> None:
    rows = np.random.default_rng(0).normal(size=shape) * np.random.default_rng(1).lognormal(size=(shape[0], 1), sigma=5)
    rows[-1] = 0
    untouched = rows.copy()
    assert np.array_equal(normalize(rows), sklearn_normalize(rows))
    assert np.array_equal(rows, untouched)
    assert np.array_equal(normalize(rows.astype(np.float32)), sklearn_normalize(rows.astype(np.float32).astype(float)))
