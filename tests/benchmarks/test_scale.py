"""One rank of many on paper: the formulas against what the head really holds and sends."""

import pytest
import torch
from torch import Tensor, nn

from benchmarks import scale
from benchmarks.scale import OneRank, Sizes, arcface_kd_share, partial_fc_share, published_share, share_step

SIZES = Sizes(classes=1003, ranks=(4,), rows=6, dimension=16, rounds=1)
CPU = torch.device("cpu")


class CountingRank(OneRank):
    """Adds up the bytes that go through each kind of collective."""

    gathered = scattered = reduced = 0

    def gather(self, rows: Tensor, sizes: list[int]) -> Tensor:
        result = super().gather(rows, sizes)
        type(self).gathered += result.nbytes
        return result

    def sum_rows(self, gathered: Tensor, sizes: list[int]) -> Tensor:
        type(self).scattered += gathered.nbytes
        return super().sum_rows(gathered, sizes)

    def sum_(self, values: Tensor) -> Tensor:
        type(self).reduced += values.nbytes
        return super().sum_(values)

    def max_(self, values: Tensor) -> Tensor:
        type(self).reduced += values.nbytes
        return super().max_(values)


def test_our_bytes_on_the_wire_are_counted_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "OneRank", CountingRank)
    share_step(SIZES, 4)()
    sent = 0.75 * (CountingRank.gathered + CountingRank.scattered) + 2 * 0.75 * CountingRank.reduced
    assert CountingRank.reduced > 0
    assert sent == arcface_kd_share(1003, 4, 6, 16, CPU).sent


def test_our_state_is_what_the_head_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    heads: list[nn.Module] = []
    make = scale.AdaDistill

    def remember(*arguments: object) -> nn.Module:
        heads.append(make(*arguments))  # type: ignore[arg-type]
        return heads[0]

    monkeypatch.setattr(scale, "AdaDistill", remember)
    share_step(SIZES, 4)
    assert not list(heads[0].parameters())
    assert sum(buffer.nbytes for buffer in heads[0].buffers()) == arcface_kd_share(1003, 4, 6, 16, CPU).state


def test_a_share_of_one_rank_is_the_whole_and_sends_nothing() -> None:
    for share in (partial_fc_share(1000, 1, 8, 16), published_share(1000, 1, 8, 16)):
        assert share.classes == 1000
        assert share.operations == 6 * 8 * 1000 * 16
        assert share.sent == 0
    assert arcface_kd_share(1000, 1, 8, 16, CPU).operations == 4 * 8 * 1000 * 16


def test_webface42m_on_eight_gpus() -> None:
    """Worked out by hand: 257,489 classes a rank, 1,024 rows, D = 512."""
    whole = (2_059_906, 8, 128, 512)
    ours, host, published = arcface_kd_share(*whole, CPU), partial_fc_share(*whole), published_share(*whole)
    assert ours.classes == host.classes == 257_489
    assert ours.state / 1e6 == pytest.approx(528.4, abs=0.1)
    assert host.state / 1e6 == pytest.approx(1582.0, abs=0.1)
    assert published.state / 1e6 == pytest.approx(12656.1, abs=0.1)
    assert published.sent / 1e6 == pytest.approx(7382.7, abs=0.1)
    assert ours.operations / host.operations == pytest.approx(2 / 3)
    assert ours.sent < 6e6


def test_the_faked_collectives_keep_own_rows_and_draw_others() -> None:
    rank = OneRank(3, classes=50)
    assert rank.sizes(4) == [4, 4, 4]
    labels = rank.gather(torch.tensor([1, 2, 3, 4]), [4, 4, 4])
    assert labels[:4].tolist() == [1, 2, 3, 4]
    assert labels.shape == (12,)
    assert ((labels >= 0) & (labels < 50)).all()
    rows = torch.randn(4, 64, requires_grad=True)
    gathered = rank.gather_with_gradient(rows, [4, 4, 4])
    assert torch.equal(gathered[:4], rows)
    assert (gathered[4:].norm(dim=1) - 1).abs().max() < 0.5
    (gathered * torch.arange(12.0).unsqueeze(1)).sum().backward()
    assert rows.grad is not None
    assert torch.equal(rows.grad, torch.arange(4.0).unsqueeze(1).expand(4, 64))
    assert rank.max_(torch.tensor([-torch.inf, 3.0])).tolist() == [0.0, 3.0]


def test_a_step_finds_a_gradient_for_its_own_rows() -> None:
    gradient = share_step(SIZES, 4)()
    assert gradient.shape == (6, 16)
    assert gradient.isfinite().all()
    assert (gradient.norm(dim=1) > 0).all()
