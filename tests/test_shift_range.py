"""The offset of a tensor: the one with which a symmetric grid loses least, never one that loses more than none."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qonnx.passes.shift_range import best_offset

Rows = npt.NDArray[np.float32]


def best_error(x: Rows, low: float, high: float) -> float:
    """The least squared error of int8 over ranges from the whole to a quarter of it, spelled out."""
    errors = []
    for fraction in np.linspace(1, 0.25, 200):
        step = fraction * max(-low, high) / 127
        errors.append(float(np.square(np.clip(np.rint(x / step), -128, 127) * step - x).mean()))
    return min(errors)


def rows(seed: int, count: int = 400, channels: int = 6) -> Rows:
    return np.random.default_rng(seed).standard_normal((count, channels)).astype(np.float32)


def ends(x: Rows) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    return x.min(axis=0).astype(np.float64), x.max(axis=0).astype(np.float64)


def test_a_relu_gets_half_of_its_range() -> None:
    x = np.clip(4 * rows(0), 0, 6)
    offset = best_offset(x, *ends(x), alike=True)
    np.testing.assert_allclose(offset.shift, 3.0)
    assert 5.5 < offset.gain_db < 6.5


def test_the_gain_is_what_int8_gains() -> None:
    x = np.maximum(rows(1), 0)
    (low, high), offset = ends(x), best_offset(x, *ends(x), alike=True)
    z = float(offset.shift[0])
    before = best_error(x, float(low.min()), float(high.max()))
    after = best_error(x - np.float32(z), float(low.min()) - z, float(high.max()) - z)
    assert offset.gain_db == pytest.approx(10 * np.log10(before / after), abs=0.4)
    assert offset.gain_db > 4


def test_few_large_elements_do_not_move_the_offset() -> None:
    """Extremes are those of all elements, and so rare that the samples hold none: half of them would waste codes."""
    x = np.maximum(rows(2, count=2000), 0)
    low, high = ends(x)
    high[3] = 3 * x.max()
    offset = best_offset(x, low, high, alike=True)
    assert offset.shift[0] < 0.3 * high[3]
    assert offset.gain_db > 4


def test_every_channel_its_own() -> None:
    x = (0.2 * rows(3) + np.arange(6)).astype(np.float32)
    low, high = ends(x)
    offset = best_offset(x, low, high, alike=False)
    np.testing.assert_allclose(offset.shift, (low + high) / 2)
    assert offset.gain_db > 10
    assert np.ptp(best_offset(x, low, high, alike=True).shift) == 0


def test_a_tensor_below_zero() -> None:
    x = -np.maximum(rows(4), 0)
    offset = best_offset(x, *ends(x), alike=True)
    assert offset.shift[0] < 0
    assert offset.gain_db > 4


@pytest.mark.parametrize("alike", [True, False])
def test_nothing_to_gain(alike: bool) -> None:
    x = np.concatenate([rows(5), -rows(5)])
    for tensor in (x, np.zeros_like(x), np.round(x)):
        offset = best_offset(tensor, *ends(tensor), alike=alike)
        assert not offset.shift.any()
        assert offset.gain_db == 0


def test_channels_without_elements() -> None:
    x = np.maximum(rows(6), 0)
    low, high = ends(x)
    low[2], high[2] = np.inf, -np.inf
    assert np.isfinite(best_offset(x, low, high, alike=True).shift).all()
    assert best_offset(x, low, high, alike=False).shift[2] == 0


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.floats(-5, 5), st.floats(0.01, 100), st.booleans())
def test_it_never_costs_range(seed: int, centre: float, spread: float, alike: bool) -> None:
    x = spread * (rows(seed, count=50) + np.float32(centre))
    low, high = ends(x)
    offset = best_offset(x, low, high, alike=alike)
    assert offset.gain_db >= 0
    before = max(-low.min(), high.max())
    after = max(-(low - offset.shift).min(), (high - offset.shift).max())
    assert after <= before * (1 + 1e-9)
