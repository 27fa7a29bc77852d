"""The margin on the target logit against its formula, its derivative and its corner cases."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arcface_kd.losses.margin import Margin
from tests.reference.margin_softmax import target_cosine
from tests.reference.problems import MARGINS

KNOBS = [(1.0, 0.5, 0.0), (1.0, 0.0, 0.4), (1.0, 0.0, 0.0), (1.1, 0.3, 0.2)]
KNOBS += [(1.35, 0.0, 0.0), (4.0, 0.0, 0.0), (1.0, 1.5, 0.1)]


@pytest.mark.parametrize("knobs", KNOBS)
def test_psi_and_slope_equal_the_formula_and_its_autograd_derivative(knobs: tuple[float, float, float]) -> None:
    margin = Margin(64.0, *knobs)
    cosine = torch.linspace(-0.999, 0.999, 4001, dtype=torch.float64, requires_grad=True)
    wanted = target_cosine(cosine, margin)
    (slope_wanted,) = torch.autograd.grad(wanted.sum(), cosine)
    psi, slope = margin.target(cosine.detach())
    torch.testing.assert_close(psi, wanted.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(slope, slope_wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("m1", [1.0, 1.35])
def test_a_margin_for_each_cosine_is_that_margin_alone(m1: float) -> None:
    """Beyond the turn too, and where the margin itself has none."""
    cosine = torch.linspace(-1, 1, 101, dtype=torch.float64)
    m2 = torch.linspace(0, math.pi / 2, 101, dtype=torch.float64).flip(0).roll(30)
    psi, slope = Margin(64.0, m1, 0.0, 0.1).target(cosine, m2)
    alone = [Margin(64.0, m1, float(m), 0.1).target(c) for c, m in zip(cosine, m2, strict=True)]
    torch.testing.assert_close(psi, torch.stack([one for one, _ in alone]), rtol=0, atol=1e-14)
    # On the class center itself, and opposite, the formula of the slope is 0 / 0.
    inner = cosine.abs() < 1
    torch.testing.assert_close(slope[inner], torch.stack([one for _, one in alone])[inner], rtol=1e-10, atol=1e-12)


def test_arcface_below_the_turn_is_cosine_less_m_sin_m() -> None:
    """The guard of ArcFace's authors: cos theta <= cos(pi - m) gives cos theta - m sin m."""
    cosine = torch.tensor([-0.9, -0.95, -1.0], dtype=torch.float64)
    psi, slope = Margin(64.0, 1.0, 0.5, 0.0).target(cosine)
    torch.testing.assert_close(psi, cosine - 0.5 * math.sin(0.5), rtol=0, atol=1e-15)
    assert slope.tolist() == [1.0, 1.0, 1.0]


@settings(deadline=None)
@given(m1=st.floats(1.0, 6.0), m2=st.floats(0.0, math.pi / 2), m3=st.floats(0.0, 1.9))
def test_psi_never_rises_with_the_angle(m1: float, m2: float, m3: float) -> None:
    """A margin that pays for turning away from the class center would be no margin."""
    cosine = torch.cos(torch.linspace(0, math.pi, 2001, dtype=torch.float64))
    psi, slope = Margin(64.0, m1, m2, m3).target(cosine)
    assert (psi.diff() <= 1e-12).all()
    assert (slope >= 0).all()
    assert (psi <= cosine + 1e-12).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MARGINS)
def test_aligned_opposite_and_rounded_cosines_are_finite(name: str, dtype: torch.dtype) -> None:
    cosine = torch.tensor([1.0, -1.0, 1.0 + 1e-6, -1.0 - 1e-6, 1.0 - 1e-7], dtype=dtype)
    psi, slope = MARGINS[name].target(cosine)
    assert psi.isfinite().all()
    assert slope.isfinite().all()
    assert (slope >= 0).all()
    assert psi[2] == psi[0]
    assert psi[3] == psi[1]


def test_slope_keeps_the_gradient_in_a_unit_vector_bounded_near_zero_angle() -> None:
    """The slope goes as 1 / sin theta, the tangent that it multiplies as sin theta."""
    angle = torch.tensor([1e-8, 1e-6, 1e-4, 1e-2], dtype=torch.float64)
    _, slope = Margin(64.0, 1.0, 0.5, 0.0).target(angle.cos())
    assert (slope * angle.sin() <= 1.0).all()
    torch.testing.assert_close((slope * angle.sin())[2:], (angle[2:] + 0.5).sin(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("knob", "value"),
    [
        *(("scale", value) for value in (0.0, math.nan)),
        *(("m1", 0.9), ("m2", -0.1), ("m2", 1.6), ("m3", 2.0), ("m3", -0.1)),
        *(("filter_threshold", value) for value in (1.5, math.nan)),
    ],
)
def test_a_knob_out_of_range_is_refused_with_its_value(knob: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"is {value}"):
        Margin(**{knob: value})
